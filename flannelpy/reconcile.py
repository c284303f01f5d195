"""The loop: facts -> what should be -> what to do about it -> do it -> facts.

Wake-ups carry no orders. A lease update changes the peers and marks what they need as dirty, a timer marks
everything; the loop then compares and applies the difference. One task runs this and owns all its state.
"""

import asyncio
import logging
from collections.abc import Sequence
from random import Random
from typing import Protocol

from flannelpy.backend import Backend, Facts
from flannelpy.errors import KernelError
from flannelpy.health import Health
from flannelpy.model.address import Address
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Item, Link, Scope, State
from flannelpy.model.lease import Lease, LeaseUpdate, Snapshot
from flannelpy.model.peers import Peers
from flannelpy.model.plan import Op, Remove, plan, plan_part

log = logging.getLogger(__name__)

_SLICE = 3000
"""Operations applied before other tasks get their turn (about 30 ms)."""
_NAMED = 20
"""Bad records that are named one by one when they come at once."""
_RESYNC_SECONDS = (45.0, 75.0)
"""A full comparison this often, somewhere in between: what no notification told is found."""
_RETRY_SECONDS = (1.0, 60.0)
"""After a refusal by the kernel: first and longest wait before the next full pass."""


class Failure(Protocol):
    """An operation that the kernel refused; its text says which and why."""

    @property
    def op(self) -> Op:
        """What was refused."""
        ...


class Kernel(Protocol):
    """What the loop needs from the machine; `kernel.linux.LinuxKernel` is the real one."""

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        """All that is ours as it is now; or just our devices with their addresses."""
        ...

    def apply(self, ops: list[Op]) -> Sequence[Failure]:
        """Do all of it in order; what was refused. What is not among that is done."""
        ...

    def on_link(self, addresses: set[Address], device: str) -> frozenset[Address]:
        """Which of these are reached through that device without a gateway."""
        ...


