"""A kernel of dicts, with the real one's refusals and side effects, for tests and simulations.

The same tests run on this one and, in a network namespace, on the real one (tests/netns/test_kernel.py).
It announces what `kernel.monitor` would: what others do, echoes of our own FDB changes, and not the IPv4
routes that die with their device or its addresses.
"""

import asyncio
import errno
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Mapping, Sequence

from flannelpy.kernel.links import Failure
from flannelpy.kernel.netlink import NetlinkError
from flannelpy.model.address import Address, Prefix
from flannelpy.model.kernel import (
    PROTOCOL_BOOT,
    PROTOCOL_KERNEL,
    Appeared,
    DeviceAddress,
    FdbEntry,
    Forward,
    Item,
    Link,
    Neighbour,
    Notice,
    Route,
    Scope,
    Shaken,
    State,
    Tunnel,
    Vanished,
)
from flannelpy.model.plan import Op, Put
from flannelpy.model.uplink import DefaultRoute, Interface


class FakeKernel:
    """One host's tables. `foreign` are devices that exist but are nobody's of ours, such as the uplink."""

    def __init__(self, foreign: Iterable[str] = (), reachable: Iterable[Address] = ()) -> None:
        self.state = State()
        self.foreign = set(foreign)
        self.reachable = set(reachable)
        """Addresses that are on-link on the uplink, besides those in the prefixes of its addresses."""
        self.uplinks: dict[str, Interface] = {}
        """Foreign devices with their addresses; those that are not in here have none and always exist."""
        self.defaults: dict[int, str] = {}
        """32 and 128 -> the device of the family's default route."""
        self.nexthops = True
        """Whether routes on our devices go through nexthop objects: they outlive the last address."""
        self.deaf = False
        """Whether announcements are lost at present."""
        self.missed = 0
        """How many were lost since that began."""
        self.disturbed = False
        """Whether others did something since everything was last observed."""
        self.latency: Callable[[], float] = lambda: 0.0
        """Seconds from an announcement to its reading."""
        self.refuse: Callable[[Op], int] = lambda _op: 0
        """An errno for an operation that shall fail, 0 for none: faults to inject."""
        self.after_each: Callable[[Op], None] = lambda _op: None
        """Called after every single operation that was carried out."""
        self._scope = Scope(frozenset(), ())
        self._news: list[Notice] = []
        self._arrived = asyncio.Event()

    # --- what the loop asks ------------------------------------------------------------------------------

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        """What is in `scope`, as `LinuxKernel.observe`."""
        self._scope = scope
        if not devices_only:
            self.disturbed = False
        return State(item for item in self.state.items() if _in_scope(item, scope, devices_only))

    def apply(self, ops: Sequence[Op]) -> list[Failure]:
        """Do all of it, in order; the failures."""
        failures = []
        for op in ops:
            code = self.refuse(op) or (self._put(op.item) if isinstance(op, Put) else self._remove(op.item))
            if code:
                failures.append(Failure(op, NetlinkError(code)))
                continue
            if isinstance(op.item, FdbEntry):  # these echoes carry no sender
                self._tell(Appeared(op.item) if isinstance(op, Put) else Vanished(op.item))
            self.after_each(op)
        return failures

    def on_link(self, addresses: Iterable[Address], device: str) -> frozenset[Address]:
        """Which of these are on-link."""
        if device not in self.foreign:
            return frozenset()
        uplink = self.uplinks.get(device)
        prefixes = [own.prefix for own in uplink.addresses] if uplink else []
        return frozenset(
            address
            for address in addresses
            if address in self.reachable or any(prefix.has(address) for prefix in prefixes)
        )

    def interfaces(self) -> list[Interface]:
        """The uplinks."""
        return list(self.uplinks.values())

    def links(self, names: Container[str]) -> Mapping[str, Link]:
        """The devices of these names that there are."""
        return {name: link for name, link in self.state.links.items() if name in names}

    def default_routes(self) -> list[DefaultRoute]:
        """Those of devices that exist."""
        return [
            DefaultRoute(bits, self.uplinks[device].ifindex, 100)
            for bits, device in self.defaults.items()
            if device in self.uplinks
        ]

    def routed(self) -> list[tuple[str, Prefix]]:
        """(device, destination) of the routes."""
        return [(route.device, route.destination) for route in self.state.routes.values()]

    def packets(self) -> dict[str, int]:
        """Nothing is carried here."""
        return {}

    def why_no_fast_path(self, uplink: str) -> str:  # noqa: ARG002
        """No programs run here."""
        return "this kernel runs no programs"

    def route_to(self, address: Address) -> tuple[int, Address] | None:  # noqa: ARG002
        """No host that matters is far away here."""
        return None

    # --- announcements -----------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """Begin to listen: what was announced before is not heard."""
        self._news = []
        self._arrived = asyncio.Event()
        self.missed = 0

    async def changes(self) -> AsyncGenerator[list[Notice], None]:
        """What was announced, as it comes, for ever."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.latency())
            self._arrived.clear()
            found, self._news = self._news, []
            if found:
                yield found

    def hear_again(self, *, told: bool) -> None:
        """Announcements come through again; `told` says that some were lost (ENOBUFS), if some were."""
        self.deaf = False
        if told and self.missed:
            self._tell(Shaken("notifications were lost"))
            self.missed = 0

    def _tell(self, notice: Notice) -> None:
        if self.deaf:
            self.missed += 1
        else:
            self._news.append(notice)
            self._arrived.set()

    # --- what others do ----------------------------------------------------------------------------------

    def others_put(self, item: Item) -> None:
        """Somebody else makes or changes an object; what the kernel refuses does not happen."""
        self.disturbed = True
        if self._put(item) == 0:
            self._announce(item, gone=False)

    def others_remove(self, item: Item) -> None:
        """Somebody else removes an object."""
        self.disturbed = True
        if item.key in self.state.table(item):
            self._remove(item)
            self._announce(item, gone=True)

    def others_set_uplink(self, interface: Interface) -> None:
        """An uplink appears or changes. Routes die with the last address of their family."""
        before = self.uplinks.get(interface.name)
        self.foreign.add(interface.name)
        self.uplinks[interface.name] = interface
        self.disturbed = True
        if before is not None:
            for bits in (32, 128):
                if _has(before, bits) and not _has(interface, bits):
                    self._drop_routes(interface.name, bits)
        self._tell(Shaken(f"uplink {interface.name} changed"))

    def others_delete_uplink(self, name: str) -> None:
        """An uplink is deleted, and the tunnels over it with it."""
        self.disturbed = True
        del self.uplinks[name]
        self.foreign.discard(name)
        for bits in (32, 128):
            self._drop_routes(name, bits)
        for link in list(self.state.links.values()):
            if link.vxlan and link.vxlan.uplink == name:
                self.others_remove(link)
        self._tell(Shaken(f"uplink {name} was deleted"))

    def _drop_routes(self, device: str, bits: int) -> None:
        if self.defaults.get(bits) == device:
            del self.defaults[bits]
        self._drop(
            lambda item: isinstance(item, Route) and item.device == device and item.destination.bits == bits
        )

    def _announce(self, item: Item, *, gone: bool) -> None:
        if isinstance(item, Link):
            if item.name in self._scope.devices:
                self._tell(Shaken(f"{item} was {'deleted' if gone else 'changed'}"))
            return
        inside = isinstance(item, Route) and any(
            network.contains(item.destination) for network in self._scope.networks
        )
        if item.device in self._scope.devices or inside:
            self._tell(Vanished(item) if gone else Appeared(item))

    # --- the tables --------------------------------------------------------------------------------------

    def _put(self, item: Item) -> int:
        if isinstance(item, Link):
            return self._put_link(item)
        if item.device not in self.state.links:
            if item.device not in self.foreign:
                return errno.ENODEV
        elif isinstance(item, Route) and not self.state.links[item.device].up:
            return errno.ENETDOWN
        elif isinstance(item, FdbEntry) and _other_family(item, self.state.links[item.device]):
            return errno.EAFNOSUPPORT
        self.state.add([item])
        return 0

    def _put_link(self, link: Link) -> int:
        found = self.state.links.get(link.name)
        if found is None:
            return self._create_link(link)
        if (found.kind, found.vxlan) != (link.kind, link.vxlan):
            return errno.EOPNOTSUPP  # what it was made with cannot be changed
        if found.mac != link.mac:
            self._drop(lambda item: isinstance(item, Neighbour) and item.device == link.name)
        if found.up and not link.up:
            self._drop(lambda item: _dies_with_down(item, link.name))
        self.state.add([link])
        return 0

    def _create_link(self, link: Link) -> int:
        lower = link.vxlan.uplink if link.vxlan else None
        if lower is not None and lower not in self.foreign:
            return errno.ENODEV
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

    def _remove(self, item: Item) -> int:
        found = self.state.table(item).get(item.key)
        self.state.discard(item)
        if isinstance(item, Link):
            self._drop(lambda other: not isinstance(other, Link) and other.device == item.name)
        elif isinstance(found, DeviceAddress) and found.prefix.bits == 32:
            self._lose_address(found.device)
        return 0  # "not there" is what was wanted

    def _lose_address(self, device: str) -> None:
        """With its last IPv4 address go a device's IPv4 neighbours, and routes without nexthop objects."""
        if any(own.device == device and own.prefix.bits == 32 for own in self.state.addresses.values()):
            return
        self._drop(
            lambda item: (
                (isinstance(item, Neighbour) and item.device == device and len(item.address) == 4)
                or (
                    not self.nexthops
                    and isinstance(item, Route)
                    and item.device == device
                    and item.destination.bits == 32
                )
            )
        )

    def _drop(self, condition: Callable[[Item], bool]) -> None:
        """What the kernel takes away by itself. Of IPv4 routes it says nothing."""
        for item in [item for item in self.state.items() if condition(item)]:
            self.state.discard(item)
            if not (isinstance(item, Route) and item.destination.bits == 32):
                self._announce(item, gone=True)


def _has(interface: Interface, bits: int) -> bool:
    return any(own.prefix.bits == bits for own in interface.addresses)


def _other_family(entry: FdbEntry, link: Link) -> bool:
    local = link.vxlan.local if link.vxlan else None
    return local is not None and len(local) != len(entry.remote)


def _dies_with_down(item: Item, device: str) -> bool:
    """Link down: routes, neighbours and IPv6 addresses. IPv4 addresses and permanent FDB entries stay."""
    if isinstance(item, Link | FdbEntry | Tunnel | Forward) or item.device != device:
        return False
    return not (isinstance(item, DeviceAddress) and item.prefix.bits == 32)


def _in_scope(item: Item, scope: Scope, devices_only: bool) -> bool:
    if devices_only and not isinstance(item, Link | DeviceAddress):
        return False
    if isinstance(item, Neighbour) and not item.permanent:
        return False
    if not isinstance(item, Route):
        return scope.owns(item)
    if item.device in scope.devices:
        return item.protocol != PROTOCOL_KERNEL
    return scope.owns(item) or (
        item.protocol == PROTOCOL_BOOT
        and item.gateway is not None
        and item.destination.length in scope.takeover_lengths
        and any(network.contains(item.destination) for network in scope.takeover)
    )
