"""One measurement in the kernel's tables of the network namespace that this process runs in.

`python bench/kernel_cases.py CASE PEERS BACKEND` prints its figures as JSON. `kernel_tables.py` makes a fresh
namespace for each and runs this in it, so that neither tables nor process remember another measurement.
"""

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it also runs by its path

from bench.peers import NODE_ADDRESS, Peer, network_config
from bench.rig import UPLINK
from bench.scenario import percentile
from flannelpy.backend import Backend, Facts, load
from flannelpy.kernel import codec
from flannelpy.kernel.links import Links
from flannelpy.kernel.linux import LinuxKernel
from flannelpy.kernel.monitor import Monitor
from flannelpy.kernel.netlink import NetlinkSocket
from flannelpy.model.address import Address, Mac, Prefix, parse_prefix, parse_v4
from flannelpy.model.config import parse_config
from flannelpy.model.kernel import PROTOCOL_BOOT, Notice, Route, Scope, State
from flannelpy.model.lease import Delta, Lease, LeaseAttrs, LeaseUpdate, Snapshot
from flannelpy.model.peers import Change, Peers
from flannelpy.model.plan import Op, note_done, plan, plan_part, stages
from flannelpy.model.uplink import Uplink

Figures = dict[str, float]

ROUNDS = 7
GC_THRESHOLD = (50_000, 20, 20)
"""As the daemon sets it."""
CHANGES = 200
STORM_SECONDS = 5.0
STORM_RATE = 1000
_OWN_MAC = b"\x02\0\0\0\0\x01"
_STORM_BATCH = 10