class Reconciler:
    """Keeps the kernel what the leases say."""

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
    ) -> None:
        self._kernel = kernel
        self._backend = backend
        self._config = config
        self._facts = facts
        self._own = own
        self._scope = scope
        self._health = health
        self._random = random
        self._peers = Peers(config, own, self._needs)
        self._observed = State()
        self._updates: asyncio.Queue[LeaseUpdate | None] = asyncio.Queue()
        self._retry = 0.0
        self._said: dict[str, str] = {}
        self.first_pass_done = asyncio.Event()
        """Set after the first whole pass over the peers."""

    def offer(self, update: LeaseUpdate) -> None:
        """Hand over what the store said."""
        self._updates.put_nowait(update)

    def prepare(self) -> None:
        """Make our own devices and addresses stand, before any peer is known. Raises KernelError.

        Removes nothing but a device that has to be made anew. Looks again after each try: udev may have
        given a new device another MAC in the meantime.
        """
        problem = ""
        for _attempt in range(4):
            observed = self._kernel.observe(self._scope, devices_only=True)
            self._facts = self._facts._replace(links=observed.links)
            ops = self._wanted_now(plan(self._backend.own(self._own, self._facts), observed))
            if not ops:
                return
            failures = self._kernel.apply(ops)
            problem = "; ".join(map(str, failures)) or f"{ops[0]}: something undid it at once"
        raise KernelError(f"cannot set up the overlay's device: {problem}")

    def move(self, own: Lease) -> None:
        """Our lease changed (another subnet, or other attributes)."""
        self._own = own
        self._updates.put_nowait(None)

    async def run(self) -> None:
        """Follow the updates for ever."""
        while True:
            updates, full = await self._wait()
            touched = State()
            for update in updates:
                self._ask_on_link(update)
                change = self._peers.update(update)
                self._note_records(update)
                touched.update(change.touched)
                full = full or change.full
            if full or not self.first_pass_done.is_set():
                await self._full_pass("leases changed" if updates else "resync")
            elif len(touched):
                await self._apply(plan_part(self._peers.state, self._observed, touched), "leases changed")
            if self._peers.synced:
                self.first_pass_done.set()

    async def _wait(self) -> tuple[list[LeaseUpdate], bool]:
        """All updates that are there, as soon as there is one, and whether everything must be compared."""
        delay = self._retry or self._random.uniform(*_RESYNC_SECONDS)
        try:
            async with asyncio.timeout(delay):
                found = [await self._updates.get()]
        except TimeoutError:
            return [], True
        while not self._updates.empty():
            found.append(self._updates.get_nowait())
        updates = [update for update in found if update is not None]
        moved = len(updates) < len(found)
        if moved:
            self._peers.rebase(self._own, self._needs)
        return updates, moved

    # --- passes ------------------------------------------------------------------------------------------

    async def _full_pass(self, cause: str) -> None:
        """Read everything, compare everything."""
        observed = self._kernel.observe(self._scope)
        self._scope = self._scope._replace(takeover=())
        self._observed = observed
        self._facts = self._facts._replace(links=observed.links)
        self._refresh_on_link()
        desired = self._backend.own(self._own, self._facts)
        desired.update(self._peers.state)
        ops = plan(desired, observed)
        if not self._peers.synced:
            ops = self._wanted_now(ops)
        await self._apply(ops, cause)

    async def _apply(self, ops: list[Op], cause: str) -> None:
        failures: list[Failure] = []
        for start in range(0, len(ops), _SLICE):
            part = ops[start : start + _SLICE]
            refused = self._kernel.apply(part)
            failures += refused
            not_done = {id(failure.op) for failure in refused}
            for op in part:
                if id(op) in not_done:
                    continue
                if isinstance(op, Remove):
                    self._observed.discard(op.item)
                else:
                    self._observed.add((op.item,))
            await asyncio.sleep(0)
        health = self._health
        health.passes += 1
        health.operations += len(ops) - len(failures)
        health.failures += len(failures)
        health.peers = self._peers.programmed()
        if ops:
            log.info("%s: %s", cause, _summary(ops, failures))
        self._after_failures(failures)

    def _after_failures(self, failures: list[Failure]) -> None:
        """What was refused stays in the difference: look again soon, at growing intervals."""
        if not failures:
            self._retry = 0.0
            return
        first, longest = _RETRY_SECONDS
        self._retry = min(longest, self._retry * 2 or first)
        for failure in failures[:5]:
            log.warning("the kernel refused: %s; trying again in %.0f s", failure, self._retry)
        if len(failures) > 5:
            log.warning("the kernel refused %d more operations", len(failures) - 5)

    @staticmethod
    def _wanted_now(ops: list[Op]) -> list[Op]:
        """Before the first snapshot an absent peer means nothing: remove only what must be made anew."""
        remade = {op.item.name for op in ops if not isinstance(op, Remove) and isinstance(op.item, Link)}
        return [
            op
            for op in ops
            if not isinstance(op, Remove) or (isinstance(op.item, Link) and op.item.name in remade)
        ]

    # --- facts -------------------------------------------------------------------------------------------

    def _needs(self, lease: Lease) -> tuple[tuple[Item, ...], str | None]:
        return self._backend.peer(lease, self._facts)

    def _ask_on_link(self, update: LeaseUpdate) -> None:
        """For a backend that routes directly: which of these peers need no gateway."""
        if not self._backend.wants_on_link:
            return
        leases = update.leases if isinstance(update, Snapshot) else update.put
        asked = {ip for lease in leases for ip in (lease.attrs.public_ip, lease.attrs.public_ipv6) if ip}
        found = self._kernel.on_link(asked, self._facts.uplink.name)
        self._facts = self._facts._replace(on_link=(self._facts.on_link - asked) | found)

    def _refresh_on_link(self) -> None:
        if not self._backend.wants_on_link:
            return
        attrs = [lease.attrs for lease in self._peers.leases.values()]
        asked = {ip for a in attrs for ip in (a.public_ip, a.public_ipv6) if ip}
        found = self._kernel.on_link(asked, self._facts.uplink.name)
        if found != self._facts.on_link:
            self._facts = self._facts._replace(on_link=found)
            self._peers.rebase(self._own, self._needs)

    # --- words -------------------------------------------------------------------------------------------

    def _note_records(self, update: LeaseUpdate) -> None:
        """Name each record that is not programmed, once per reason."""
        health = self._health
        if isinstance(update, Snapshot):
            health.unreadable = dict(update.unreadable)
        else:
            for key in [*(lease.key for lease in update.put), *update.gone]:
                health.unreadable.pop(key, None)
            health.unreadable.update(update.unreadable)
        health.refused = self._peers.refused
        self._name_new(
            {
                **{key: f"is unreadable: {reason}" for key, reason in health.unreadable.items()},
                **{key: f"is not programmed: {reason}" for key, reason in health.refused.items()},
            }
        )

    def _name_new(self, reasons: dict[str, str]) -> None:
        """One line for each record whose trouble is new; a flood of them is cut short."""
        new = [key for key, reason in reasons.items() if self._said.get(key) != reason]
        self._said = reasons
        self._health.refusals += len(new)
        for key in new[:_NAMED]:
            log.warning("lease %s %s", key, reasons[key])
        if len(new) > _NAMED:
            log.warning(
                "and %d more leases, such as %s, which %s", len(new) - _NAMED, new[-1], reasons[new[-1]]
            )


def _summary(ops: list[Op], failures: list[Failure]) -> str:
    """One sentence: what was done."""
    if len(ops) == 1 and not failures:
        return str(ops[0])
    counts: dict[str, int] = {}
    for op in ops:
        verb = "removed" if isinstance(op, Remove) else "changed" if op.was is not None else "added"
        word = f"{verb} {_WORDS[type(op.item).__name__]}"
        counts[word] = counts.get(word, 0) + 1
    text = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"{text}; {len(failures)} refused" if failures else text


_WORDS = {
    "Link": "device(s)",
    "DeviceAddress": "address(es)",
    "FdbEntry": "FDB entries",
    "Neighbour": "neighbours",
    "Route": "routes",
}
