"""The loop: facts -> what should be -> what to do about it -> do it -> facts.

Wake-ups carry no orders. What the store says changes the peers, what the kernel announces changes our picture
of it, a timer doubts everything; the loop then compares and applies the difference. One task runs this and
owns all its state.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, Protocol

from flannelpy.backend import Backend, Facts
from flannelpy.errors import KernelError
from flannelpy.health import Health
from flannelpy.model.address import Address
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Appeared, DeviceAddress, Item, Link, Notice, Scope, Shaken, State
from flannelpy.model.lease import Lease, LeaseUpdate, Snapshot
from flannelpy.model.peers import Peers
from flannelpy.model.plan import Op, Refusals, Remove, note_done, plan, plan_part, stages
from flannelpy.model.traffic import blackholes
from flannelpy.outcome import Failure, Outcomes

log = logging.getLogger(__name__)

_SLICE = 3000
"""Operations applied before other tasks get their turn (about 30 ms)."""
_RESYNC_SECONDS = (45.0, 75.0)
"""A full comparison this often, somewhere in between: what was not announced is found."""
_RETRY_SECONDS = (0.25, 8.0)
"""After a refusal by the kernel: first and longest wait before the next full pass."""
_BREATH = 4.0
"""Between full passes, at least this many times what the last one took: a storm costs a fifth of a core,"""
_LONGEST_BREATH = 8.0
"""but never longer than this: a machine that was paused in the middle of one did not work all that time."""


class Kernel(Protocol):
    """What the loop needs from the machine; `kernel.linux.LinuxKernel` is the real one."""

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        """All that is ours as it is now; or just our devices with their addresses. May raise OSError."""
        ...

    def apply(self, ops: list[Op]) -> Sequence[Failure]:
        """Do all of it in order; what was refused. What is not among that is done."""
        ...

    def on_link(self, addresses: set[Address], device: str) -> frozenset[Address]:
        """Which of these are reached through that device without a gateway."""
        ...


class Work(NamedTuple):
    """What has come in since the last pass."""

    updates: list[LeaseUpdate]
    notices: list[Notice]
    moved: bool
    """Our own lease changed."""
    since: float
    """When the first of it came in, on the loop's clock."""


