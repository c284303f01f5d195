"""The peers: every other node's lease, which of them can be programmed, and what each needs in the kernel.

A lease is foreign data. It is programmed only if its subnet lies in the network and overlaps neither ours nor
that of a lease created earlier, its public IP can be sent to, and the backend can make use of it. Everything
else is refused with a reason; a refused lease never disturbs a good one.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from flannelpy.model.address import Address, Prefix, Span, format_address, is_unicast
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Item, State
from flannelpy.model.lease import Delta, Lease, LeaseUpdate, Snapshot

Protected = tuple[str, Prefix]
"""What no peer's subnet may overlap, with words for it."""

Needs = Callable[[Lease], tuple[tuple[Item, ...], str | None]]
"""A lease -> (its objects, why not all of them): a backend's `peer` with the facts bound."""


class Judged(NamedTuple):
    """A lease by itself, whatever other leases say."""

    lease: Lease
    spans: list[Span]
    """Its subnets."""
    items: tuple[Item, ...]
    """What it needs; nothing if it cannot be programmed."""
    reason: str | None
    """Why not (all of it)."""


class Change(NamedTuple):
    """What an update means for the desired state."""

    touched: State
    """What the changed peers needed before, and what they need now: these keys must be compared."""
    full: bool
    """The keys do not tell it all: compare everything."""


