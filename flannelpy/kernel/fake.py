"""A kernel of dicts, with the real one's refusals and side effects, for tests and simulations.

The same tests run on this one and, in a network namespace, on the real one (tests/netns/test_kernel.py).
"""

import errno
from collections.abc import Callable, Iterable, Sequence

from flannelpy.kernel.links import Failure
from flannelpy.kernel.netlink import NetlinkError
from flannelpy.model.address import Address
from flannelpy.model.kernel import (
    DeviceAddress,
    Item,
    Link,
    Neighbour,
    Route,
    Scope,
    State,
)
from flannelpy.model.plan import Op, Put


class FakeKernel:
    """One host's tables. `foreign` are devices that exist but are nobody's of ours, such as the uplink."""

    def __init__(self, foreign: Iterable[str] = (), reachable: Iterable[Address] = ()) -> None:
        self.state = State()
        self.foreign = set(foreign)
        self.reachable = set(reachable)
        """Addresses that are on-link on the uplink."""
        self.refuse: Callable[[Op], int] = lambda _op: 0
        """An errno for an operation that shall fail, 0 for none: faults to inject."""
        self.after_each: Callable[[Op], None] = lambda _op: None
        """Called after every single operation that was carried out."""

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        """What is in `scope`, as `LinuxKernel.observe`."""
        return State(item for item in self.state.items() if self._in_scope(item, scope, devices_only))

    def apply(self, ops: Sequence[Op]) -> list[Failure]:
        """Do all of it, in order; the failures."""
        failures = []
        for op in ops:
            code = self.refuse(op) or (self._put(op.item) if isinstance(op, Put) else self._remove(op.item))
            if code:
                failures.append(Failure(op, NetlinkError(code)))
            else:
                self.after_each(op)
        return failures

    def on_link(self, addresses: Iterable[Address], device: str) -> frozenset[Address]:
        """Which of these are on-link."""
        return frozenset(self.reachable.intersection(addresses)) if device in self.foreign else frozenset()

    def _in_scope(self, item: Item, scope: Scope, devices_only: bool) -> bool:
        if isinstance(item, Link):
            return item.name in scope.devices
        if devices_only and not isinstance(item, DeviceAddress):
            return False
        if item.device in scope.devices:
            return True
        return isinstance(item, Route) and any(net.contains(item.destination) for net in scope.networks)

    def _put(self, item: Item) -> int:
        if isinstance(item, Link):
            return self._put_link(item)
        if item.device not in self.state.links:
            if not (isinstance(item, Route) and item.device in self.foreign):
                return errno.ENODEV
        elif isinstance(item, Route) and not self.state.links[item.device].up:
            return errno.ENETDOWN
        self.state.add([item])
        return 0

    def _put_link(self, link: Link) -> int:
        found = self.state.links.get(link.name)
        if found is None:
            for other in self.state.links.values():
                if (
                    other.vxlan
                    and link.vxlan
                    and (other.vxlan.vni, other.vxlan.port) == (link.vxlan.vni, link.vxlan.port)
                    and len(other.vxlan.local or b"") == len(link.vxlan.local or b"")
                ):
                    return errno.EEXIST  # one device per VNI, port and family
            self.state.add([link])
            return 0
        if (found.kind, found.vxlan) != (link.kind, link.vxlan):
            return errno.EOPNOTSUPP  # what it was made with cannot be changed
        if found.mac != link.mac:
            self._drop(lambda item: isinstance(item, Neighbour) and item.device == link.name)
        if found.up and not link.up:
            self._drop(lambda item: isinstance(item, Route) and item.device == link.name)
        self.state.add([link])
        return 0

    def _remove(self, item: Item) -> int:
        self.state.discard(item)
        if isinstance(item, Link):
            self._drop(lambda other: not isinstance(other, Link) and other.device == item.name)
        return 0  # "not there" is what was wanted

    def _drop(self, condition: Callable[[Item], bool]) -> None:
        for item in [item for item in self.state.items() if condition(item)]:
            self.state.discard(item)
