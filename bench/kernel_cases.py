"""One measurement in the kernel's tables of the network namespace that this process runs in.

`python bench/kernel_cases.py CASE PEERS` prints its figures as JSON. `kernel_tables.py` makes a fresh namespace for
each and runs this in it, so that neither the kernel's tables nor this process remember another measurement.
"""

import asyncio
import contextlib
import gc
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it also runs by its path

from bench.peers import NODE_ADDRESS, Peer, network_config
from bench.rig import UPLINK
from bench.scenario import percentile
from flannelpy.backend import Backend, Facts, load
from flannelpy.kernel import codec
from flannelpy.kernel.linux import LinuxKernel
from flannelpy.kernel.monitor import Monitor, View
from flannelpy.kernel.netlink import NetlinkSocket
from flannelpy.model.address import Mac, Prefix, parse_prefix, parse_v4
from flannelpy.model.config import parse_config
from flannelpy.model.kernel import Scope, State
from flannelpy.model.lease import Delta, Lease, LeaseAttrs, LeaseUpdate, Snapshot
from flannelpy.model.peers import Change, Peers
from flannelpy.model.plan import Op, Remove, plan, plan_part
from flannelpy.model.uplink import Uplink

Figures = dict[str, float]

BOOT = 3
ROUNDS = 7
CHANGES = 200
STORM_SECONDS = 5.0
STORM_RATE = 1000
_SO_DETACH_FILTER = 27
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
    """Our code over the real kernel, with no peer yet: what the daemon does, without its loop and its store."""

    def __init__(self, backend: str) -> None:
        config = parse_config(network_config(backend))
        own_ip = parse_v4(NODE_ADDRESS)
        self.backend: Backend = load(config)
        self.kernel = LinuxKernel()
        index = next(link.ifindex for link in self.kernel.interfaces() if link.name == UPLINK)
        self.facts = Facts(Uplink(UPLINK, index, 1500, own_ip, None, own_ip, None), {})
        self.lease = _lease(backend, "10.1.0.0/24", own_ip, _OWN_MAC)
        self.scope = Scope(frozenset(self.backend.devices), (parse_prefix("10.0.0.0/8"),), uplink=UPLINK)
        self.peers = Peers(config, self.lease, lambda lease: self.backend.peer(lease, self.facts))
        self.observed = State()
        ops = plan(self.backend.own(self.lease, self.facts), self.kernel.observe(self.scope))
        self.kernel.apply(ops)
        self.observe()

    def observe(self) -> None:
        """Read what the kernel holds."""
        self.observed = self.kernel.observe(self.scope)
        self.facts = self.facts._replace(links=self.observed.links)

    def ask(self, leases: Sequence[Lease]) -> None:
        """Which of them are on-link, if the backend wants to know."""
        if self.backend.wants_on_link:
            asked = {lease.attrs.public_ip for lease in leases if lease.attrs.public_ip}
            found = self.kernel.on_link(asked, UPLINK)
            self.facts = self.facts._replace(on_link=(self.facts.on_link - asked) | found)

    def take_in(self, update: LeaseUpdate) -> Change:
        self.ask(update.leases if isinstance(update, Snapshot) else update.put)
        return self.peers.update(update)

    def difference(self) -> list[Op]:
        desired = self.backend.own(self.lease, self.facts)
        desired.update(self.peers.state)
        return plan(desired, self.observed)

    def apply(self, ops: list[Op]) -> None:
        """Do it, and note what is done, as the reconciler does."""
        failures = self.kernel.apply(ops)
        if failures:
            raise SystemExit(f"the kernel refused {len(failures)} of {len(ops)}: {failures[0]}")
        for op in ops:
            if isinstance(op, Remove):
                self.observed.discard(op.item)
            else:
                self.observed.add((op.item,))

    def program(self, leases: Sequence[Lease]) -> None:
        self.take_in(Snapshot((self.lease, *leases), 1))
        self.apply(self.difference())

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
        _lease(backend, f"{Prefix(peer.subnet, 24)}", peer.public_ip, peer.mac)._replace(created=peer.number + 2)
        for peer in peers
    ]


# --- programming from an empty device ---


def program(backend: str, count: int) -> Figures:
    """Our way: judge all leases, compare, apply."""
    host, given = Host(backend), leases(backend, 0, count)
    snapshot = Snapshot((host.lease, *given), 1)
    whole = Stopwatch()
    watch = Stopwatch()
    figures: Figures = {}
    for name, step in (
        ("on_link", lambda: host.ask(given)),
        ("update", lambda: host.peers.update(snapshot)),
        ("plan", lambda: ops.extend(host.difference())),
        ("apply", lambda: host.apply(ops)),
    ):
        ops: list[Op] = [] if name != "apply" else ops  # noqa: F821
        step()
        figures[f"{name}_ms"], figures[f"{name}_cpu_ms"] = watch.lap()
    figures["sum_ms"], figures["sum_cpu_ms"] = whole.lap()
    return figures


def one_by_one(backend: str, count: int) -> Figures:
    """As flannel does it: one request at a time and its answer; routes plain, `via GW onlink`."""
    host = Host(backend)
    index = _index(host, backend)
    send = NetlinkSocket()
    given = [Peer(number) for number in range(count)]
    watch = Stopwatch()
    for peer in given:
        _as_flannel(send, backend, index, peer)
    figures: Figures = {}
    figures["sum_ms"], figures["sum_cpu_ms"] = watch.lap()
    figures["event_cpu_ms"] = percentile(
        [_timed(send, backend, index, Peer(count + number)) for number in range(CHANGES)], 50
    )
    return figures
