"""Our claim on a subnet: taken at start, prolonged in time, taken back when it is lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import TypeVar

from flannelpy.errors import StoreError
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseUpdate, Snapshot
from flannelpy.model.subnet import Previous
from flannelpy.store import TTL_SECONDS, Offer, Store

log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.5, 8.0)
"""While the store does not answer: first and longest wait."""
_REPEAT_SECONDS = (60.0, 600.0)
"""After a change of what we tell: written again this much later."""
_RECLAIM_SECONDS = 60.0
"""A claim that is lost again is taken back no more often than this."""

T = TypeVar("T")


class Claim:
    """Holds our lease. `moved` is called when it became another one, or tells something else."""

    def __init__(
        self,
        store: Store,
        config: NetworkConfig,
        offer: Offer,
        previous: Previous,
        margin_minutes: int,
        random: Random,
        moved: Callable[[Lease], None],
    ) -> None:
        self._store = store
        self._config = config
        self._offer = offer
        self._previous = previous
        self._period = TTL_SECONDS - margin_minutes * 60.0
        self._random = random
        self._moved = moved
        self._own: Lease | None = None
        self._changed_at = 0
        """The revision at which our record was last changed by somebody, ourselves included."""
        self._lost = False
        """A whole listing came without our record, or with one from before ours."""
        self._unpublished = False
        self._wake = asyncio.Event()
        self._renew_at = 0.0
        self._repeats: list[float] = []
        """When to write the record once more."""
        self._not_before = 0.0
        """When the record may be taken back again."""

    async def take(self) -> Lease:
        """Claim a subnet, waiting for the store as long as it takes; StoreError if there can be none."""
        own = await self._ask(self._acquire(), "claim a subnet", for_ever=False)
        self._held(own)
        return own

    def _acquire(self) -> Callable[[], Awaitable[Lease]]:
        return partial(self._store.acquire, self._config, self._offer, self._previous)

    def notice(self, update: LeaseUpdate) -> None:
        """Look at what the store says about our own record: somebody else may have written or deleted it."""
        own = self._own
        if own is None:
            return
        found = update.leases if isinstance(update, Snapshot) else update.put
        revision = max((lease.revision for lease in found if lease.key == own.key), default=0)
        if isinstance(update, Snapshot):
            # A lower revision is another history: a backup was restored, and knows an older record at best.
            self._lost = revision < own.revision and own.key not in dict(update.unreadable)
        elif own.key in update.gone:
            revision = max(revision, update.revision)
        # Our own writes come back, too, perhaps before their answer: `keep` compares again.
        if self._lost or revision > own.revision:
            self._changed_at = revision
            self._wake.set()

    def publish(self) -> None:
        """What we tell the peers is about to change: write it as soon as the store answers."""
        self._unpublished = True
        self._wake.set()

    async def keep(self) -> None:
        """Hold the claim for ever: prolong it in time, publish changes, take it back when it was lost."""
        while True:
            await self._wait()
            own = self._own
            if own is None or not self._is_due():
                continue
            # What changes while the store is asked is published by the next turn.
            publishing, self._unpublished = self._unpublished, False
            if publishing:
                own = own._replace(attrs=self._offer(own, ()))
            self._lost = False
            renewed = await self._ask(partial(self._store.renew, own), "renew our lease")
            if renewed is None:
                await self._take_back(own)
                continue
            log.info("renewed our lease %s", renewed.key)
            self._held(renewed)
            if publishing:
                # flannel peers do not notice changed attributes across a new listing, only a put.
                now = asyncio.get_running_loop().time()
                self._repeats = [now + seconds for seconds in _REPEAT_SECONDS]
                self._moved(renewed)

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
        changed = self._own is not None and self._changed_at > self._own.revision
        return due or changed or self._lost or self._unpublished

    def _held(self, own: Lease) -> None:
        self._own = own
        # Up to a tenth earlier: a cluster that started at once must not renew at once.
        period = self._period * self._random.uniform(0.9, 1.0)
        self._renew_at = asyncio.get_running_loop().time() + period

    async def _take_back(self, lost: Lease) -> None:
        """Our record was deleted or overwritten: the same subnet again if it is free, else another one."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._not_before - loop.time())
        log.warning("our lease %s was deleted or overwritten by somebody else: taking it back", lost.key)
        self._previous = Previous(self._config.network, lost.subnet, self._config.network6, lost.subnet6)
        self._unpublished = False
        own = await self._ask(self._acquire(), "take our lease back")
        self._held(own)
        self._not_before = loop.time() + _RECLAIM_SECONDS
        if own.subnets() != lost.subnets():
            log.error("our subnet changed from %s to %s: another node has the old one now", lost.key, own.key)
        self._moved(own)

    async def _ask(self, call: Callable[[], Awaitable[T]], what: str, *, for_ever: bool = True) -> T:
        """Ask until the store answers; says so once per reason.

        What waiting cannot cure (a wrong password, a full pool) ends a start. A node that runs goes on, and
        asks again: its network works, and an operator may be at it.
        """
        delay, longest = _RETRY_SECONDS
        said = ""
        while True:
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
