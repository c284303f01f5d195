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
from flannelpy.store import Offer, Store

log = logging.getLogger(__name__)

TTL_SECONDS = 86400
"""flannel's; after it an absent node's subnet is free for others."""
_RETRY_SECONDS = (0.5, 30.0)
"""While the store does not answer: first and longest wait."""
_RECLAIM_SECONDS = 60.0
"""A claim that is lost again is taken back no more often than this."""

T = TypeVar("T")


class Claim:
    """Holds our lease. `moved` is called when it became another one."""

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
        self._seen_change = asyncio.Event()

    async def take(self) -> Lease:
        """Claim a subnet, waiting for the store as long as it takes; StoreError if there can be none."""
        self._own = await self._insist(
            partial(self._store.acquire, self._config, self._offer, self._previous), "claim a subnet"
        )
        return self._own

    def notice(self, update: LeaseUpdate) -> None:
        """Look at what the store says about our own record: somebody else may have written or deleted it."""
        own = self._own
        if own is None:
            return
        if isinstance(update, Snapshot):
            found = next((lease for lease in update.leases if lease.key == own.key), None)
            changed = update.revision > own.revision and (found is None or found.revision > own.revision)
        else:
            changed = (own.key in update.gone and update.revision > own.revision) or any(
                lease.key == own.key and lease.revision > own.revision for lease in update.put
            )
        if changed:
            self._seen_change.set()

    async def keep(self) -> None:
        """Prolong the claim before it expires, for ever."""
        while True:
            # Up to a tenth earlier: a cluster that started at once must not renew at once.
            delay = self._period * self._random.uniform(0.9, 1.0)
            try:
                async with asyncio.timeout(delay):
                    await self._seen_change.wait()
            except TimeoutError:
                pass
            self._seen_change.clear()
            own = self._own
            if own is None:
                continue
            renewed = await self._insist(partial(self._store.renew, own), "renew our lease")
            if renewed is not None:
                self._own = renewed
                log.info("renewed our lease %s", renewed.key)
                continue
            await self._take_back(own)

    async def _take_back(self, lost: Lease) -> None:
        """Our record was deleted or overwritten: the same subnet again if it is free, else another one."""
        log.warning("our lease %s was deleted or overwritten by somebody else: taking it back", lost.key)
        self._previous = Previous(self._config.network, lost.subnet, self._config.network6, lost.subnet6)
        own = await self.take()
        if own.subnets() != lost.subnets():
            log.error(
                "our subnet changed from %s to %s, because it belongs to another node now:"
                " restart Docker (or the pods) on this node so that they use the new one",
                lost.key,
                own.key,
            )
        self._moved(own)
        # The notice of our own write is no new loss.
        self._seen_change.clear()
        await asyncio.sleep(_RECLAIM_SECONDS)

    async def _insist(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """Ask until the store answers; says so once."""
        delay, longest = _RETRY_SECONDS
        said = ""
        while True:
            try:
                return await call()
            except StoreError as error:
                if not error.transient:
                    raise
                if str(error) != said:
                    said = str(error)
                    log.warning("cannot %s yet: %s; trying again", what, error)
            await asyncio.sleep(delay * self._random.uniform(0.5, 1.0))
            delay = min(longest, delay * 2)
