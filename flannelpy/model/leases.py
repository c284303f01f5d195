"""All records as the store last told them, and the peers that are held when the store begins a new history.

A store that was restored from a backup, or replaced by an empty one, lacks records that nobody deleted. Their
nodes are alive and their packets flow, so the peers stay ("held") until each has written its record again,
until somebody else has claimed its subnet since, or until the operator lets them go.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from flannelpy.model.lease import Delta, Lease, LeaseAttrs, LeaseUpdate, Snapshot, same_node


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
        self._held_by: dict[bytes | str, list[str]] = {}
        """What tells a machine -> keys that were held when the hold began: a few may have come back since."""
        self._rivals: set[str] = set()
        """Held keys with an address that another one has, too: they were known at different times."""
        self._index_held()
        self._withheld: dict[str, Lease] = {}
        """The older records of the new history in whose place peers are held."""
        self._doubted: dict[str, Lease] = {}
        """Records of the new history that tell a former address of a peer that is held."""
        self._following = False
        """Whether the store has said anything yet: what is known from an earlier life may be out of date."""

    def after(self, update: LeaseUpdate, own: Lease) -> LeaseUpdate:
        """Take in what the store says; the same with the held peers in it."""
        was_following, self._following = self._following, True
        if isinstance(update, Delta):
            return self._after_delta(update)
        if update.new_history:
            self._hold(update, own, prefer_known=was_following)
        else:
            told = {lease.key: lease.revision for lease in update.leases}
            told.update((key, -1) for key, _reason in update.unreadable)
            self._release([key for key, held in self.held.items() if told.get(key, 0) != held.stale])
            alive = [lease for lease in update.leases if self.held and lease.revision > self.began]
            self._release([key for lease in alive for key in self._other_places(lease)])
        from_memory = update.new_history and not was_following
        self._make_room([lease for lease in update.leases if self._is_news(lease)])
        if from_memory:
            self._release(_overlapped(update.leases, self.held))
            self._release([
                key
                for lease in update.leases
                for key in self._former_addresses(lease)
                if lease.revision > self.held[key].lease.revision
            ])  # fmt: skip
            # Later than all that an earlier life saw, so no backup of that time.
            newest = max((lease.revision for lease in self.known.values()), default=0)
            later = [lease for lease in update.leases if lease.revision > newest]
            self._release([key for lease in later for key in self._other_places(lease)])
        self._withheld = {lease.key: lease for lease in update.leases if lease.key in self.held}
        told_now = [lease for lease in update.leases if lease.key not in self.held]
        self._doubted = {
            lease.key: lease
            for lease in told_now
            if lease.revision <= self.began and self._former_addresses(lease)
        }
        held = [one.lease for one in self.held.values()]
        leases = (*(lease for lease in told_now if lease.key not in self._doubted), *held)
        before = self.known
        self.known = {lease.key: lease for lease in leases}
        for key, _reason in update.unreadable:
            if key in before:
                self.known.setdefault(key, before[key])
        return update._replace(leases=leases)

    def let_go(self) -> Delta:
        """End the hold: what the store says is all there is."""
        gone = list(self.held)
        self._release(gone)
        return self._without(gone, Delta((), (), 0))

    def _hold(self, update: Snapshot, own: Lease, *, prefer_known: bool) -> None:
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
            elif prefer_known and now.attrs != lease.attrs and now.revision <= lease.revision:
                self.held[key] = Held(lease, now.revision)
        self._index_held()

    def _index_held(self) -> None:
        self._held_by, self._rivals = {}, _rivals(self.held)
        for key, held in self.held.items():
            for mark in _marks(held.lease.attrs):
                self._held_by.setdefault(mark, []).append(key)

    def _after_delta(self, update: Delta) -> Delta:
        news = [lease for lease in update.put if self._is_news(lease) or lease.key in self._rivals]
        told = [*(lease.key for lease in update.put), *update.gone]
        self._release(told)
        moved = list(dict.fromkeys(key for lease in update.put for key in self._other_places(lease)))
        self._release(moved)
        for key in told:
            self._withheld.pop(key, None)
            self._doubted.pop(key, None)
        for key in update.gone:
            self.known.pop(key, None)
        self.known.update((lease.key, lease) for lease in update.put)
        return self._without([*moved, *self._make_room(news)], update)

    def _without(self, released: Sequence[str], update: Delta) -> Delta:
        """The update with the end of these holds in it: the store's own records count now, if it has any."""
        cleared = [key for key, lease in self._doubted.items() if not self._former_addresses(lease)]
        back = tuple(self._withheld.pop(key) for key in released if key in self._withheld)
        back += tuple(self._doubted.pop(key) for key in cleared)
        gone = [key for key in released if key not in {lease.key for lease in back}]
        for key in gone:
            self.known.pop(key, None)
        self.known.update((lease.key, lease) for lease in back)
        return update._replace(put=(*update.put, *back), gone=(*update.gone, *gone))

    def _other_places(self, lease: Lease) -> list[str]:
        """The other held keys of a node that has just written: it was there once, and is not any more."""
        found = dict.fromkeys(
            key
            for mark in _marks(lease.attrs)
            for key in self._held_by.get(mark, ())
            if key != lease.key and key in self.held
        )
        return [key for key in found if _same_machine(self.held[key].lease.attrs, lease.attrs)]

    def _former_addresses(self, lease: Lease) -> list[str]:
        """The same where it had another public IP: of two destinations for one MAC only one can be right."""
        places = self._other_places(lease)
        return [key for key in places if not same_node(self.held[key].lease.attrs, lease.attrs)]

    def _is_news(self, lease: Lease) -> bool:
        """Whether it was written since we met this history, and may be in the way of a held peer.

        Most of a cluster comes back as it was. What the new history had already is news when it is written
        again: until then it may have been from before the backup.
        """
        if not self.held or lease.revision <= self.began:
            return False
        before = self.known.get(lease.key)
        if before is None or before.attrs != lease.attrs:
            return True
        return lease.key not in self.held and before.revision <= self.began

    def _make_room(self, written: Sequence[Lease]) -> list[str]:
        """A held peer gives way to what was written since: its node has moved, or its subnet is another's."""
        gone = dict.fromkeys(
            key
            for lease in written
            for key, held in self.held.items()
            if key != lease.key and _replaces(lease, held.lease)
        )
        self._release(gone)
        return list(gone)

    def _release(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.held.pop(key, None)


def _replaces(lease: Lease, held: Lease) -> bool:
    return _same_machine(lease.attrs, held.attrs) or any(
        one.overlaps(other) for one in lease.subnets() for other in held.subnets()
    )


def _same_machine(one: LeaseAttrs, other: LeaseAttrs) -> bool:
    """Perhaps under another address: only one of two with the same MAC or key can be programmed anyway."""
    return same_node(one, other) or not {*_ids(one)}.isdisjoint(_ids(other))


def _marks(attrs: LeaseAttrs) -> list[bytes | str]:
    """All that may tell a machine."""
    addresses = [address for address in (attrs.public_ip, attrs.public_ipv6) if address is not None]
    return [*addresses, *_ids(attrs)]


def _ids(attrs: LeaseAttrs) -> list[str]:
    """VTEP MACs, or WireGuard's public keys."""
    parts = [data for data in (attrs.backend_data, attrs.backend_v6_data) if isinstance(data, dict)]
    found = [part.get(name) for part in parts for name in ("VtepMAC", "PublicKey")]
    return [one for one in found if isinstance(one, str) and one]


def _rivals(held: Mapping[str, Held]) -> set[str]:
    """The keys of which another one has an address, too."""
    spans = sorted((*span, key) for key, one in held.items() for span in one.lease.spans())
    found = set()
    reach: tuple[int, int, str] = (0, 0, "")
    for bits, first, last, key in spans:
        if (bits, first) <= reach[:2] and key != reach[2]:
            found |= {key, reach[2]}
        reach = max(reach, (bits, last, key))
    return found


def _overlapped(leases: Iterable[Lease], held: Mapping[str, Held]) -> list[str]:
    """The held keys with an address that another key's lease has, too. Both may be thousands."""
    spans = sorted((*span, lease.key) for lease in leases for span in lease.spans())
    ends = list(accumulate(((bits, last) for bits, _first, last, _key in spans), max))
    found = []
    for key, one in held.items():
        for bits, first, last in one.lease.spans():
            # Before `place` begin all that may overlap it; the longest of them reaches up to `ends`.
            place = bisect_right(spans, (bits, last, math.inf, ""))
            if place and ends[place - 1] >= (bits, first) and spans[place - 1][3] != key:
                found.append(key)
                break
    return found