class Peers:
    """All leases but our own, and the desired state that follows from them."""

    def __init__(
        self, config: NetworkConfig, own: Lease, needs: Needs, protected: Sequence[Protected] = ()
    ) -> None:
        self.leases: dict[str, Lease] = {}
        """Our own among them: another node may hold that subnet once we have another one."""
        self.refused: dict[str, str] = {}
        """Key -> why (a part of) this lease is not programmed."""
        self.state = State()
        """What all programmed peers need."""
        self.synced = False
        """Whether a Snapshot was seen: before it, an absent peer means nothing."""
        self._config = config
        self._own = own
        self._needs = needs
        self._protected = _protected(protected)
        self._networks = {
            network.bits: network.span[1:] for network in (config.network, config.network6) if network
        }
        self._items: dict[str, tuple[Item, ...]] = {}
        self._shared: dict[Item, int] = {}
        """How many peers need an object, where it is more than one (a node with two leases has one VTEP)."""
        self._taken = _Taken(own)
        self._clashes = 0
        """Leases refused because of another one: if that changes, they must be looked at again."""

    def rebase(self, own: Lease, needs: Needs, protected: Sequence[Protected] = ()) -> None:
        """Our lease or the facts changed: judge all leases afresh."""
        self._own, self._needs = own, needs
        self._protected = _protected(protected)
        self._rebuild()

    def update(self, update: LeaseUpdate) -> Change:
        """Take in what the store says."""
        records = update.leases if isinstance(update, Snapshot) else update.put
        put = [lease for lease in records if self.leases.get(lease.key) != lease]
        if isinstance(update, Delta):
            return self._change([key for key in update.gone if key in self.leases], put)
        self.synced = True
        present = {lease.key for lease in records} | {key for key, _reason in update.unreadable}
        return self._change([key for key in self.leases if key not in present], put)

    def programmed(self) -> int:
        """How many peers have objects in the desired state."""
        return len(self._items)

    def missing(self, observed: State) -> list[str]:
        """The keys of those that the kernel, as it is, has not whole."""
        return [
            key
            for key, items in self._items.items()
            if any(observed.table(item).get(item.key) != item for item in items)
        ]

    def _change(self, gone: list[str], put: list[Lease]) -> Change:
        before = len(self.leases)
        was = {lease.key: self.leases.get(lease.key) for lease in put}
        for key in gone:
            del self.leases[key]
        for lease in put:
            self.leases[lease.key] = lease
        # Most renewals change nothing that a peer needs.
        put = [lease for lease in put if not self._is_renewal(was[lease.key], lease)]
        # Most of them changed, or somebody may get what another one leaves: judge all.
        full = len(gone) + len(put) > before // 2
        if self._clashes and not full:
            full = any(key in self._items for key in (*gone, *(lease.key for lease in put)))
        touched = State()
        if not full:
            clashes = self._clashes
            for key in gone:
                touched.add(self._take_out(key))
            for lease in put:
                touched.add(self._take_out(lease.key))
                if not self._is_own(lease):
                    touched.add(self._place(self._judge(lease)))
            full = self._clashes > clashes
        if full:
            self._rebuild()
            return Change(State(), full=True)
        return Change(touched, full=False)

    def _is_renewal(self, was: Lease | None, now: Lease) -> bool:
        """Whether a programmed lease was only written again."""
        return (
            was is not None
            and was.key in self._items
            and was.key not in self.refused
            and (was.attrs, was.created) == (now.attrs, now.created)
        )

    def _rebuild(self) -> None:
        """Judge all leases, the earlier created first."""
        self.refused.clear()
        self._items.clear()
        self._shared.clear()
        self._clashes = 0
        judged = [self._judge(lease) for lease in self.leases.values() if not self._is_own(lease)]
        if self._place_together(judged):
            return
        self.state = State()
        self._taken = _Taken(self._own)
        for one in sorted(judged, key=lambda one: (one.lease.created, one.lease.key)):
            self._place(one)

    def _is_own(self, lease: Lease) -> bool:
        return lease.key == self._own.key or lease.attrs == self._own.attrs

    def _judge(self, lease: Lease) -> Judged:
        spans = lease.spans()
        reason = self._unusable(lease, spans)
        if reason is not None:
            return Judged(lease, spans, (), reason)
        items, reason = self._needs(lease)
        return Judged(lease, spans, items, reason)

    def _place_together(self, judged: Sequence[Judged]) -> bool:
        """Programme all at once if no lease is in the way of another one, and whether that is so.

        The usual case at start: nobody has to come first, and nothing has to be looked up.
        """
        programmed = [one for one in judged if one.items]
        state = State(chain.from_iterable(one.items for one in programmed))
        if len(state) < sum(len(one.items) for one in programmed):
            return False  # two of them need one object
        taken = _Taken(self._own)
        if not taken.add_all(programmed):
            return False
        self.state, self._taken = state, taken
        self._items = {one.lease.key: one.items for one in programmed}
        self.refused = {one.lease.key: one.reason for one in judged if one.reason is not None}
        return True

    def _place(self, judged: Judged) -> tuple[Item, ...]:
        """Programme a lease beside those that are; its objects, now part of the state."""
        lease, spans, items, reason = judged
        if items:
            clash = self._taken.clash(lease, spans) or self._add(items)
            if clash is not None:
                items, reason = (), clash
                self._clashes += 1
        if items:
            self._items[lease.key] = items
            self._taken.add(lease.key, spans)
        if reason is not None:
            self.refused[lease.key] = reason
        return items

    def _take_out(self, key: str) -> tuple[Item, ...]:
        """Forget what a lease needed; those of its objects that nobody needs any more."""
        self.refused.pop(key, None)
        items = self._items.pop(key, ())
        if not items:
            return ()
        self._taken.discard(key)
        freed = tuple(item for item in items if item not in self._shared)
        for item in items:
            if item in self._shared:
                self._shared[item] -= 1
                if self._shared[item] == 1:
                    del self._shared[item]
        for item in freed:
            self.state.discard(item)
        return freed

    def _add(self, items: tuple[Item, ...]) -> str | None:
        """Make them part of the state; or the reason why they cannot be, and nothing is changed.

        Two peers with one VTEP MAC would need one FDB entry for two destinations.
        """
        slots = [(self.state.table(item), item.key) for item in items]
        found = [table.get(key) for table, key in slots]
        for other, item in zip(found, items, strict=True):
            if other is not None and other != item:
                return f"an earlier lease needs the same {other}"
        for other, item, (table, key) in zip(found, items, slots, strict=True):
            if other is None:
                table[key] = item
            else:
                self._shared[item] = self._shared.get(item, 1) + 1
        return None

    def _unusable(self, lease: Lease, spans: list[Span]) -> str | None:
        """What is wrong with the lease itself."""
        for bits, first, last in spans:
            network = self._networks.get(bits)
            if network is not None and not network[0] <= first <= last <= network[1]:
                subnet = lease.subnet if bits == 32 else lease.subnet6
                return f"its subnet {subnet} is not inside the network {self._config_network(bits)}"
        for what, bits, low, high in self._protected:
            for own_bits, first, last in spans:
                if bits == own_bits and low <= last and first <= high:
                    subnet = lease.subnet if bits == 32 else lease.subnet6
                    return f"its subnet {subnet} contains {what}"
        attrs = lease.attrs
        if attrs.public_ip is not None:
            reason = self._bad_public_ip(attrs.public_ip, self._own.attrs.public_ip)
            if reason is not None:
                return reason
        if attrs.public_ipv6 is not None:
            return self._bad_public_ip(attrs.public_ipv6, self._own.attrs.public_ipv6)
        return None

    def _config_network(self, bits: int) -> Prefix | None:
        return self._config.network if bits == 32 else self._config.network6

    def _bad_public_ip(self, public_ip: Address, own: Address | None) -> str | None:
        if not is_unicast(public_ip):
            return f"its public IP {format_address(public_ip)} is not a unicast address"
        if public_ip == own:
            return f"its public IP {format_address(public_ip)} is our own"
        network = self._networks.get(len(public_ip) * 8)
        if network is not None and network[0] <= int.from_bytes(public_ip) <= network[1]:
            return (
                f"its public IP {format_address(public_ip)} is inside the overlay network "
                f"{self._config_network(len(public_ip) * 8)}"
            )
        return None


