"""The difference between what should be and what is, as operations in an order that is safe at every step.

The order is the point of this module. A route that is present must be able to deliver, after every single
operation: the FDB entry is put before the neighbour that names its MAC, the neighbour before the route that
names its address; removal goes the other way. (flannel puts the neighbour first: when a peer's MAC changes,
there is a moment with a neighbour whose MAC leads nowhere.)
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from flannelpy.model.kernel import Item, Link, Neighbour, State

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
        *_puts(desired.routes, left.routes),
        *_removals(desired.routes, left.routes),
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
