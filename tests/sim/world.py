"""A cluster of whole nodes in one event loop: the store, the machines, time, faults, and the verdict."""

import asyncio
import logging
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from flannelpy.model.address import Address, parse_prefix
from flannelpy.model.config import parse_config
from flannelpy.model.kernel import DeviceAddress, FdbEntry, Link, Neighbour, Route, Vxlan
from flannelpy.model.lease import Lease
from flannelpy.model.plan import Op
from flannelpy.store.etcd_codec import Record, read_lease
from flannelpy.store.memory import MemoryData
from tests.sim import checks
from tests.sim.checks import Shape
from tests.sim.clock import SimulatedLoop, run
from tests.sim.faults import Faults
from tests.sim.member import Member, current

SETTLED_SECONDS = 10.0
"""This long after the last fault every pair must be programmed."""
RECLAIM_SECONDS = 60.0
"""A lease that is lost a second time is taken back no sooner than this after the first."""
TTL_SECONDS = 86400.0

_POOL = '"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.LAST.0"'
_V6 = '"EnableIPv6":true,"IPv6Network":"fd00:5::/48"'
_VXLAN, _HOST_GW = '"Backend":{"Type":"vxlan"}', '"Backend":{"Type":"host-gw"}'
_DIRECT = '"Backend":{"Type":"vxlan","DirectRouting":true}'
_SHAPES = (
    (Shape((32, 128), "vxlan", direct=False), f"{_POOL},{_V6},{_VXLAN}"),
    (Shape((32,), "vxlan", direct=False), f"{_POOL},{_VXLAN}"),
    (Shape((128,), "vxlan", direct=False), f'"EnableIPv4":false,{_V6},{_VXLAN}'),
    (Shape((32, 128), "vxlan", direct=True), f"{_POOL},{_V6},{_DIRECT}"),
    (Shape((32, 128), "host-gw", direct=False), f"{_POOL},{_V6},{_HOST_GW}"),
)


class Outcome(NamedTuple):
    """What came of a run."""

    seed: int
    violations: list[str]
    log: list[str]


class Records(MemoryData):
    """The store's records; every write is looked at."""

    def __init__(self, world: "World") -> None:
        super().__init__()
        self.world = world
        self.written: dict[str, float] = {}

    def put(self, key: str, value: bytes, etcd_lease_id: int = 0) -> int:
        before = self.records.get(key)
        revision = super().put(key, value, etcd_lease_id)
        self.written[key] = self.world.loop.time()
        self.world.wrote(key, before)
        return revision

    def delete(self, key: str) -> None:
        if key in self.records:
            self.world.note(f"store: {key} deleted")
        super().delete(key)

    def expire_old(self) -> None:
        """What etcd does to records that were not prolonged for a TTL."""
        for key in list(self.records):
            is_lease = self.records[key].etcd_lease_id != 0
            if is_lease and self.world.loop.time() - self.written[key] > TTL_SECONDS:
                self.world.rob(key)