def _protected(blocks: Sequence[Protected]) -> list[tuple[str, int, int, int]]:
    return [(what, *block.span) for what, block in blocks]


class _Taken:
    """The address ranges of the programmed subnets, per family. They are disjoint: one order serves all."""

    def __init__(self, own: Lease) -> None:
        self._own = own.key
        self._ranges: dict[int, list[tuple[int, int, str]]] = {32: [], 128: []}
        """Bits -> sorted (first, last, key)."""
        self._by_key: dict[str, list[Span]] = {}
        self.add(own.key, own.spans())

    def add(self, key: str, spans: list[Span]) -> None:
        self._by_key[key] = spans
        for bits, first, last in spans:
            insort(self._ranges[bits], (first, last, key))

    def add_all(self, leases: Iterable[Judged]) -> bool:
        """Take the subnets of many leases; whether they are disjoint. If not, this is of no more use."""
        for lease, spans, _items, _reason in leases:
            self._by_key[lease.key] = spans
            for bits, first, last in spans:
                self._ranges[bits].append((first, last, lease.key))
        for ranges in self._ranges.values():
            ranges.sort()
            if any(last >= following for (_first, last, _key), (following, _, _) in pairwise(ranges)):
                return False
        return True

    def discard(self, key: str) -> None:
        for bits, first, _last in self._by_key.pop(key):
            ranges = self._ranges[bits]
            del ranges[bisect_left(ranges, (first,))]

    def clash(self, lease: Lease, spans: list[Span]) -> str | None:
        """The reason if a subnet of the lease overlaps one that is taken."""
        for bits, first, last in spans:
            ranges = self._ranges[bits]
            position = bisect_left(ranges, (first,))
            for found_first, found_last, key in ranges[max(0, position - 1) : position + 1]:
                if found_first <= last and first <= found_last:
                    subnet = lease.subnet if bits == 32 else lease.subnet6
                    whose = "our own" if key == self._own else f"that of the earlier lease {key}"
                    return f"its subnet {subnet} overlaps {whose}"
        return None
