"""One machine of a simulated cluster: its kernel, its subnet.env, and the process that runs there or not."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from random import Random
from typing import Protocol

from flannelpy.backend import load
from flannelpy.errors import KernelError, StoreError, UplinkError
from flannelpy.health import Health
from flannelpy.kernel.fake import FakeKernel
from flannelpy.model.address import Address, Prefix, parse_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.config_change import compare
from flannelpy.model.identity import Identity
from flannelpy.model.kernel import State
from flannelpy.model.lease import Lease, LeaseAttrs, LeaseUpdate, Snapshot
from flannelpy.model.plan import Op
from flannelpy.model.subnet import Previous
from flannelpy.model.traffic import Wishes
from flannelpy.model.uplink import Interface, InterfaceAddress, Wish
from flannelpy.node import Node, Parts
from flannelpy.rules import Firewall
from flannelpy.start import learn_network
from flannelpy.state_file import Memory, Origin
from flannelpy.store import Offer, Running
from flannelpy.store.etcd_codec import Listing
from flannelpy.store.memory import MemoryData, MemoryStore
from flannelpy.subnet_env import variables
from tests.sim.keys import overlap

CONFIRM_SECONDS, CONFIRM_LATE_SECONDS = 62.0, 602.0
"""So long after they met a new history the nodes have written their records again: once, and twice."""

current = ContextVar("current", default="")
"""Whose code is running, for the log."""


class Died(BaseException):
    """The process was killed."""


class Cluster(Protocol):
    """What a member needs of the world."""

    @property
    def data(self) -> MemoryData: ...

    random: Random
    taken: "dict[Member, float]"
    began: float

    def note(self, text: str) -> None: ...
    def fault_until(self, seconds: float, *, robbed: "Member | None" = None) -> None: ...
    def violation(self, text: str) -> None: ...
    def holds(self, member: "Member", own: Lease) -> bool: ...
    def env_written(self, member: "Member") -> None: ...
    def stepped(self, member: "Member", op: Op) -> None: ...


class SimStore(MemoryStore):
    """A store far away: it takes its time, fails, and may lose an answer after it did what was asked."""

    def __init__(self, member: "Member") -> None:
        super().__init__(member.world.data, random=Random(member.world.random.random()))
        self.member = member
        self.flaky = 0.0
        """How likely a request, and then its answer, is lost."""
        self.alive = True
        self.die_after_write = False
        self.flawed = False
        """The next listing lacks most of the records."""
        self.spoke = False
        """Whether it has told this process anything."""
        self.listed = False
        """Whether a Snapshot has reached this process."""
        self.remembered: set[str] = set()
        """Keys of the records in the memory that it began with."""
        self.seen: dict[str, list[LeaseAttrs]] = {}
        """What it was told since, by key."""
        self.doubts = 0.0
        """Until when it may take an older record of a new history for one of a backup."""
        self._last: dict[str, Lease] = {}
        self._former: dict[str, Lease] = {}
        self.began = 0
        """At which revision it met the present history,"""
        self.met = 0.0
        """and when; one that is as it was meets nobody."""

    def last_told(self, key: str) -> Lease | None:
        """The record as it was told last before the present history was met."""
        return self._former.get(key)

    async def _trip(self) -> None:
        random = self.member.world.random
        await asyncio.sleep(random.uniform(0.001, 0.05))
        if not self.alive:
            raise Died
        if random.random() < self.flaky:
            raise StoreError("lost on the way", transient=True)

    async def _travel(self) -> None:
        await asyncio.sleep(self.member.world.random.uniform(0.001, 0.05))
        if not self.alive:
            raise Died

    def _list(self) -> Listing:
        listing = super()._list()
        flawed, self.flawed = self.flawed, False
        # What a new history lacks is another story.
        if flawed and self.head is not None and not self._is_another():
            few = dict(list(listing.leases.items())[: len(listing.leases) // 3])
            listing = listing._replace(leases=few)
        return listing

    async def _answer(self, own: Lease) -> None:
        world = self.member.world
        self.spoke = True
        if not world.holds(self.member, own):
            world.violation(f"{self.member} was told that it owns {own.key}, the store says otherwise")
        self.member.unanswered = own.key
        if self.die_after_write:
            raise Died
        try:
            await self._trip()
        except StoreError:
            world.fault_until(0.0, robbed=self.member)  # it will find its record changed, by itself
            raise
        self.member.unanswered = None

    async def acquire(
        self, config: NetworkConfig, offer: Offer, previous: Previous, running: Running | None = None
    ) -> Lease:
        seen = self._seen.copy()
        await self._trip()
        if running is not None and seen.is_contradicted(self.data.listing(), self.data.head):
            raise StoreError("the store's history is another one than when this was asked", transient=True)
        own = await super().acquire(config, offer, previous, running)
        taken = self.member.world.taken
        if running is None:
            taken.pop(self.member, None)  # a start does not count
        else:
            taken[self.member] = asyncio.get_running_loop().time() + 0.1
        await self._answer(own)
        now = asyncio.get_running_loop().time()
        if running is not None and now > taken[self.member]:  # the clock jumped on the way
            taken[self.member] = now
            self.member.world.fault_until(0.0, robbed=self.member)
        return own

    async def renew(self, own: Lease) -> Lease | None:
        await self._trip()
        renewed = await super().renew(own)
        if renewed is not None:
            await self._answer(renewed)
        return renewed

    async def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        async with aclosing(super().watch()) as updates:
            async for update in updates:
                self.spoke = True
                self.listed = self.listed or isinstance(update, Snapshot)
                if isinstance(update, Snapshot) and update.new_history:
                    self._former = dict(self._last)
                    self.began, self.met = update.revision, asyncio.get_running_loop().time()
                told = update.leases if isinstance(update, Snapshot) else update.put
                if isinstance(update, Snapshot) and update.new_history:
                    self._doubt(told)
                for lease in told:
                    self._last[lease.key] = lease
                    self.seen.setdefault(lease.key, []).append(lease.attrs)
                yield update

    def _doubt(self, told: Iterable[Lease]) -> None:
        """What was written before it met a history looks like what a backup holds, until it is repeated."""
        now = asyncio.get_running_loop().time()
        told = tuple(told)
        absent = self._last.keys() - {lease.key for lease in told}
        for lease in told:
            known = self._last.get(lease.key)
            is_other = known is not None and known.attrs != lease.attrs and known.revision >= lease.revision
            if is_other or (known is None and overlap(lease.key, absent)):
                is_late = known is None or now > self.member.world.began + CONFIRM_SECONDS / 3
                self.doubts = now + (CONFIRM_LATE_SECONDS if is_late else CONFIRM_SECONDS)


class Member:
    """A machine with an uplink eth0. `segment` decides which others it reaches without a router."""

    def __init__(self, world: Cluster, number: int, segment: int) -> None:
        self.world = world
        self.number = number
        self.segment = segment
        self.machine = str(self)
        """Its machine id and its name; a clone has the original's."""
        self.booted = number
        """When, in some unit."""
        self.kernel = FakeKernel()
        self.kernel.nexthops = world.random.random() < 0.8
        self.kernel.latency = lambda: world.random.uniform(0.0, 0.05)
        self.kernel.refuse = self._refuse
        self.kernel.after_each = self._stepped
        self.env = ""
        self.memory: Memory | None = None
        """Its state file."""
        self.starts = 0
        self.store: SimStore | None = None
        self.task: asyncio.Task[None] | None = None
        self.health = Health()
        self.foreign = State()
        """Objects in its kernel that are nobody's of ours."""
        self.refusal: Callable[[Op], int] = lambda _op: 0
        self.steps_to_live = 0
        """0 = the process does not die by itself."""
        self.connected = True
        self.unanswered: str | None = None
        """The record that it wrote last, as long as it does not know that."""
        self.died = 0.0
        """When its process ended last."""
        self.heals = 0
        """How often it was connected to the store again."""
        self.clock_changes = 0
        self.clock_error = 0.0
        """Seconds that its wall clock is ahead."""
        self.config: NetworkConfig | None = None
        """Which it runs."""

    def __str__(self) -> str:
        return f"node{self.number}"

    # --- the process -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.task is not None

    def start(self) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self._supervise(), name=str(self))

    async def kill(self) -> None:
        """As SIGKILL: nothing of it has another turn that anybody could notice."""
        task, self.task = self.task, None
        if task is not None:
            self._dead()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _dead(self) -> None:
        self.died = asyncio.get_running_loop().time()
        if self.store is not None:
            self.store.alive = False

    async def _supervise(self) -> None:
        """What systemd does: start it again."""
        current.set(str(self))
        while True:
            try:
                await Node(await self._parts()).live()
            except (Exception, Died, BaseExceptionGroup) as error:  # noqa: BLE001
                reasons = list(_leaves(error))
                self._dead()
                self.world.note(f"{self} ended: {reasons}")
                expected = (Died, UplinkError, KernelError, asyncio.CancelledError)
                for reason in reasons:
                    if not isinstance(reason, expected):
                        self.world.violation(f"{self} ended with {reason!r}")
                if self.task is not asyncio.current_task():
                    return  # it was killed while it ended
            self.steps_to_live = 0
            await asyncio.sleep(self.world.random.uniform(0.1, 2.0))
            self.world.fault_until(0.0)

    def seen_head(self) -> int | None:
        """Up to which revision its store has told it of a history."""
        head = self.store.head if self.store is not None else None
        return None if head is None else head.revision

    async def _parts(self) -> Parts:
        world = self.world
        before, store = self.store, SimStore(self)
        self.store = store
        store.connect(connected=self.connected)
        self.health = Health()
        self.config = None
        self.starts += 1
        memory = self.memory
        learned = await learn_network(store, lambda _text: None, memory, self.wall_clock())
        silent = learned is None
        if learned is None:
            assert memory is not None
            learned = memory.config_text, memory.config, load(memory.config)
        config_text, config, backend = learned
        if memory is not None and compare(memory.config, config).pending:
            memory = None
        if memory is not None:
            store.began = memory.began
            if before is not None and memory.held and memory.began == before.began:
                store.met, store.doubts = before.met, before.doubts  # as its copy remembers
            held = (one.lease for one in memory.held)
            store.remembered.update(lease.key for lease in (*memory.peers, *held))
        self.config = config
        return Parts(
            store=store,
            host=self.kernel,
            config=config,
            config_text=config_text,
            backend=backend,
            wish=Wish(),
            host_id=self.machine,
            store_hosts=(),
            previous=_previous(self.env),
            margin_minutes=60,
            us=Identity(self.machine, "boot", f"{self}, process {self.starts}", self.booted, self.starts),
            origin=Origin("/network", ("memory",)),
            memory=memory,
            store_is_silent=silent,
            save=self._remember,
            write_subnet_env=self._write_env,
            firewall=None,
            turn_rules=_no_rules,
            traffic=Wishes(masquerade=False, forward=False),
            blackhole=False,
            peer_filter=None,
            enforce=False,
            open_pinger=None,
            on_ready=lambda text: world.note(f"{self} ready: {text}"),
            health=self.health,
            random=Random(world.random.random()),
            wall_clock=self.wall_clock,
        )

    def wall_clock(self) -> float:
        return asyncio.get_running_loop().time() + self.clock_error

    def connect(self, *, connected: bool) -> None:
        """Cut it off from the store, or heal it."""
        self.heals += connected and not self.connected
        self.connected = connected
        if self.store is not None:
            self.store.connect(connected=connected)

    def _remember(self, memory: Memory) -> None:
        self._still_alive()
        self.memory = memory

    def _write_env(self, text: str) -> None:
        self._still_alive()
        self.env = text
        self.world.env_written(self)
        self.world.note(f"{self} env {' '.join(text.split())}")

    def _still_alive(self) -> None:
        if self.store is None or not self.store.alive:
            raise Died

    def _refuse(self, op: Op) -> int:
        self._still_alive()
        return self.refusal(op)

    def _stepped(self, op: Op) -> None:
        self.world.stepped(self, op)
        if self.steps_to_live:
            self.steps_to_live -= 1
            if self.steps_to_live == 0:
                self.world.note(f"{self} dies after: {op}")
                self._dead()
                raise Died

    # --- the uplink --------------------------------------------------------------------------------------

    def plug_in(self, host: int, mtu: int = 1500, *, index: int = 2, routed: bool = True) -> None:
        """Give the uplink its addresses, and its default routes, now or later with `route`."""
        v4 = parse_prefix(f"198.18.{self.segment}.{host}/24")
        v6 = parse_prefix(f"2001:db8:0:{self.segment}::{host:x}/64")
        addresses = (InterfaceAddress(v4), InterfaceAddress(v6))
        self.kernel.others_set_uplink(Interface(index, "eth0", mtu, addresses))
        if routed:
            self.route()

    def route(self) -> None:
        """Default routes are not announced to the daemon."""
        if "eth0" in self.kernel.uplinks:
            self.kernel.defaults = {32: "eth0", 128: "eth0"}

    def uplink(self) -> Interface:
        return self.kernel.uplinks["eth0"]

    def address(self, bits: int) -> Address:
        return next(own.prefix.address for own in self.uplink().addresses if own.prefix.bits == bits)


async def _no_rules(_config: NetworkConfig, _former: Firewall) -> tuple[Wishes, Firewall]:
    raise NotImplementedError


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _previous(text: str) -> Previous:
    values = variables(text) if text else {}

    def block(name: str) -> Prefix | None:
        return parse_prefix(values[name][0]).network() if name in values else None

    return Previous(
        block("FLANNEL_NETWORK"),
        block("FLANNEL_SUBNET"),
        block("FLANNEL_IPV6_NETWORK"),
        block("FLANNEL_IPV6_SUBNET"),
    )