class Reconciler:
    """Keeps the kernel what the leases say. `learn` tells the facts afresh after the uplink was shaken."""

    def __init__(
        self,
        kernel: Kernel,
        backend: Backend,
        config: NetworkConfig,
        facts: Facts,
        own: Lease,
        scope: Scope,
        health: Health,
        random: Random,
        learn: Callable[[Facts], Facts],
        *,
        from_memory: bool = False,
        blackhole: bool = False,
    ) -> None:
        self._kernel = kernel
        self._backend = backend
        self._on_link: set[Address] = set()
        """Part of the facts, changed in place: to copy thousands costs more than the rest of an event."""
        self._facts = facts._replace(on_link=self._on_link)
        self._own = own
        self._scope = scope._replace(uplink=facts.uplink.name)
        self._health = health
        self._random = random
        self._learn = learn
        self._from_memory = from_memory
        """The peers of an earlier life stand in for the store's, until it answers."""
        self._blackhole = blackhole
        self._peers = Peers(config, own, self._needs, facts.protected)
        self._observed = State()
        self._inbox: asyncio.Queue[tuple[LeaseUpdate | list[Notice] | None, float]] = asyncio.Queue()
        self._all_dirty = True
        """Everything must be compared, as soon as it may be."""
        self._shaken: tuple[str, float] | None = None
        """What shook first since the last full pass, and when."""
        self._resync_at = math.inf
        self._retry_at = math.inf
        self._retry = 0.0
        self._not_before = 0.0
        self._outcomes = Outcomes(health)
        self.first_pass_done = asyncio.Event()
        """Set after the first whole pass over the peers."""

    def offer(self, news: LeaseUpdate | list[Notice] | None) -> None:
        """Hand over what the store said or what the kernel announced; None = look at everything."""
        now = asyncio.get_running_loop().time()
        self._inbox.put_nowait((news, now))
        if self._health.work_since is None:
            self._health.work_since = now

    def move(self, own: Lease) -> None:
        """Our lease changed: another subnet, or other attributes."""
        self._own = own
        self.offer(None)

    def prepare(self) -> None:
        """Make our own devices and addresses stand, before any peer is known. Raises KernelError.

        Removes nothing but a device that has to be made anew. Looks again after each try: udev may have
        given a new device another MAC in the meantime.
        """
        problem = ""
        for _attempt in range(4):
            observed = self._kernel.observe(self._scope, devices_only=True)
            self._facts = self._facts._replace(links=observed.links)
            own = self._backend.own(self._own, self._facts)
            devices = State([*own.links.values(), *own.addresses.values()])
            ops = _wanted_now(plan(devices, observed))
            if not ops:
                return
            failures = self._kernel.apply(ops)
            problem = "; ".join(map(str, failures)) or f"{ops[0]}: something undid it at once"
        raise KernelError(f"cannot set up the overlay's device: {problem}")

    async def run(self) -> None:
        """Follow what comes in, for ever."""
        while True:
            work = await self._gather()
            try:
                await self._pass(work)
            except (OSError, ValueError) as error:
                # A device that vanishes while its tables are read, an uplink that is too small now.
                self._all_dirty = True
                self._back_off()
                self._not_before = asyncio.get_running_loop().time() + self._retry
                self._outcomes.not_compared(error, self._retry)
            if self._inbox.empty():
                self._health.work_since = None

    async def _gather(self) -> Work:
        """All that is there as soon as there is something, or as soon as it is time to doubt everything."""
        loop = asyncio.get_running_loop()
        found = []
        try:
            # A full pass that was put off comes as soon as it may.
            full_at = self._not_before if self._all_dirty else math.inf
            async with asyncio.timeout_at(min(self._resync_at, self._retry_at, full_at)):
                found.append(await self._inbox.get())
        except TimeoutError:
            pass
        while not self._inbox.empty():
            found.append(self._inbox.get_nowait())
        now = self._health.work_since = loop.time()
        moved = any(news is None for news, _since in found)
        work = Work([], [], moved, min((since for _news, since in found), default=now))
        for news, _since in found:
            if isinstance(news, list):
                work.notices.extend(news)
            elif news is not None:
                work.updates.append(news)
        # However much comes in, what was refused and what was never announced has its turn.
        # Each deadline fires once: the pass that it asks for may have to wait, and sets it again.
        if now >= self._resync_at:
            work.notices.append(Shaken("resync"))
            self._resync_at = now + self._random.uniform(*_RESYNC_SECONDS)
        if now >= self._retry_at:
            self._all_dirty = True
            self._retry_at = math.inf
        return work

    # --- passes ------------------------------------------------------------------------------------------

    async def _pass(self, work: Work) -> None:
        """Take in what came, compare as much as that calls for, apply the difference."""
        touched = State()
        shaken = [notice.cause for notice in work.notices if isinstance(notice, Shaken)]
        drifted = self._take_in_notices(work.notices, touched)
        self._ask_on_link(work.updates)
        if work.moved:
            self._rebase()
        if not shaken and self._all_dirty:
            shaken = drifted[:1]
        if shaken and self._shaken is None:
            self._shaken = (shaken[0], work.since)
        self._all_dirty = self._all_dirty or bool(shaken) or work.moved
        was_synced = self._peers.synced
        for update in work.updates:
            change = self._peers.update(update)
            self._outcomes.note_unreadable(update)
            touched.update(change.touched)
            self._all_dirty = self._all_dirty or change.full
        if self._peers.synced and not was_synced:
            self._all_dirty = True  # what nobody needs was left alone until now
        if self._all_dirty and asyncio.get_running_loop().time() >= self._not_before:
            await self._full_pass("leases changed" if work.updates else "trying again", work.since)
        elif len(touched) and self.first_pass_done.is_set():
            own = self._own_state()
            ops = plan_part([own, self._peers.state], self._observed, touched)
            if not self._peers.synced:
                ops = _wanted_now(ops)
            cause = drifted[0] if drifted else "leases changed"
            await self._apply(ops, cause, since=work.since, drift=bool(drifted))
        self._outcomes.name_troubles(self._peers.refused)

    def _take_in_notices(self, notices: Sequence[Notice], touched: State) -> list[str]:
        """Bring our picture of the kernel up to date; what differs from it was somebody else's doing."""
        causes = []
        for notice in notices:
            if isinstance(notice, Shaken):
                continue
            item = notice.item
            table = self._observed.table(item)
            known = table.get(item.key)
            if isinstance(notice, Appeared):
                if known == item or (known is None and not self._concerns(item)):
                    continue  # our own echo, or none of our business
                table[item.key] = item
                causes.append(f"{item} was {'changed' if known is not None else 'added'} by somebody")
            else:
                if known is not None:
                    del table[item.key]
                    causes.append(f"{known} was removed by somebody")
                    # With a device's last IPv4 address its plain routes die, and nobody is told.
                    self._all_dirty = self._all_dirty or isinstance(item, DeviceAddress)
                elif item.key not in self._peers.state.table(item):
                    continue  # we removed it ourselves; else somebody made room for one of ours
            touched.add([item])
        return causes

    def _concerns(self, item: Item) -> bool:
        """Whether an object that we did not know is ours to remove; what the kernel learns comes and goes."""
        return getattr(item, "permanent", True) and self._scope.owns(item)

    async def _full_pass(self, cause: str, since: float) -> None:
        """Read everything, compare everything."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        shaken, self._shaken = self._shaken, None
        if shaken is not None:
            cause, since = shaken
            self._learn_again()
        observed = self._kernel.observe(self._scope)
        self._observed = observed
        self._facts = self._facts._replace(links=observed.links)
        self._refresh_on_link()
        desired = self._own_state()
        desired.update(self._peers.state)
        ops = plan(desired, observed)
        if not self._peers.synced:
            ops = _wanted_now(ops)
        # What a start finds missing was damaged by nobody.
        drift = shaken is not None and self.first_pass_done.is_set()
        self._all_dirty = False
        failed = await self._apply(ops, cause, since=since, drift=drift)
        if not failed:
            self._retry, self._retry_at = 0.0, math.inf
            self._outcomes.all_done()
        if self._peers.synced:
            self._scope = self._scope._replace(takeover=())
        if self._peers.synced or self._from_memory:
            self.first_pass_done.set()
        now = loop.time()
        self._not_before = now + min(_BREATH * (now - began), _LONGEST_BREATH)
        self._resync_at = now + self._random.uniform(*_RESYNC_SECONDS)

    async def _carry_out(self, ops: list[Op]) -> tuple[int, list[Failure]]:
        """Do all that may be done; how many were done, and what was refused."""
        refusals = Refusals()
        failures: list[Failure] = []
        count = 0
        for stage in stages(ops):
            allowed = refusals.allow(stage)
            for start in range(0, len(allowed), _SLICE):
                part = allowed[start : start + _SLICE]
                refused = self._kernel.apply(part)
                not_done = {id(failure.op) for failure in refused}
                done = [op for op in part if id(op) not in not_done] if refused else part
                note_done(self._observed, done)
                count += len(done)
                failures += refused
                for failure in refused:
                    refusals.add(failure.op)
                self._health.work_since = asyncio.get_running_loop().time()
                await asyncio.sleep(0)
        return count, failures

    async def _apply(self, ops: list[Op], cause: str, *, since: float, drift: bool) -> bool:
        """Do it, and whether any of it was refused."""
        done, failures = await self._carry_out(ops)
        now = asyncio.get_running_loop().time()
        self._health.peers = self._peers.programmed()
        self._outcomes.applied(ops, done, failures, cause, now - since if drift else None)
        if failures or self._health.missing:
            known = self._health.missing
            self._health.missing = {key: known.get(key, now) for key in self._peers.missing(self._observed)}
        if failures:
            self._back_off()
            self._outcomes.refused(failures, self._retry)
        return bool(failures)

    def _back_off(self) -> None:
        """What was refused stays in the difference: look again soon, at growing intervals."""
        now = asyncio.get_running_loop().time()
        if now < self._retry_at < math.inf:
            return  # its turn comes
        first, longest = _RETRY_SECONDS
        self._retry = min(longest, self._retry * 2 or first)
        self._retry_at = now + self._retry

    # --- facts -------------------------------------------------------------------------------------------

    def _own_state(self) -> State:
        """What must exist for ourselves, whoever the peers are."""
        state = self._backend.own(self._own, self._facts)
        if self._blackhole:
            state.add(blackholes(self._own))
        return state

    def _needs(self, lease: Lease) -> tuple[tuple[Item, ...], str | None]:
        return self._backend.peer(lease, self._facts)

    def _rebase(self) -> None:
        self._peers.rebase(self._own, self._needs, self._facts.protected)

    def _learn_again(self) -> None:
        before = self._facts
        self._facts = self._learn(before)
        self._scope = self._scope._replace(uplink=self._facts.uplink.name)
        if (self._facts.uplink, self._facts.protected) != (before.uplink, before.protected):
            self._rebase()

    def _ask_on_link(self, updates: Sequence[LeaseUpdate]) -> None:
        """For a backend that routes directly: which of these peers need no gateway."""
        if not self._backend.wants_on_link:
            return
        leases = [
            lease
            for update in updates
            for lease in (update.leases if isinstance(update, Snapshot) else update.put)
        ]
        asked = {ip for lease in leases for ip in (lease.attrs.public_ip, lease.attrs.public_ipv6) if ip}
        try:
            found = self._kernel.on_link(asked, self._facts.uplink.name)
        except OSError as error:
            log.debug("cannot ask which peers are on-link: %s", error)
            self._all_dirty = True
            return
        self._on_link -= asked - found
        self._on_link |= found

    def _refresh_on_link(self) -> None:
        if not self._backend.wants_on_link:
            return
        attrs = [lease.attrs for lease in self._peers.leases.values()]
        asked = {ip for a in attrs for ip in (a.public_ip, a.public_ipv6) if ip}
        found = self._kernel.on_link(asked, self._facts.uplink.name)
        if found != self._on_link:
            self._on_link.clear()
            self._on_link |= found
            self._rebase()


def _wanted_now(ops: list[Op]) -> list[Op]:
    """Before the first snapshot an absent peer means nothing: remove only what must be made anew."""
    remade = {op.item.name for op in ops if not isinstance(op, Remove) and isinstance(op.item, Link)}
    return [
        op
        for op in ops
        if not isinstance(op, Remove) or (isinstance(op.item, Link) and op.item.name in remade)
    ]
