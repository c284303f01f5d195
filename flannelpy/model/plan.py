"""The difference between what should be and what is, as operations in an order that is safe at every step.

The order is the point of this module. A route that is present must be able to deliver, after every single
operation: the FDB entry is put before the neighbour that names its MAC, the neighbour before the route that
names its address, the forwarding entries before the tunnel that takes up what waits for them, the tunnel
before the route into it; removal goes the other way. (flannel puts the neighbour first: when a peer's MAC
changes, there is a moment with a neighbour whose MAC leads nowhere.)
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias, TypeVar

from flannelpy.model.kernel import FdbEntry, Item, Link, Neighbour, Route, State

K = TypeVar("K")
I = TypeVar("I", bound=Item)  # noqa: E741


class Put(NamedTuple):
    """Make the object exist as given; `was` is what has its key now (replace), None = nothing (create)."""

    item: Item
    was: Item | None = None

    def __str__(self) -> str:
        return f"{'change' if self.was else 'add'} {self.item}"


class Remove(NamedTuple):
    """Make the object, found as given, not exist."""

    item: Item

    def __str__(self) -> str:
        return f"remove {self.item}"


Op = Put | Remove


def plan(desired: State, observed: State) -> list[Op]:
    """All operations that lead from `observed` to `desired`; empty when they agree."""
    if desired == observed:
        return []  # a resync with nothing to do is the usual case, and this is five times faster
    remade, stale = _links_to_remove(desired, observed)
    left = survivors(desired, observed, remade) if remade or _mac_changes(desired, observed) else observed
    return [
        # A device that is made anew has to go first: the kernel allows one device per VNI and port.
        *map(Remove, remade),
        *_puts(desired.links, left.links),
        *_puts(desired.addresses, left.addresses),
        *_puts(desired.fdb, left.fdb),
        *_puts(desired.neighbours, left.neighbours),
        *_puts(desired.forwards, left.forwards),
        *_puts(desired.tunnels, left.tunnels),
        *_puts(desired.routes, left.routes),
        *_removals(desired.routes, left.routes),
        *_removals(desired.tunnels, left.tunnels),
        *_removals(desired.forwards, left.forwards),
        *_removals(desired.neighbours, left.neighbours),
        *_removals(desired.fdb, left.fdb),
        *_removals(desired.addresses, left.addresses),
        # A device that is not needed any more goes last: what replaces it stands by now.
        *map(Remove, stale),
    ]


def plan_part(desired: Iterable[State], observed: State, touched: State) -> list[Op]:
    """The same for the keys of a few objects: put what is desired under them, remove what is not.

    `desired` may come in parts. One changed lease among 10,000 costs as much as one among ten. `touched` may
    not hold links.
    """
    wanted = State()
    for part in desired:
        wanted.update(_under(touched, part))
    return plan(wanted, _under(touched, observed))


def _under(keys: State, state: State) -> State:
    """What a state has under the keys of another one."""
    found = (state.table(item).get(item.key) for item in keys.items())
    return State(item for item in found if item is not None)


def stages(ops: Iterable[Op]) -> Iterator[list[Op]]:
    """A plan in parts, each of one kind of operation and object: none needs another one of its part."""
    for _kind, part in groupby(ops, lambda op: (type(op), type(op.item))):
        yield list(part)


Slot: TypeAlias = tuple[type[Item], Any]
"""The place of an object: its type and key."""


def needs(item: Item) -> Slot | None:
    """The place of what an object cannot deliver without."""
    if isinstance(item, Neighbour):
        return FdbEntry, (item.device, item.mac)
    if isinstance(item, Route) and item.gateway is not None:
        return Neighbour, (item.device, item.gateway)
    return None


class Refusals:
    """What the kernel refused of a plan so far, and what must not be done either because of that.

    What needs an object that could not be put is not put, and what is needed by an object that stays is not
    removed: a route that is present can deliver, whatever is refused.
    """

    def __init__(self) -> None:
        self._not_put: set[Slot] = set()
        self._needed: set[Slot | None] = set()
        """By what should be gone or changed, and stays as it was."""

    def add(self, op: Op) -> None:
        """An operation was not done."""
        stays = op.item if isinstance(op, Remove) else op.was
        if stays is not None:
            self._needed.add(needs(stays))
        if isinstance(op, Put):
            self._not_put.add((type(op.item), op.item.key))

    def allow(self, ops: list[Op]) -> list[Op]:
        """Those of the next stage that may be done; the others count as not done."""
        if not self._not_put and not self._needed:
            return ops
        allowed = []
        for op in ops:
            if self._forbids(op):
                self.add(op)
            else:
                allowed.append(op)
        return allowed

    def _forbids(self, op: Op) -> bool:
        if isinstance(op, Put):
            return needs(op.item) in self._not_put
        return (type(op.item), op.item.key) in self._needed


def note_done(observed: State, done: Iterable[Op]) -> None:
    """Bring our picture of the kernel up to date with what was done."""
    for op in done:
        table, key = observed.table(op.item), op.item.key
        if isinstance(op, Remove):
            table.pop(key, None)
        else:
            table[key] = op.item


def survivors(desired: State, observed: State, removed: Iterable[Link]) -> State:
    """What is left of `observed` once `removed` links are gone and MACs have been set.

    The kernel drops all on a removed device, and all permanent neighbours of a device whose MAC changes.
    """
    gone = {link.name for link in removed}
    rehomed = gone | _mac_changes(desired, observed)

    def survives(item: Item) -> bool:
        if isinstance(item, Link):
            return item.name not in gone
        return item.device not in (rehomed if isinstance(item, Neighbour) else gone)

    return State(filter(survives, observed.items()))


def _links_to_remove(desired: State, observed: State) -> tuple[list[Link], list[Link]]:
    """(links that must be made anew, links that nobody wants)."""
    remade, stale = [], []
    for name, link in observed.links.items():
        want = desired.links.get(name)
        if want is None:
            stale.append(link)
        elif (link.kind, link.vxlan) != (want.kind, want.vxlan):
            remade.append(link)
    return remade, stale


def _mac_changes(desired: State, observed: State) -> set[str]:
    return {
        name
        for name, link in observed.links.items()
        if name in desired.links and desired.links[name].mac != link.mac
    }


def _puts(desired: Mapping[K, I], observed: Mapping[K, I]) -> Iterator[Op]:
    for key, item in desired.items():
        found = observed.get(key)
        if found != item:
            yield Put(item, found)


def _removals(desired: Mapping[K, I], observed: Mapping[K, I]) -> Iterator[Op]:
    for key, item in observed.items():
        if key not in desired:
            yield Remove(item)
