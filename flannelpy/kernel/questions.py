"""Questions about the machine whose answers nobody keeps: links and addresses, ways, other routes."""

from collections.abc import Container, Iterable

from flannelpy.kernel import codec, replies
from flannelpy.kernel.links import Links, link_of
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.kernel.replies import RouteInfo
from flannelpy.kernel.routes import main_routes
from flannelpy.model.address import Address, Prefix
from flannelpy.model.kernel import ROUTE_PROTOCOL, Link, is_kernels_own
from flannelpy.model.uplink import OVERLAY_NAME, DefaultRoute, Interface, InterfaceAddress


class Questions:
    """They change nothing, and take no notice away from whoever listens."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self._links = Links(netlink)

    def interfaces(self) -> list[Interface]:
        """All links with their addresses, in the kernel's order."""
        addresses: dict[int, list[InterfaceAddress]] = {}
        for info in filter(None, map(replies.read_address, self._netlink.dump(codec.address_dump()))):
            flags = info.flags
            addresses.setdefault(info.ifindex, []).append(
                InterfaceAddress(
                    info.prefix,
                    deprecated=bool(flags & codec.IFA_F_DEPRECATED),
                    permanent=bool(flags & codec.IFA_F_PERMANENT),
                    temporary=len(info.prefix.address) == 16 and bool(flags & codec.IFA_F_TEMPORARY),
                )
            )
        return [
            Interface(link.ifindex, link.name, link.mtu, tuple(addresses.get(link.ifindex, ())))
            for link in self._links.read().values()
        ]

    def links(self, names: Container[str]) -> dict[str, Link]:
        """The devices of these names that there are."""
        found = self._links.read()
        indices = {link.ifindex: name for name, link in found.items()}
        return {name: link_of(link, indices) for name, link in found.items() if name in names}

    def default_routes(self) -> list[DefaultRoute]:
        """The default routes of both families in the main table, in the kernel's order."""
        return [
            DefaultRoute(route.destination.bits, route.ifindex, route.metric)
            for route in main_routes(self._netlink, default_only=True)
            if route.type == codec.RTN_UNICAST
        ]

    def routed(self) -> list[tuple[str, Prefix]]:
        """(device, destination) of the main table's routes, without default routes and those of ours."""
        names = {link.ifindex: name for name, link in self._links.read().items()}
        return [
            (names.get(route.ifindex, "?"), route.destination)
            for route in main_routes(self._netlink)
            if route.destination.length
            and route.protocol != ROUTE_PROTOCOL
            and not is_kernels_own(route.destination)
        ]

    def route_to(self, address: Address) -> tuple[int, Address] | None:
        """(output device's index, source address) that the kernel would use; None when it has no route."""
        route = self._lookup(address)
        if route is None or not route.ifindex:
            return None
        return route.ifindex, route.source or b""

    def on_link(self, addresses: Iterable[Address], device: str) -> frozenset[Address]:
        """Which of these the kernel reaches through that device without a gateway."""
        if device not in self._links.by_name:
            return frozenset()
        index = self._links.index(device)
        asked = list(addresses)
        answers = self._netlink.ask(list(map(codec.route_get, asked)))
        return frozenset(
            address
            for address, answer in zip(asked, answers, strict=True)
            if answer is not None and replies.is_direct(answer, index)
        )

    def marked_overlay_devices(self) -> frozenset[str]:
        """Devices with an overlay's name that carry routes with our protocol number."""
        names = {link.ifindex: name for name, link in self._links.read().items()}
        routes = main_routes(self._netlink, protocol=ROUTE_PROTOCOL)
        marked = {names.get(route.ifindex, "") for route in routes}
        return frozenset(name for name in marked if OVERLAY_NAME.fullmatch(name))

    def _lookup(self, address: Address) -> RouteInfo | None:
        try:
            return replies.read_route(self._netlink.request(codec.route_get(address))[0])
        except (NetlinkError, IndexError):
            return None