class Stopwatch:
    """Wall time and CPU time of this process, in ms, since it was made or last read."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        took = (wall - self._wall) * 1000, (cpu - self._cpu) * 1000
        self._wall, self._cpu = wall, cpu
        return took


class Host:
    """Our code over the real kernel, without peers yet: the daemon without its loop and its store."""

    def __init__(self, backend: str, *, listen: bool = False) -> None:
        config = parse_config(network_config(backend))
        own_ip = parse_v4(NODE_ADDRESS)
        self.backend: Backend = load(config)
        self.kernel = LinuxKernel()
        if listen:
            self.kernel.subscribe()
        index = next(link.ifindex for link in self.kernel.interfaces() if link.name == UPLINK)
        self.on_link: set[Address] = set()
        self.facts = Facts(Uplink(UPLINK, index, 1500, own_ip, None, own_ip, None), {}, on_link=self.on_link)
        self.lease = _lease(backend, "10.1.0.0/24", own_ip, _OWN_MAC)
        self.scope = Scope(frozenset(self.backend.devices), (parse_prefix("10.0.0.0/8"),), uplink=UPLINK)
        self.peers = Peers(config, self.lease, lambda lease: self.backend.peer(lease, self.facts))
        self.observed = State()
        ops = plan(self.backend.own(self.lease, self.facts), self.kernel.observe(self.scope))
        self.kernel.apply(ops)
        self.observe()
        device = UPLINK if backend == "host-gw" else "flannel.1"
        self.device_index = next(link.ifindex for link in self.kernel.interfaces() if link.name == device)

    def observe(self) -> None:
        """Read what the kernel holds."""
        self.observed = self.kernel.observe(self.scope)
        self.facts = self.facts._replace(links=self.observed.links)

    def ask(self, leases: Sequence[Lease]) -> None:
        """Which of them are on-link, if the backend wants to know."""
        if self.backend.wants_on_link:
            asked = {lease.attrs.public_ip for lease in leases if lease.attrs.public_ip}
            found = self.kernel.on_link(asked, UPLINK)
            self.on_link -= asked - found
            self.on_link |= found

    def take_in(self, update: LeaseUpdate) -> Change:
        self.ask(update.leases if isinstance(update, Snapshot) else update.put)
        return self.peers.update(update)

    def difference(self) -> list[Op]:
        desired = self.backend.own(self.lease, self.facts)
        desired.update(self.peers.state)
        return plan(desired, self.observed)

    def apply(self, ops: list[Op]) -> None:
        """Do it, and note what is done, as the reconciler does."""
        for stage in stages(ops):
            failures = self.kernel.apply(stage)
            if failures:
                raise SystemExit(f"the kernel refused {len(failures)} of {len(stage)}: {failures[0]}")
            note_done(self.observed, stage)

    def program(self, leases: Sequence[Lease]) -> None:
        self.take_in(Snapshot((self.lease, *leases), 1))
        self.apply(self.difference())

    def check(self) -> None:
        """What the kernel holds is what should be."""
        self.observe()
        if ops := self.difference():
            raise SystemExit(f"{len(ops)} operations are left to do, such as: {ops[0]}")

    def event(self, delta: Delta) -> float:
        """One change of one lease; CPU ms."""
        watch = Stopwatch()
        change = self.take_in(delta)
        if change.full:
            raise SystemExit("a single event led to a full pass")
        own = self.backend.own(self.lease, self.facts)
        self.apply(plan_part([own, self.peers.state], self.observed, change.touched))
        return watch.lap()[1]


def _lease(backend: str, subnet: str, public_ip: bytes, mac: Mac) -> Lease:
    data = {"VNI": 1, "VtepMAC": mac.hex(":")} if backend == "vxlan" else None
    key = subnet.replace("/", "-")
    return Lease(key, parse_prefix(subnet), None, LeaseAttrs(public_ip, None, backend, data), 1, 1)


def leases(backend: str, first: int, count: int) -> list[Lease]:
    """Leases of synthetic peers."""
    peers = map(Peer, range(first, first + count))
    return [
        _lease(backend, f"{Prefix(peer.subnet, 24)}", peer.public_ip, peer.mac)._replace(
            created=peer.number + 2
        )
        for peer in peers
    ]


# --- programming from an empty device ---


def program(backend: str, count: int) -> Figures:
    """Our way: judge all leases, compare, apply."""
    host, given = Host(backend), leases(backend, 0, count)
    whole, part = Stopwatch(), Stopwatch()
    figures: Figures = {}

    def note(name: str) -> None:
        figures[f"{name}_ms"], figures[f"{name}_cpu_ms"] = part.lap()

    host.ask(given)
    note("on_link")
    host.peers.update(Snapshot((host.lease, *given), 1))
    note("update")
    ops = host.difference()
    note("plan")
    host.apply(ops)
    note("apply")
    figures["sum_ms"], figures["sum_cpu_ms"] = whole.lap()
    host.check()
    return figures


def one_by_one(backend: str, count: int) -> Figures:
    """As flannel does it: one request at a time and its answer; plain routes, `via GW onlink`."""
    host, send = Host(backend), NetlinkSocket()
    given = [Peer(number) for number in range(count)]
    watch = Stopwatch()
    for peer in given:
        _put_singly(send, host, peer)
    figures: Figures = {}
    figures["sum_ms"], figures["sum_cpu_ms"] = watch.lap()
    cpu = []
    for number in range(count, count + CHANGES):
        watch.lap()
        _put_singly(send, host, Peer(number))
        cpu.append(watch.lap()[1])
    figures["add_p50_cpu_ms"], figures["add_p99_cpu_ms"] = percentile(cpu, 50), percentile(cpu, 99)
    return figures


def _put_singly(send: NetlinkSocket, host: Host, peer: Peer) -> None:
    index, subnet = host.device_index, Prefix(peer.subnet, 24)
    if host.backend.name == "vxlan":
        send.request(codec.neighbour_put(index, peer.subnet, peer.mac))
        send.request(codec.fdb_put(index, peer.mac, peer.public_ip))
        route = Route(subnet, "flannel.1", peer.subnet, onlink=True, protocol=PROTOCOL_BOOT)
    else:
        route = Route(subnet, UPLINK, peer.public_ip, protocol=PROTOCOL_BOOT)
    send.request(codec.plain_route_put(route, index, replace=True))


# --- with all peers programmed ---


def resync(backend: str, count: int) -> Figures:
    """Read everything, compare everything, find nothing to do."""
    host, given = Host(backend), leases(backend, 0, count)
    host.program(given)
    laps = []
    for _round in range(ROUNDS):
        watch = Stopwatch()
        host.observe()
        host.ask(given)
        if host.difference():
            raise SystemExit("a resync found something to do")
        laps.append(watch.lap())
    return {
        "wall_ms": percentile([wall for wall, _cpu in laps], 50),
        "cpu_ms": percentile([cpu for _wall, cpu in laps], 50),
        "max_cpu_ms": max(cpu for _wall, cpu in laps),
    }


def events(backend: str, count: int) -> Figures:
    """Single changes of single leases: CPU from the delta to the kernel's answer."""
    host, given = Host(backend), leases(backend, 0, count)
    host.program(given)
    new = leases(backend, count, CHANGES)
    moved = leases(backend, 2 * count, CHANGES)
    deltas = {
        "public IP": [_put(old._replace(attrs=old.attrs._replace(public_ip=to.attrs.public_ip)))
                      for old, to in zip(given[CHANGES:], moved, strict=False)],
        "add": [_put(lease) for lease in new],
        "remove": [Delta((), (lease.key,), 2) for lease in new],
    }  # fmt: skip
    if backend == "vxlan":
        deltas["MAC"] = [
            _put(old._replace(attrs=old.attrs._replace(backend_data=to.attrs.backend_data)))
            for old, to in zip(given, moved, strict=False)
        ]
    figures: Figures = {}
    for name, some in deltas.items():
        cpu = [host.event(delta) for delta in some]
        figures[f"{name}_p50_cpu_ms"], figures[f"{name}_p99_cpu_ms"] = (
            percentile(cpu, 50),
            percentile(cpu, 99),
        )
    host.check()
    return figures


