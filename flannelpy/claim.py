"""Our claim on a subnet: taken at start, prolonged in time, taken back when it is lost.

What the store says about our record only wakes `keep`, which compares and decides. Whoever else writes
the record is one of three: an operator (the record stays ours), a node that was given our subnet (we move to
another one), or another machine that has our public IP. The last is said loudly, with both identities, and
the two never fight: the one that booted later gives way.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from random import Random
from typing import NamedTuple, TypeVar

from flannelpy import twins
from flannelpy.errors import StoreError
from flannelpy.health import Health
from flannelpy.model import identity
from flannelpy.model.config import ConfigError, NetworkConfig, parse_config
from flannelpy.model.config_change import compare
from flannelpy.model.identity import Identity
from flannelpy.model.lease import Lease, LeaseUpdate, Snapshot, same_node
from flannelpy.model.meanwhile import Meanwhile
from flannelpy.model.subnet import Previous
from flannelpy.store import TTL_SECONDS, Offer, Running, Store

log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.5, 8.0)
"""While the store does not answer: first and longest wait."""
_REPEAT_SECONDS = (60.0, 600.0)
"""After a change of what we tell, and after a new history was met: written again this much later."""
_RECLAIM_SECONDS = (60.0, 3600.0)
"""A claim that is lost again is taken back no more often than this, and ever more rarely."""

_SIGN_SECONDS = 1.0
"""Who writes a record signs it right after: wait so long before the signature is read."""

T = TypeVar("T")


class Telling(NamedTuple):
    """Whom a claim tells what."""

    moved: Callable[[Lease], None]
    """Our lease became another one, or tells something else."""
    asking: Callable[[], None]
    """Our record may be written from now on,"""
    written: Callable[[Lease], None]
    """and it was: it lives for a whole TTL since then, however long the answer took."""


class Claim:
    """Holds our lease."""

    def __init__(
        self,
        store: Store,
        config: NetworkConfig,
        offer: Offer,
        previous: Previous,
        margin_minutes: int,
        random: Random,
        health: Health,
        us: Identity,
        telling: Telling,
        held: Callable[[], tuple[Lease, ...]] = tuple,
    ) -> None:
        self._store = store
        self._config = config
        self._offer = offer
        self._previous = previous
        self._margin = margin_minutes * 60.0
        self._random = random
        self._health = health
        self._us = us
        self._telling = telling
        self._held = held
        """The peers whose subnets are not free although they have no record."""
        self.own: Lease | None = None
        """Our lease as we wrote it last."""
        self._theirs: Lease | None = None
        """Our record as somebody else wrote it last."""
        self._lost = False
        """Our record was deleted, or a whole listing came without it or with an older one."""
        self._meanwhile: Meanwhile | None = None
        """While a running node claims a lease."""
        self._new_history = False
        self._histories = 0
        """How many have begun so far."""
        self._began = 0
        """The revision at which we met the present history."""
        self._resumed = False
        """Our lease is from an earlier life, and that may have written the record once more."""
        self._gave_way = False
        """The record is left to another machine that has our public IP."""
        self._unpublished = False
        self._unsigned = False
        self._wake = asyncio.Event()
        self._renew_at = 0.0
        self._repeats: list[float] = []
        """When to write the record once more."""
        self._not_before = 0.0
        """When the record may be taken back again."""
        self._pause = 0.0

    # --- what others ask of it ---------------------------------------------------------------------------

    async def take(self) -> Lease:
        """Claim a subnet, waiting for the store as long as it takes; StoreError if there can be none."""
        own = await self._ask(self._acquire(), "claim a subnet", for_ever=False)
        twins.name_predecessor(own, self._store.replaced, self._us, self._health)
        self._note_written(own)
        return own

    def resume(self, own: Lease, seconds: float) -> None:
        """Go on with a lease from an earlier life that lasts so much longer; write it as soon as possible."""
        self.own = own
        # What has happened in the store since is unknown: write nothing new before its config was seen.
        self._resumed = self._new_history = True
        self._renew_at = asyncio.get_running_loop().time() + max(0.0, seconds - self._margin)
        self.publish()

    def use(self, config: NetworkConfig) -> None:
        """Choose new subnets by this config from now on; it describes the same network."""
        self._config = config

    def notice(self, update: LeaseUpdate) -> None:
        """Look at what the store says about our own record: somebody else may have written or deleted it."""
        own = self.own
        if own is None:
            return
        found = update.leases if isinstance(update, Snapshot) else update.put
        theirs = next((lease for lease in found if lease.key == own.key), None)
        if isinstance(update, Snapshot):
            self._new_history = self._new_history or update.new_history
            known = theirs is not None or own.key in dict(update.unreadable)
            self._lost = not known or (theirs is not None and theirs.revision < own.revision)
            if update.new_history:
                self._histories += 1
                # Its revisions cannot be compared with ours. Restored as we wrote it, the record is ours.
                self._lost = theirs != own
                self._began = update.revision
                self.confirm()
        elif own.key in update.gone and update.revision > own.revision:
            self._lost = True
        if self._meanwhile is not None:
            self._meanwhile.take_in(update)
        # Our own writes come back, too, perhaps before their answer: `keep` compares again.
        self._theirs = theirs or self._theirs
        if self._is_changed():
            self._wake.set()

    def confirm(self, *, once: bool = False) -> None:
        """Write our record again in a while, whatever becomes of it now.

        Peers may know another one from a history that ended, by somebody who took our subnet there, or by us
        under another address. What is written after they met the new history is what they believe. Not all
        at once: there are thousands. `once`: only the later time, for a record that nobody knew before.
        """
        now = asyncio.get_running_loop().time()
        times = _REPEAT_SECONDS[-1:] if once else _REPEAT_SECONDS
        self._repeats = [now + seconds * self._random.uniform(0.5, 1.0) for seconds in times]
        self._wake.set()

    def publish(self) -> None:
        """What we tell the peers is about to change: write it as soon as the store answers."""
        self._unpublished = True
        self._wake.set()

    async def keep(self) -> None:
        """Hold the claim for ever: prolong it in time, publish changes, take it back when it was lost."""
        while True:
            await self._sign()
            await self._wait()
            own = self.own
            if own is None or not self._is_due():
                continue
            # What changes while the store is asked is published by the next turn.
            publishing, self._unpublished = self._unpublished, False
            if publishing:
                own = own._replace(attrs=self._offer(own, ()))
            lost, self._lost = self._lost, False
            self._lost = lost and self._new_history
            history = self._histories
            renewed = await self._ask(partial(self._renew, own), "renew our lease")
            if renewed is not None and history != self._histories:
                # The answer is of a history that has ended on its way.
                self.own, self._lost = renewed, True
                self._wake.set()
                continue
            if renewed is None:
                self._lost = self._lost or lost
                await self._recover(own)
                continue
            log.info("renewed our lease %s", renewed.key)
            self._new_history = self._new_history and self._lost
            self._note_written(renewed)
            if not self._gave_way:
                self._health.conflict = None
            if publishing:
                # flannel peers do not notice changed attributes across a new listing, only a put.
                now = asyncio.get_running_loop().time()
                self._repeats = [now + seconds for seconds in _REPEAT_SECONDS]
                self._telling.moved(renewed)

    async def _renew(self, own: Lease) -> Lease | None:
        """One attempt. Revisions of another history may equal ours by chance, and say nothing."""
        return None if self._lost and self._new_history else await self._store.renew(own)

    # --- waiting -----------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Until the next deadline, or until somebody wakes us."""
        try:
            async with asyncio.timeout_at(min([self._renew_at, *self._repeats])):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _is_due(self) -> bool:
        now = asyncio.get_running_loop().time()
        due = now >= min([self._renew_at, *self._repeats])
        self._repeats = [deadline for deadline in self._repeats if deadline > now]
        if self._gave_way:
            if due:
                self._renew_at = now + TTL_SECONDS
            return self._lost
        return due or self._is_changed() or self._unpublished

    def _is_changed(self) -> bool:
        own, theirs = self.own, self._theirs
        return self._lost or (own is not None and theirs is not None and theirs.revision > own.revision)

    def _note_written(self, own: Lease) -> None:
        """The record is ours, as we wrote it just now."""
        self.own = own
        self._health.lease_trouble = None
        self._unsigned, self._resumed = True, False
        # Up to a tenth earlier: a cluster that started at once must not renew at once.
        period = (TTL_SECONDS - self._margin) * self._random.uniform(0.9, 1.0)
        self._renew_at = asyncio.get_running_loop().time() + period
        self._telling.written(own)

    async def _sign(self) -> None:
        if self._unsigned and self.own is not None:
            self._unsigned = False
            await self._store.sign(self.own, identity.render(self._us))

    # --- a loss ------------------------------------------------------------------------------------------

    async def _recover(self, own: Lease) -> None:
        """The record is not as we wrote it. Take it back, unless it is for another machine to keep."""
        theirs = self._theirs
        is_twin = (
            not self._lost
            and not self._resumed
            and theirs is not None
            and theirs.revision > own.revision
            and theirs.etcd_lease_id != 0  # else an operator wrote it: a reservation for us
            and same_node(theirs.attrs, own.attrs)
        )
        if is_twin and theirs is not None and await self._gives_way(own, theirs):
            return
        await self._take_back(own)
        # Two that cannot be told apart, or that do not know the rule, take turns ever more rarely.
        first, longest = _RECLAIM_SECONDS
        self._pause = min(longest, self._pause * 2 or first) if is_twin else first
        self._not_before = asyncio.get_running_loop().time() + self._pause

    async def _gives_way(self, own: Lease, theirs: Lease) -> bool:
        """Another machine with our public IP holds our record: name both; whether it is left to them."""
        await asyncio.sleep(_SIGN_SECONDS)
        them = identity.parse(await self._store.signature(own.key) or "")
        if them is not None and them.process == self._us.process:
            them = None  # our own signature: they do not sign
        self._gave_way = them is not None and not self._us.outranks(them)
        conflict = twins.conflict(own, theirs, them, self._us)
        outcome = (
            "the lease is left to it, peers may not reach this node" if self._gave_way else "we take it back"
        )
        if self._health.conflict != conflict:
            log.error("%s; %s. %s", conflict, outcome, twins.REMEDY)
        self._health.conflict = conflict
        if self._gave_way:
            self._unpublished = False
            self._health.lease_trouble = conflict
        return self._gave_way

    async def _take_back(self, lost: Lease) -> None:
        """The same subnet again if it is free, else another one."""
        if not self._new_history:  # that would be all nodes at once, and their network works
            self._health.lease_trouble = f"our lease {lost.key} was deleted or overwritten by somebody else"
        await asyncio.sleep(self._not_before - asyncio.get_running_loop().time())
        if self._lost or self._theirs is None or self._theirs.attrs != lost.attrs:
            log.warning("our lease %s was deleted or overwritten by somebody else: taking it back", lost.key)
        else:
            log.info(
                "our lease %s was written by somebody else with the same value: going on with it", lost.key
            )
        self._previous = Previous(self._config.network, lost.subnet, self._config.network6, lost.subnet6)
        self._unpublished = self._lost = False
        before = await self._store.signature(lost.key) if self._resumed else None
        meanwhile = self._meanwhile = Meanwhile()
        own = await self._ask(partial(self._acquire_again, lost), "take our lease back")
        self._meanwhile = None
        if self._gave_way:
            self._gave_way = False
            self._health.conflict = None
            log.warning("the other machine with our public IP is gone: our lease is ours again")
        if own.key == lost.key:
            twins.name_predecessor(own, before, self._us, self._health)
        self._note_written(own)
        # Nobody looked at that key before the answer came.
        self._lost = self._lost or meanwhile.is_lost(own)
        self._theirs = meanwhile.written_since(own) or self._theirs
        if self._is_changed():
            self._wake.set()
        if own.subnets() != lost.subnets():
            log.error(
                "our subnet changed from %s to %s: another node has the old one now; restart Docker, or the"
                " pods, on this node, so that they get addresses of the new one",
                lost.key,
                own.key,
            )
        self._telling.moved(own)

    async def _acquire_again(self, lost: Lease) -> Lease:
        """One attempt: since the last one the store may have begun another history."""
        while self._new_history:
            self._new_history = False
            await self._matching_config()
        # Not as we would write it now, but as we did: our address may have changed in the meantime.
        return await self._acquire(Running(self.own or lost, self._held(), self._began))()

    async def _matching_config(self) -> None:
        """Nothing is written into a new history before it has a config that describes our network."""
        said = ""
        async with aclosing(self._store.watch_config()) as texts:
            async for text in texts:
                reason = self._mismatch(text)
                if reason is None:
                    return
                if reason != said:
                    said = reason
                    log.warning(
                        "our lease is not written into the store's new history yet: %s at %s",
                        reason,
                        self._store.config_place,
                    )

    def _mismatch(self, text: str | None) -> str | None:
        if text is None:
            return "there is no network config"
        try:
            pending = compare(self._config, parse_config(text)).pending
        except ConfigError as error:
            return f"the network config is not usable ({error})"
        return f"the network config is another one ({'; '.join(pending)})" if pending else None

    # --- the store ---------------------------------------------------------------------------------------

    def _acquire(self, running: Running | None = None) -> Callable[[], Awaitable[Lease]]:
        return partial(self._store.acquire, self._config, self._offer, self._previous, running)

    async def _ask(self, call: Callable[[], Awaitable[T]], what: str, *, for_ever: bool = True) -> T:
        """Ask until the store answers; says so once per reason.

        What waiting cannot cure (a wrong password, a full pool) ends a start. A node that runs goes on, and
        asks again: its network works, and an operator may be at it.
        """
        delay, longest = _RETRY_SECONDS
        said = ""
        while True:
            self._telling.asking()
            try:
                return await call()
            except StoreError as error:
                if not error.transient:
                    if not for_ever:
                        raise
                    delay = longest
                if str(error) != said:
                    said = str(error)
                    log.warning("cannot %s: %s; trying again", what, error)
            await asyncio.sleep(delay * self._random.uniform(0.5, 1.0))
            delay = min(longest, delay * 2)
