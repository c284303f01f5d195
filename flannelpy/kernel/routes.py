"""The routes of the main table, read with as little as is asked for: a host may have a million of others."""

import errno
from collections.abc import Collection

from flannelpy.kernel import codec, replies
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.kernel.replies import RouteInfo
from flannelpy.kernel.table import Row
from flannelpy.model.kernel import PROTOCOL_BOOT, ROUTE_PROTOCOL, Scope


def route_rows(netlink: NetlinkSocket, family: int, *, index: int = 0, protocol: int = 0) -> list[Row]:
    """The main table's rows of one family, by device or by protocol.

    The kernel makes the IPv4 table with the first route in it; before that it says ENOENT.
    """
    try:
        return netlink.rows(codec.route_dump(family, index=index, protocol=protocol), replies.ROUTES)
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        return []


def main_routes(
    netlink: NetlinkSocket,
    *,
    protocol: int = 0,
    skip: Collection[int] = (),
    default_only: bool = False,
) -> list[RouteInfo]:
    """The main table, of one protocol, and without the routes on some devices."""
    found = []
    for family in (codec.AF_INET, codec.AF_INET6):
        for row in route_rows(netlink, family, protocol=protocol):
            # Do not make values of thousands of routes for one.
            if (default_only and row[replies.ROUTE_LENGTH]) or row[replies.ROUTE_DEVICE] in skip:
                continue
            route = replies.route_of(row)
            if route is None or route.table != codec.RT_TABLE_MAIN:
                continue
            if not protocol or route.protocol == protocol:
                found.append(route)
    return found


def routes_elsewhere(netlink: NetlinkSocket, scope: Scope, ours: dict[int, str]) -> list[RouteInfo]:
    """On other devices: routes with our mark inside our networks and, at start, a flannel's."""
    found = [
        route
        for route in main_routes(netlink, protocol=ROUTE_PROTOCOL, skip=ours)
        if any(net.contains(route.destination) for net in scope.networks)
    ]
    if scope.takeover:
        found += [
            route
            for route in main_routes(netlink, protocol=PROTOCOL_BOOT, skip=ours)
            if (
                route.gateway is not None
                and route.destination.length in scope.takeover_lengths
                and any(net.contains(route.destination) for net in scope.takeover)
            )
            or (route.type == codec.RTN_BLACKHOLE and route.destination in scope.takeover_blackholes)
        ]
    return found
