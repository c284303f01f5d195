"""All records as the store last told them, and the peers that are held when the store begins a new history.

A store that was restored from a backup, or replaced by an empty one, lacks records that nobody deleted. Their
nodes are alive and their packets flow, so the peers stay ("held") until each has written its record again,
until somebody else has claimed its subnet since, or until the operator lets them go.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flannelpy.model.lease import Delta, Lease, LeaseUpdate, Snapshot, same_node


class Held(NamedTuple):
    """A peer's last record of the history that ended."""

    lease: Lease
    stale: int
    """The revision of an older record of the same key in the new history, which does not count; 0 = none."""


class Leases:
    """What the store has said so far; `after` turns what it says next into what holds for the peers."""

    def __init__(self, known: Iterable[Lease] = (), held: Iterable[Held] = (), began: int = 0) -> None:
        self.held = {one.lease.key: one for one in held}
        self.known = {lease.key: lease for lease in (*known, *(one.lease for one in self.held.values()))}
        """Key -> the record that counts, our own among them."""
        self.began = began
        """The new history's revision when we met it: what was written later is by somebody alive."""

    def after(self, update: LeaseUpdate, own: Lease) -> LeaseUpdate:
        """Take in what the store says; the same with the held peers in it."""
        if isinstance(update, Delta):
            return self._after_delta(update)
        if update.new_history:
            self._hold(update, own)
        else:
            told = {lease.key: lease.revision for lease in update.leases}
            told.update((key, -1) for key, _reason in update.unreadable)
            self._release([key for key, held in self.held.items() if told.get(key, 0) != held.stale])
        self._make_room([lease for lease in update.leases if lease.revision > self.began])
        held = [one.lease for one in self.held.values()]
        leases = (*(lease for lease in update.leases if lease.key not in self.held), *held)
        before = self.known
        self.known = {lease.key: lease for lease in leases}
        for key, _reason in update.unreadable:
            if key in before:
                self.known.setdefault(key, before[key])
        return update._replace(leases=leases)

    def let_go(self) -> Delta:
        """End the hold: what the store says is all there is."""
        gone = tuple(self.held)
        self._release(gone)
        for key in gone:
            del self.known[key]
        return Delta((), gone, 0)

    def _hold(self, update: Snapshot, own: Lease) -> None:
        told = {lease.key: lease for lease in update.leases}
        unreadable = dict(update.unreadable)
        self.began = update.revision
        self.held = {}
        for key, lease in self.known.items():
            if key in unreadable or key == own.key or same_node(lease.attrs, own.attrs):
                continue
            now = told.get(key)
            if now is None:
                self.held[key] = Held(lease, 0)
            elif now.attrs != lease.attrs and now.revision < lease.revision:
                self.held[key] = Held(lease, now.revision)

    def _after_delta(self, update: Delta) -> Delta:
        self._release([*(lease.key for lease in update.put), *update.gone])
        gone = (*update.gone, *self._make_room(update.put))
        for key in gone:
            self.known.pop(key, None)
        self.known.update((lease.key, lease) for lease in update.put)
        return update._replace(gone=gone)

    def _make_room(self, written: Sequence[Lease]) -> list[str]:
        """A held peer gives way to what was written since: its node has moved, or its subnet is another's."""
        if not self.held:
            return []
        known = self.known
        # Most of a cluster comes back as it was: only the others can be in the way of a held peer.
        changed = [one for one in written if one.key not in known or known[one.key].attrs != one.attrs]
        gone = [
            key
            for lease in changed
            for key, held in self.held.items()
            if key != lease.key and _replaces(lease, held.lease)
        ]
        self._release(gone)
        return gone

    def _release(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.held.pop(key, None)


def _replaces(lease: Lease, held: Lease) -> bool:
    return same_node(lease.attrs, held.attrs) or any(
        one.overlaps(other) for one in lease.subnets() for other in held.subnets()
    )
