"""No live peer is ever withdrawn: what the nodes themselves have told, against what is done in the kernels.

A node needs what its own last write to the store says, until an operator or expiry takes that record away, or
until another node has claimed its subnet. Whatever else makes a peer remove or redirect it is a mistake.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

from flannelpy.model.kernel import DeviceAddress, Link, Route
from flannelpy.model.lease import Lease
from flannelpy.model.plan import Op, Put, Remove
from tests.sim import checks
from tests.sim.checks import Shape
from tests.sim.member import Member

_LAG_SECONDS = 0.2
"""This long after a record came back a peer may still act on its deletion."""


class Told(NamedTuple):
    """What a node wrote last."""

    lease: Lease
    at: float
    wall: float
    """The same by the node's own clock."""


class Withdrawals:
    """Judges operations. The world reports each write and each deletion."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self.told: dict[Member, Told] = {}
        self.ever: dict[Member, list[Lease]] = {}
        """All that each has told."""
        self._gone: set[str] = set()
        """Keys whose records were truly deleted, or overwritten, in the present history,"""
        self._back: dict[str, float] = {}
        """and when that was over."""
        self._displaced: dict[Member, float] = {}
        """Until when nobody can know where a node is: another machine has its address, or its subnet."""

    def wrote(self, member: Member, lease: Lease, now: float) -> None:
        """A node wrote its record."""
        self.told[member] = Told(lease, now, member.wall_clock())
        self.ever.setdefault(member, []).append(lease)
        if member in self._displaced:
            self._displaced[member] = min(self._displaced[member], now + _LAG_SECONDS)
        if lease.key in self._gone:
            self._gone.discard(lease.key)
            self._back[lease.key] = now

    def taken_away(self, key: str) -> None:
        """A record was deleted, has expired, or is another node's now."""
        self._gone.add(key)

    def displaced(self, member: Member) -> None:
        """Another machine wrote with its address, or into its subnet, until it writes itself again."""
        self._displaced[member] = math.inf

    def new_history(self, now: float, records: Collection[str]) -> None:
        """What was deleted before says nothing any more; what a backup has in a node's place does."""
        for member, told in self.told.items():
            if told.lease.key not in records and checks.overlap(told.lease.key, records):
                self.displaced(member)
        self._back.update(dict.fromkeys(self._gone, now))
        self._gone.clear()

    def is_claimed(self, lease: Lease, now: float) -> bool:
        """Whether the node of a lease still counts on it."""
        return lease.key not in self._gone and now - self._back.get(lease.key, -1e9) > _LAG_SECONDS

    def harmed(self, me: Member, op: Op, shape: Shape, now: float) -> tuple[Member, Lease] | None:
        """Whose way this operation cuts although its node counts on it, as far as `me` can know."""
        was = op.item if isinstance(op, Remove) else op.was
        if was is None or isinstance(was, Link | DeviceAddress) or (isinstance(op, Put) and op.item == was):
            return None
        for peer, (lease, at, _wall) in self.told.items():
            if peer is me or now - at > self._ttl or not _knows(me, lease, op):
                continue
            if now < self._displaced.get(peer, 0.0) or self._is_in_our_place(me, lease):
                continue
            needed = any(was == item for item in checks.peer_items(me, peer, lease, shape, as_told=True))
            if needed and self.is_claimed(lease, now):
                return peer, lease
        return None

    def _is_in_our_place(self, me: Member, lease: Lease) -> bool:
        """Whether it took our own subnet while we had no record: there is no way to it before we move."""
        return any(  # the answer to what it wrote last may still be on its way
            lease.key == own.key or checks.overlap(lease.key, [own.key]) for own in self.ever.get(me, ())[-2:]
        )


def _knows(me: Member, lease: Lease, op: Op) -> bool:
    """By its memory a node knows that there is a peer; where that is now it must have heard since."""
    store = me.store
    if store is None:
        return False
    heard = lease.attrs in store.seen.get(lease.key, ())
    is_removed = isinstance(op, Remove) and isinstance(op.item, Route)
    return heard or (is_removed and lease.key in store.remembered)
