"""The Store in memory, for tests and simulations: one `MemoryData`, one `MemoryStore` per node on it.

It has etcd's revisions, comparisons, deletions, compaction and outages. Nothing expires by itself: the
simulation steps time and calls `expire`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import lru_cache
from random import Random
from typing import NamedTuple

from flannelpy.errors import StoreError
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs, LeaseUpdate
from flannelpy.model.subnet import Pair, PoolFull, Previous, encode_attrs
from flannelpy.store import Head, Marks, Offer, Running
from flannelpy.store.decision import (
    Create,
    MakeRoom,
    TakeOver,
    decide,
    lacks_most,
    other_nodes,
    overlap,
    own_leases,
    stale_leases,
)
from flannelpy.store.etcd_codec import Listing, Record, read_changes, read_lease, read_listing, shown_key
from flannelpy.store.seen import Seen

# Each of n nodes reads each of n records.
_read = lru_cache(maxsize=1 << 16)(read_lease)


class _Change(NamedTuple):
    revision: int
    deleted: bool
    record: Record


def _shown(change: _Change) -> tuple[bool, Record]:
    return change.deleted, change.record._replace(revision=change.revision)


class MemoryData:
    """What all nodes of a simulated network share."""

    def __init__(self, config: str | None = None) -> None:
        self.config = config
        self.records: dict[str, Record] = {}
        self.cluster = 1
        self.revision = 1
        self.restored = 0
        """How often; connections are lost then."""
        self.signatures: dict[str, str] = {}
        self.compacted = 0
        """Changes up to this revision cannot be watched any more."""
        self._changes: list[_Change] = []
        self._log: list[_Change] = []
        """All changes of this history, those of the backup that it began with included."""
        self._lease_ids = 0
        self._wakers: dict[asyncio.Event, None] = {}
        """In order: a simulation must be the same every time."""

    def set_config(self, text: str | None) -> None:
        """Write the network config, or delete it."""
        self.config = text
        self.revision += 1
        self.wake()

    def put(self, key: str, value: bytes, etcd_lease_id: int = 0) -> int:
        """Write any record, a malformed one too -> its revision."""
        self.revision += 1
        old = self.records.get(key)
        created = self.revision if old is None else old.created
        shown = shown_key(key.encode())
        self.records[key] = Record(shown, value, created, self.revision, etcd_lease_id)
        self._note(_Change(self.revision, deleted=False, record=self.records[key]))
        return self.revision

    def delete(self, key: str) -> None:
        """Delete a record if it is there."""
        record = self.records.pop(key, None)
        if record is not None:
            self.revision += 1
            self._note(_Change(self.revision, deleted=True, record=record))

    def _note(self, change: _Change) -> None:
        self._changes.append(change)
        self._log.append(change)
        self.wake()

    def grant(self) -> int:
        """A new etcd lease id."""
        self._lease_ids += 1
        return self._lease_ids

    def expire(self, etcd_lease_id: int) -> None:
        """Delete the records on an etcd lease."""
        for key, record in list(self.records.items()):
            if record.etcd_lease_id == etcd_lease_id:
                self.delete(key)

    def compact(self) -> None:
        """Forget the history up to now."""
        self._changes.clear()
        self.compacted = self.revision

    @property
    def head(self) -> Head:
        """Which history this is, and how far it has come."""
        return Head(self.cluster, 0, self.revision)

    def backup(self) -> "MemoryData":
        """A copy of the records as they are."""
        copy = MemoryData(self.config)
        copy.records, copy.revision = dict(self.records), self.revision
        copy._log = list(self._log)
        return copy

    def restore(self, backup: "MemoryData") -> None:
        """Another history: what the backup holds, and nobody's watch goes on."""
        self.cluster += 1
        self.config, self.records = backup.config, dict(backup.records)
        self.revision = self.compacted = backup.revision + 1
        self._log = list(backup._log)  # noqa: SLF001  # it is one of us
        self.restored += 1
        self._changes.clear()
        self.signatures.clear()
        self.wake()

    def since(self, revision: int) -> Iterator[tuple[bool, Record]]:
        """(deleted, record) of each change after a revision."""
        # Watchers are nearly always near the end.
        start = len(self._changes)
        while start and self._changes[start - 1].revision > revision:
            start -= 1
        return map(_shown, self._changes[start:])

    def between(self, first: int, last: int) -> list[tuple[bool, Record]]:
        """The same from one revision to another, of what was compacted too."""
        return [_shown(change) for change in self._log if first <= change.revision <= last]

    def listing(self) -> Listing:
        """All records, in the order of their keys."""
        return read_listing((self.records[key] for key in sorted(self.records)), self.revision, _read)

    def watcher(self) -> asyncio.Event:
        """An event that is set at every change from now on, until it is handed to `forget`."""
        event = asyncio.Event()
        self._wakers[event] = None
        return event

    def forget(self, watcher: asyncio.Event) -> None:
        """No more news for this one."""
        self._wakers.pop(watcher, None)

    def wake(self) -> None:
        """Let all watchers look."""
        for event in self._wakers:
            event.set()


