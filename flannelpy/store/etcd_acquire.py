"""How a node claims its subnet in etcd: decide, write with a comparison, and decide again if that fails.

A failed comparison answers with all records, so a lost race costs one request. Every subnet that could not be
claimed is left out of the next decision, so this ends: with a claim or with a full pool.
"""

import asyncio
from random import Random

from flannelpy.errors import StoreError
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import Pair, PoolFull, Previous
from flannelpy.store import Offer, Running
from flannelpy.store.decision import (
    Create,
    MakeRoom,
    TakeOver,
    decide,
    has_rival,
    other_nodes,
    own_leases,
    stale_leases,
)
from flannelpy.store.etcd_client import OutcomeUnknownError
from flannelpy.store.etcd_records import EtcdRecords, State, quietly, with_changes
from flannelpy.store.seen import Seen

_MAX_UNKNOWN = 3
"""How often a write whose answer got lost is followed up before the caller is told."""
_CALM_LOSSES = 3
"""Lost races after which we begin to wait between attempts,"""
_LONGEST_WAIT = 0.1
"""up to this many seconds."""


class Acquisition:
    """One `acquire` under way."""

    def __init__(
        self,
        records: EtcdRecords,
        config: NetworkConfig,
        offer: Offer,
        previous: Previous,
        random: Random,
        running: Running | None,
        seen: Seen,
        *,
        watching: bool,
    ) -> None:
        self._records = records
        self._config = config
        self._offer = offer
        self._ours: LeaseAttrs = offer(None, ())
        self._previous = previous
        self._random = random
        self._running = running
        self._seen = seen
        """What the watch, or an earlier life of this node, has seen,"""
        self._watching = watching
        """and if it was the watch: nothing is written into a history that it has not told about."""
        self._remembered: list[Pair] = []
        self.replaced: str | None = None
        """Who had signed the record that a start took over."""
        self._grant = 0
        self._refused: list[Pair] = []

    async def run(self) -> tuple[Lease, State]:
        """Our lease, and all leases with it. Raises StoreError; nothing is left behind then."""
        try:
            own, taken_over, state = await self._claim()
        except StoreError:
            if self._grant:
                # Also ends a claim whose answer got lost.
                await quietly(self._records.client.revoke(self._grant))
            raise
        gone = []
        for lease in stale_leases(self._config, state.listing, self._ours, own, self._running):
            if await quietly(self._records.remove(lease)):
                gone.append(lease.key)
                await self._records.retire(lease.etcd_lease_id)
        if taken_over is not None:
            retired = taken_over.etcd_lease_id if taken_over.etcd_lease_id != own.etcd_lease_id else 0
            if self._running is None:
                self.replaced = await self._records.retire_signed(taken_over.key, retired)
            else:
                await self._records.retire(retired)
        return own, state._replace(listing=with_changes(state.listing, (own,), gone))

    async def _claim(self) -> tuple[Lease, Lease | None, State]:
        """(our lease, the lease that it replaces, all leases)."""
        state = await self._records.read_all()
        if not self._watching:
            self._remembered = self._seen.lost(state.listing, state.head)
        elif self._seen.is_contradicted(state.listing, state.head):
            raise StoreError("etcd's history is another one: the peers are compared first", transient=True)
        unknown = 0
        while True:
            decision = self._decide(state)
            if isinstance(decision, MakeRoom):
                state = await self._make_room(decision)
                continue
            wanted = await self._wanted(decision, state)
            try:
                own, state = await self._write(decision, wanted, state)
            except OutcomeUnknownError:
                unknown += 1
                if unknown > _MAX_UNKNOWN:
                    raise
                state = await self._records.read_all()
                own = _written(state, wanted)
                if own is None:
                    # The write may still be on its way: another one is safe only on the same key.
                    self._previous = Previous(
                        self._config.network, wanted.subnet, self._config.network6, wanted.subnet6
                    )
                    continue
            if isinstance(decision, TakeOver):
                if own is not None:
                    return own, decision.lease, state
                continue
            if own is not None and not has_rival(state.listing, own):
                return own, None, state
            await self._lost(decision, own)

    def _decide(self, state: State) -> TakeOver | Create | MakeRoom:
        try:
            return decide(
                self._config,
                state.listing,
                self._ours,
                self._previous,
                self._refused,
                self._random,
                self._running,
                self._remembered,
            )
        except PoolFull as full:
            raise StoreError(str(full)) from None

    async def _make_room(self, decision: MakeRoom) -> State:
        for lease in decision.leases:
            await self._records.remove(lease)
            await self._records.retire(lease.etcd_lease_id)
        return await self._records.read_all()

    async def _wanted(self, decision: TakeOver | Create, state: State) -> Lease:
        """The record to write: a reservation without an etcd lease, else on the one grant for all tries."""
        others = other_nodes(state.listing, self._ours, decision)
        if isinstance(decision, TakeOver):
            old = decision.lease
            wanted = old._replace(attrs=self._offer(old, others))
            if old.etcd_lease_id == 0:
                return wanted
        else:
            # A lease of ours that does not fit any more is replaced: what it told about us may stay true.
            mine = own_leases(state.listing, self._ours)
            attrs = self._offer(mine[0] if mine else None, others)
            wanted = Lease(decision.key, decision.subnet, decision.subnet6, attrs)
        self._grant = self._grant or await self._records.client.grant(self._records.ttl)
        return wanted._replace(etcd_lease_id=self._grant)

    async def _write(
        self, decision: TakeOver | Create, wanted: Lease, state: State
    ) -> tuple[Lease | None, State]:
        """(the record as written, None if the comparison failed; all records)."""
        records = self._records
        takes_over = isinstance(decision, TakeOver)
        compare = records.unchanged(wanted) if takes_over else records.free(wanted)
        success = [records.put(wanted)]
        # Two pairs may share an IPv6 subnet and be two keys: see, in the same step, who was there first.
        is_pair = wanted.subnet is not None and wanted.subnet6 is not None
        if is_pair and not takes_over:
            success.append(records.get())
        reply = await records.client.txn(compare, success, [records.get()])
        if reply.responses[-1].HasField("response_range"):
            state = records.state(reply.responses[-1].response_range, reply.header)
        if not reply.succeeded:
            return None, state
        revision = reply.header.revision
        return wanted._replace(created=wanted.created or revision, revision=revision), state

    async def _lost(self, decision: Create, own: Lease | None) -> None:
        """Somebody else was first. Withdraw what we wrote, and do not try this subnet again."""
        if own is not None:
            await self._records.remove(own)
        self._refused.append((decision.subnet, decision.subnet6))
        if len(self._refused) > _CALM_LOSSES:
            await asyncio.sleep(self._random.uniform(0, _LONGEST_WAIT))


def _written(state: State, wanted: Lease) -> Lease | None:
    """Our record, if the write whose answer got lost has taken place."""
    found = state.listing.leases.get(wanted.key)
    if (
        found is None
        or found.revision <= wanted.revision
        or found.etcd_lease_id != wanted.etcd_lease_id
        or found.attrs != wanted.attrs
    ):
        return None
    return found