def _put(lease: Lease) -> Delta:
    return Delta((lease,), (), 2)


# --- what is announced ---


def echoes(backend: str, count: int) -> Figures:
    """What listening costs while all peers are programmed: our own changes are announced to us too."""
    host, given = Host(backend, listen=True), leases(backend, 0, count)
    host.take_in(Snapshot((host.lease, *given), 1))
    ops = host.difference()
    watch = Stopwatch()
    host.apply(ops)
    figures: Figures = {}
    figures["apply_ms"], figures["apply_cpu_ms"] = watch.lap()
    figures["notices"] = asyncio.run(_count(host.kernel.changes(), 0.2))
    figures["listen_cpu_ms"] = watch.lap()[1]
    return figures


async def _count(found: AsyncIterator[Sequence[Notice]], seconds: float) -> int:
    """How many come within some seconds."""
    count = 0
    try:
        async with asyncio.timeout(seconds):
            async for notices in found:
                count += len(notices)
    except TimeoutError:
        pass
    return count


def foreign(backend: str, _count_of_peers: int) -> Figures:
    """1,000 neighbour events a second on a device that is not ours: CPU of the listener alone, in percent."""
    make_busy_device()
    figures: Figures = {}
    for name, narrow in (("with", Monitor.narrow), ("without", _narrow_nothing)):
        with patch.object(Monitor, "narrow", narrow):
            kernel = Host(backend, listen=True).kernel
            process = storm()
            watch = Stopwatch()
            asyncio.run(_count(kernel.changes(), STORM_SECONDS))
            wall, cpu = watch.lap()
            figures["events_per_s"] = events_sent(process) / STORM_SECONDS
            figures[f"{name}_filter_cpu_pct"] = cpu / wall * 100
            kernel.close()
    return figures


def _narrow_nothing(_monitor: Monitor, _devices: Iterable[int]) -> None:
    """In place of the filter: let everything through, to see what it is worth."""


def make_busy_device() -> None:
    """A device of somebody else, for neighbours of somebody else."""
    for line in ("link add busy0 type veth peer name busy1", "link set busy0 up"):
        subprocess.run(["ip", *line.split()], check=True)


def storm(*prefix: str) -> subprocess.Popen[str]:
    """Start what changes neighbours on the busy device of this namespace (or behind a command's `prefix`)."""
    words = [*prefix, sys.executable, __file__, "storm", "0"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def events_sent(process: subprocess.Popen[str]) -> float:
    """Wait for its end; how many events there were."""
    return float(json.loads(process.communicate()[0])["events"])


def _storm(_backend: str, _count_of_peers: int) -> Figures:
    """Change neighbours at a steady rate, as hosts that come and go do."""
    send, links = NetlinkSocket(), Links(NetlinkSocket())
    index = links.read()["busy0"].ifindex
    began = time.monotonic()
    sent = 0
    while time.monotonic() < began + STORM_SECONDS:
        some = range(sent, sent + _STORM_BATCH)
        send.batch([codec.neighbour_put(index, *_passer_by(number)) for number in some])
        sent += _STORM_BATCH
        time.sleep(max(0.0, began + sent / STORM_RATE - time.monotonic()))
    return {"events": sent}


def _passer_by(number: int) -> tuple[bytes, Mac]:
    return (0xC6330000 + number % 500).to_bytes(4), bytes((2, 0, 0, 0, 0, number // 500 % 2))


CASES: dict[str, Callable[[str, int], Figures]] = {
    "program": program,
    "one_by_one": one_by_one,
    "resync": resync,
    "events": events,
    "echoes": echoes,
    "foreign": foreign,
    "storm": _storm,
}


if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    case, peers, *rest = sys.argv[1:]
    print(json.dumps(CASES[case](rest[0] if rest else "vxlan", int(peers))))
