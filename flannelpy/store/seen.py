"""What of a store's history a node has seen, and whether what it is shown now is the same history.

A store that is restored from a backup goes back. Its cluster id and raft term may stay, and by the time we
are connected again its revision may have passed ours. Then the records tell: in one history a record that was
written before the point that we have seen is exactly the record that we know.
"""

from collections.abc import Sequence
from contextlib import suppress

from flannelpy.model.lease import Delta
from flannelpy.model.subnet import Pair, parse_key
from flannelpy.store import Head, Mark, Marks, mark_of
from flannelpy.store.etcd_codec import Listing, Record

_NEVER = Mark(0, 0, 0)
"""Of a key without a record."""


class Seen:
    """Follows one store. Before the first listing `head` is None."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.marks: dict[str, Mark | None] = {}
        """All records up to `head`; of our own writes perhaps a later one."""
        self.last = 0
        """The revision of the last change that was seen; 0 = none is known."""

    def copy(self) -> "Seen":
        """As it is now; a watch goes on."""
        other = Seen()
        other.head, other.marks, other.last = self.head, dict(self.marks), self.last
        return other

    def remember(self, head: Head, marks: Marks) -> None:
        """What an earlier life had seen."""
        self.head, self.marks = head, dict(marks)
        self._find_last()

    def take_listing(self, listing: Listing, head: Head) -> None:
        """From now on this is what was seen."""
        self.head = head
        self.marks = {**{key: mark_of(lease) for key, lease in listing.leases.items()},
                      **dict.fromkeys(listing.unreadable)}  # fmt: skip
        self._find_last()

    def take_changes(self, update: Delta, head: Head, last: int = 0) -> None:
        """The history went on; `last` is the revision of the last change, if there was one."""
        self.head = head
        self.marks.update((lease.key, mark_of(lease)) for lease in update.put)
        self.marks.update((key, None) for key, _reason in update.unreadable)
        for key in update.gone:
            self.marks.pop(key, None)
        self.last = max(self.last, last)

    def _find_last(self) -> None:
        assert self.head is not None  # noqa: S101  # both callers set it
        revisions = (mark.revision for mark in self.marks.values() if mark is not None)
        self.last = max((one for one in revisions if one <= self.head.revision), default=0)

    def is_contradicted(self, listing: Listing, head: Head) -> bool:
        """Whether all records as they are now can come from no history that went on from what was seen.

        Or from none that is likely: not one record is left of those that were known, not even written again.
        """
        if self.head is None:
            return False
        if head.contradicts(self.head):
            return True
        was_known = [
            self.marks.get(key, _NEVER) in (None, mark_of(lease))
            for key, lease in listing.leases.items()
            if lease.revision <= self.head.revision
        ]
        return not all(was_known) or (len(self.marks) > 1 and not self._is_any_left(listing))

    def lost(self, listing: Listing, head: Head) -> list[Pair]:
        """The subnets that were known when another history began: their nodes may live, and come back."""
        if not self.is_contradicted(listing, head):
            return []
        found = []
        for key in self.marks:
            with suppress(ValueError):  # one that could not be read either
                found.append(parse_key(key))
        return found

    def _is_any_left(self, listing: Listing) -> bool:
        """Whether one of the known records lives on, as it was or written again."""
        for key, mark in self.marks.items():
            lease = listing.leases.get(key)
            if key in listing.unreadable or (
                lease is not None and (mark is None or mark.created == lease.created)
            ):
                return True
        return False

    def begins_with(self, change: tuple[bool, Record]) -> bool:
        """Whether this is the last change that was seen."""
        deleted, record = change
        known = self.marks.get(record.key, _NEVER)
        was = _NEVER if deleted else mark_of_record(record)
        return record.revision == self.last and known in (None, was)

    def explains(self, changes: Sequence[tuple[bool, Record]]) -> bool:
        """Whether these changes, (deleted, record) up to `head`, led to what was seen: this very history."""
        latest = {record.key: (deleted, record) for deleted, record in changes}
        for key, (deleted, record) in latest.items():
            known = self.marks.get(key, _NEVER)
            if known is None or (self.head is not None and known.revision > self.head.revision):
                continue  # a write of our own that the watch has not repeated yet
            if known != (_NEVER if deleted else mark_of_record(record)):
                return False
        return True


def mark_of_record(record: Record) -> Mark:
    """The same of a record that was not read yet."""
    return Mark(record.created, record.revision, record.etcd_lease_id)