class MemoryStore:
    """One node's view of a MemoryData. `connected` may be switched at any time with `connect`."""

    config_place = "config in memory"

    def __init__(
        self,
        data: MemoryData,
        *,
        random: Random | None = None,
        on_trouble: Callable[[str | None], None] | None = None,
    ) -> None:
        self.data = data
        self.connected = True
        self._random = random or Random(0)  # noqa: S311
        self._on_trouble = on_trouble
        self._replaced: str | None = None
        self._handed: tuple[Listing, Head, int] | None = None
        self._watching = False
        self._seen = Seen()
        self._restored = data.restored

    @property
    def head(self) -> Head | None:
        """See Store."""
        return self._seen.head

    def connect(self, *, connected: bool) -> None:
        """Cut this node off from the store, or heal it: watches then go on where they were."""
        if connected != self.connected:
            self.connected = connected
            if self._on_trouble is not None:
                self._on_trouble(None if connected else "the store in memory is switched off")
            self.data.wake()

    async def close(self) -> None:
        """Nothing to let go of."""

    async def watch_config(self) -> AsyncGenerator[str | None, None]:
        """See Store."""
        known: tuple[str | None] | None = None
        watcher = self.data.watcher()
        try:
            while True:
                watcher.clear()
                if self.connected and known != (self.data.config,):
                    known = (self.data.config,)
                    yield self.data.config
                else:
                    await watcher.wait()
        finally:
            self.data.forget(watcher)

    def remember(self, head: Head, marks: Marks) -> None:
        """See Store."""
        self._seen.remember(head, marks)
        self._restored = -1  # perhaps, since then

    @property
    def replaced(self) -> str | None:
        """See Store."""
        return self._replaced

    async def sign(self, own: Lease, identity: str) -> None:
        """See Store."""
        if self.connected:
            self.data.signatures[own.key] = identity

    async def signature(self, key: str) -> str | None:
        """See Store."""
        return self.data.signatures.get(key) if self.connected else None

    async def acquire(
        self, config: NetworkConfig, offer: Offer, previous: Previous, running: Running | None = None
    ) -> Lease:
        """See Store. Between reading and writing other nodes have a turn, as with etcd."""
        ours = offer(None, ())
        refused: list[Pair] = []
        while True:
            self._check()
            if self._watching and self._is_another():
                raise StoreError(
                    "the store's history is another one: the peers are compared first", transient=True
                )
            listing = self.data.listing()
            try:
                lost = [] if self._watching else self._seen.lost(listing, self.data.head)
                decision = decide(config, listing, ours, previous, refused, self._random, running, lost)
            except PoolFull as full:
                raise StoreError(str(full)) from None
            await asyncio.sleep(0)
            self._check()
            if isinstance(decision, MakeRoom):
                for lease in decision.leases:
                    self.data.delete(lease.key)
                continue
            own = self._write(decision, listing, ours, offer)
            if own is not None:
                signed = self.data.signatures
                if running is None and isinstance(decision, TakeOver):
                    self._replaced = signed.get(own.key)
                    if own.etcd_lease_id:  # it lies on the former one, which ends now
                        signed.pop(own.key, None)
                break
            if isinstance(decision, Create):
                refused.append((decision.subnet, decision.subnet6))
        for lease in stale_leases(config, listing, ours, own, running):
            self.data.delete(lease.key)
        if not self._watching:
            self._handed = self.data.listing(), self.data.head, self.data.restored
        return own

    def _write(
        self, decision: TakeOver | Create, listing: Listing, ours: LeaseAttrs, offer: Offer
    ) -> Lease | None:
        """The record as written; None if the comparison failed."""
        others = other_nodes(listing, ours, decision)
        if isinstance(decision, TakeOver):
            old = decision.lease
            grant = self.data.grant() if old.etcd_lease_id else 0
            return self._replace(old, old._replace(attrs=offer(old, others), etcd_lease_id=grant))
        taken = self.data.listing().taken
        if any(overlap((decision.subnet, decision.subnet6), pair) for pair in taken):
            return None
        mine = own_leases(listing, ours)
        attrs = offer(mine[0] if mine else None, others)
        grant = self.data.grant()
        revision = self.data.put(decision.key, encode_attrs(attrs).encode(), grant)
        return Lease(decision.key, decision.subnet, decision.subnet6, attrs, revision, revision, grant)

    async def renew(self, own: Lease) -> Lease | None:
        """See Store."""
        self._check()
        return self._replace(own, own._replace(etcd_lease_id=self.data.grant() if own.etcd_lease_id else 0))

    def _replace(self, old: Lease, new: Lease) -> Lease | None:
        """Write a record if it is still as we know it."""
        record = self.data.records.get(old.key)
        if record is None or (record.created, record.revision) != (old.created, old.revision):
            return None
        value = encode_attrs(new.attrs).encode()
        return new._replace(revision=self.data.put(new.key, value, new.etcd_lease_id))

    async def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        """See Store. All changes since the last look come as one Delta."""
        handed, self._handed = self._handed, None
        self._watching = True
        listed = False
        watcher = self.data.watcher()
        try:
            while True:
                watcher.clear()
                await self._travel()
                listing, now, restored = handed or (None, self.data.head, self.data.restored)
                head = self.head
                doubtful, new_history = self._doubts()
                if not self.connected or (listed and now == head and not doubtful):
                    await watcher.wait()
                elif not listed or head is None or doubtful or head.revision < self.data.compacted:
                    listing = listing or self._list()
                    if not new_history and lacks_most(self._seen.marks, listing):
                        listing = self._list()  # a second look
                    self._seen.take_listing(listing, now._replace(revision=listing.revision))
                    self._restored = restored
                    listed = True
                    handed = None
                    yield listing.snapshot()._replace(new_history=new_history)
                else:
                    self._restored = self.data.restored
                    changes = list(self.data.since(head.revision))
                    update = read_changes(changes, now.revision, _read)
                    last = max((record.revision for _deleted, record in changes), default=0)
                    self._seen.take_changes(update, now, last)
                    yield update
        finally:
            self.data.forget(watcher)

    def _is_another(self) -> bool:
        """Whether the history is another one."""
        return self._doubts() == (True, True)

    def _doubts(self) -> tuple[bool, bool]:
        """(whether all records must be read again, whether the history is another one).

        What a connection that was lost is a reason to look at.
        """
        seen, now = self._seen, self.data.head
        if seen.head is None or (self._restored == self.data.restored and not now.contradicts(seen.head)):
            return False, False
        again = self.data.between(seen.last, seen.head.revision)
        if seen.last and (not again or not seen.begins_with(again[0])):
            return True, True
        is_another = seen.is_contradicted(self.data.listing(), now) or not seen.explains(again)
        return is_another, is_another

    async def _travel(self) -> None:
        """The way of the news to this node: what is read after it is delivered at once."""

    def _list(self) -> Listing:
        """All records, as this node is shown them."""
        return self.data.listing()

    def _check(self) -> None:
        if not self.connected:
            raise StoreError("the store in memory is switched off", transient=True)