class World:
    """One run. `violations` says what went wrong, `log` what happened."""

    def __init__(self, seed: int, nodes: int, rounds: int, faults: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.log: list[str] = []
        self.violations: list[str] = []
        self.members: list[Member] = []
        self.owners: dict[Address, Member] = {}
        self.taken: dict[Member, float] = {}
        """When each last took its lease back."""
        self.began = 0.0
        """When the store's present history began."""
        self.calm_at = 0.0
        self.shape, text = self.random.choice(_SHAPES)
        last = min(250, nodes * 2 + 12)
        self.config_text = f"{{{text.replace('LAST', str(last))}}}"
        self.config = parse_config(self.config_text)
        self.loop = SimulatedLoop()
        self.data = Records(self)
        self.data.config = self.config_text
        self.faults = Faults(self)
        self.nodes, self.rounds, self.faults_a_round = nodes, rounds, faults
        self._hosts = 0

    # --- the story ---------------------------------------------------------------------------------------

    async def live(self) -> None:
        await self.start_all()
        for _round in range(self.rounds):
            for _number in range(self.random.randint(1, self.faults_a_round)):
                await asyncio.sleep(self.random.choice([0.0, 0.01, self.random.expovariate(1.0)]))
                if self.violations:
                    break
                await self.faults.strike()
            await self.settle()
            if self.violations:
                break
        for member in self.members:
            await member.kill()

    async def start_all(self) -> None:
        """The first nodes, more or less together."""
        for _number in range(self.nodes):
            self.join().start()
            await asyncio.sleep(self.random.choice([0.0, 0.01, 0.5]))

    async def settle(self) -> None:
        """Wait until the last fault is over and the time to recover has passed; then look."""
        self.fault_until(0.0)
        while self.loop.time() < self.calm_at + SETTLED_SECONDS or self.is_to_wait():  # noqa: ASYNC110
            await asyncio.sleep(self.calm_at + SETTLED_SECONDS - self.loop.time() + 1e-3)
        self.note("settled")
        leases = {}
        leftovers = []
        for key in self.data.records:
            owner, lease = self.owner(key), read_lease(self.data.records[key])
            if owner is not None and owner.running and self.is_current(owner, lease):
                leases[owner] = lease
            else:
                leftovers.append(lease)
        for member in self.members:
            if not member.running:
                continue
            if member not in leases:
                self.violation(f"{member} has no lease that tells where it is")
                continue
            for problem in checks.problems(member, leases, [*leftovers, *self.excused(member)], self.shape):
                self.violation(problem)
        for lease in leftovers:
            self.data.delete(lease.key)

    def is_to_wait(self) -> bool:
        """Whether somebody has a reason to take longer; moves the end of the last fault."""
        return False

    def is_current(self, owner: Member, lease: Lease) -> bool:
        """Whether a record is what its node counts on."""
        return self.is_at(owner, lease)

    def is_at(self, owner: Member, lease: Lease) -> bool:
        """Whether a lease tells the address that its node has now."""
        bits = self.shape.families[0]
        address = lease.attrs.public_ip if bits == 32 else lease.attrs.public_ipv6
        return address == owner.address(bits)

    def excused(self, _member: Member) -> Iterable[Lease]:
        """Leases without a record that it may still have programmed."""
        return ()

    def join(self) -> Member:
        """Another machine; its kernel holds things that are not ours."""
        member = Member(self, len(self.members), self.random.randrange(2))
        self.members.append(member)
        self.plug_in(member)
        furnish(member)
        return member

    def plug_in(self, member: Member, *, index: int = 2, routed: bool = True) -> None:
        """New addresses for its uplink; nobody ever had them."""
        self._hosts += 1
        member.plug_in(self._hosts, index=index, routed=routed)
        for bits in (32, 128):
            self.owners[member.address(bits)] = member

    def rob(self, key: str) -> None:
        """Somebody deletes a record, or its time is up."""
        owner = self.owner(key)
        self.data.delete(key)
        self.fault_until(0.0, robbed=owner)

    # --- what is done to the store -----------------------------------------------------------------------

    def wrote(self, key: str, before: Record | None) -> None:
        """Somebody wrote a record."""
        owner, now = None if before is None else self.owner_of(before), self.owner(key)
        self.note(f"store: {key} = {now}")
        if owner is not None and owner is not now:
            self.violation(f"{key} of {owner} was overwritten by {now}")
        other = checks.overlap(key, self.data.records)
        if other is not None:
            self.violation(f"two nodes own one subnet: {key} and {other}")

    # --- what the members tell ---------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.log.append(f"{self.loop.time():12.3f} {text}")

    def violation(self, text: str) -> None:
        self.note(f"VIOLATION {text}")
        self.violations.append(text)

    def fault_until(self, seconds: float, *, robbed: Member | None = None) -> None:
        """There is a fault, for so long from now. Who took its lease a moment ago has to wait."""
        now = self.loop.time()
        self.calm_at = max(self.calm_at, now + seconds)
        if robbed is not None and robbed in self.taken:
            self.calm_at = max(self.calm_at, self.taken[robbed] + RECLAIM_SECONDS)

    def owner(self, key: str) -> Member | None:
        """Whose record it is."""
        return self.owner_of(self.data.records[key])

    def owner_of(self, record: Record) -> Member | None:
        """The machine that has the public IP in a record."""
        attrs = read_lease(record).attrs
        return self.owners.get(attrs.public_ip or attrs.public_ipv6 or b"")

    def holds(self, member: Member, own: Lease) -> bool:
        return own.key in self.data.records and self.owner(own.key) is member

    def env_written(self, member: Member) -> None:
        """A machine has a subnet.env now."""

    def stepped(self, member: Member, op: Op) -> None:
        """After every operation that a kernel carried out."""
        if op.item.key in member.foreign.table(op.item):
            self.violation(f"{member} touched what is not ours: {op}")
        if not member.kernel.disturbed:
            broken = checks.broken_by(op, member.kernel.state)
            if broken is not None:
                self.violation(f"{member}, after {op}: {broken}")


def furnish(member: Member) -> None:
    """Strangers that look nearly like ours: none of them may be touched."""
    kernel = member.kernel
    kernel.foreign.update(("eth1", "docker0", "vxlan42"))
    far = Vxlan(42, "eth0", b"\xc6\x12\x00\x01", 8472)
    gateway = b"\xc6\x12\x00\xfe"
    items = (
        Link("docker0", "bridge", bytes(6), 1500, True),
        Link("vxlan42", "vxlan", bytes(6), 1450, True, far),
        DeviceAddress("docker0", parse_prefix("172.17.0.1/16")),
        Neighbour("vxlan42", b"\x0a\x05\x01\x00", b"\x02\0\0\0\0\x01"),
        FdbEntry("vxlan42", b"\x02\0\0\0\0\x01", gateway),
        Route(parse_prefix("10.5.251.0/24"), "eth1", gateway, protocol=4),
        Route(parse_prefix("10.5.0.0/16"), "eth1", gateway, protocol=4),
        Route(parse_prefix("10.5.1.128/25"), "eth1", gateway, protocol=3),
        Route(parse_prefix("10.5.2.0/24"), "eth1", gateway, protocol=4, metric=500),
        Route(parse_prefix("10.6.2.0/24"), "eth1", gateway),
        Route(parse_prefix("fd00:5:0:ffff:8000::/65"), "eth1", None, protocol=4, metric=1024),
        Route(parse_prefix("10.5.252.0/24"), "eth0", gateway, protocol=4),
        Route(parse_prefix("203.0.113.0/24"), "eth0", gateway, protocol=3),
    )
    kernel.state.add(items)
    member.foreign.add(items)


class _Journal(logging.Handler):
    """The daemons' own log lines among the events."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "overlaps" not in text:  # the strangers that look nearly like ours
            self._world.note(f"{current.get()}: {text}")


def simulate(
    seed: int, *, nodes: int = 6, rounds: int = 2, faults: int = 8, journal: bool = False
) -> Outcome:
    """One run, the same for the same arguments."""
    return outcome_of(World(seed, nodes, rounds, faults), journal=journal)


def outcome_of(world: World, *, journal: bool) -> Outcome:
    """Let it live."""
    log = logging.getLogger("flannelpy")
    handler, level, propagate = _Journal(world), log.level, log.propagate
    log.propagate = False
    log.setLevel(logging.INFO if journal else logging.CRITICAL)
    log.addHandler(handler)
    try:
        run(world.loop, world.live())
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
    return Outcome(world.seed, world.violations, world.log)
