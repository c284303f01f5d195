"""rtnetlink answers and notifications as values. Pure; odd bytes give odd values, never an error.

The other direction, and the sources, are in `codec.py`.
"""

import struct
import sys
from operator import itemgetter
from typing import NamedTuple

from flannelpy.kernel.codec import (
    AF_INET,
    AF_INET6,
    IFA_ADDRESS,
    IFA_FLAGS,
    IFA_LOCAL,
    IFADDR,
    IFF_LOWER_UP,
    IFF_UP,
    IFINFO,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    IFLA_MTU,
    IFLA_VXLAN_GBP,
    IFLA_VXLAN_ID,
    IFLA_VXLAN_LEARNING,
    IFLA_VXLAN_LINK,
    IFLA_VXLAN_LOCAL,
    IFLA_VXLAN_LOCAL6,
    IFLA_VXLAN_PORT,
    NDA_DST,
    NDA_LLADDR,
    NHA_GATEWAY,
    NHA_ID,
    NHA_OIF,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTA_CACHEINFO,
    RTA_DST,
    RTA_GATEWAY,
    RTA_NH_ID,
    RTA_OIF,
    RTA_PREF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTA_VIA,
    RTMSG,
    RTN_UNICAST,
    RTNH_F_ONLINK,
    attr,
    attributes,
)
from flannelpy.kernel.table import Row, Table
from flannelpy.model.address import Address, Mac, Prefix
from flannelpy.model.kernel import ROUTE_PROTOCOL, Vxlan


class LinkInfo(NamedTuple):
    """A link as the kernel reports it."""

    ifindex: int
    name: str
    mac: Mac
    mtu: int
    up: bool
    running: bool
    """Has a carrier (IFF_LOWER_UP)."""
    kind: str
    vxlan: bytes
    """The raw IFLA_INFO_DATA of a VXLAN device."""


def read_link(body: bytes) -> LinkInfo:
    """RTM_NEWLINK, RTM_DELLINK."""
    _family, _type, index, flags, _change = IFINFO.unpack_from(body)
    found = attributes(body, 16)
    info = attributes(found.get(IFLA_LINKINFO, b""), 0)
    kind = info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace")
    return LinkInfo(
        index,
        found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "surrogateescape"),
        found.get(IFLA_ADDRESS, b""),
        _number(found.get(IFLA_MTU)),
        bool(flags & IFF_UP),
        bool(flags & IFF_LOWER_UP),
        kind,
        info.get(IFLA_INFO_DATA, b"") if kind == "vxlan" else b"",
    )


def read_vxlan(data: bytes, names: dict[int, str]) -> Vxlan:
    """IFLA_INFO_DATA of a VXLAN device; `names` turns the lower device's index into its name."""
    found = attributes(data, 0)
    local = found.get(IFLA_VXLAN_LOCAL) or found.get(IFLA_VXLAN_LOCAL6)
    if local is not None and not any(local):
        local = None
    return Vxlan(
        _number(found.get(IFLA_VXLAN_ID)),
        names.get(_number(found.get(IFLA_VXLAN_LINK))),
        local,
        int.from_bytes(found.get(IFLA_VXLAN_PORT, b"")),
        any(found.get(IFLA_VXLAN_LEARNING, b"")),
        IFLA_VXLAN_GBP in found,
    )


class AddressInfo(NamedTuple):
    """An address as the kernel reports it."""

    ifindex: int
    prefix: Prefix
    flags: int


def read_address(body: bytes) -> AddressInfo | None:
    """RTM_NEWADDR, RTM_DELADDR; None for a family that we do not know."""
    kind, length, short_flags, _scope, index = IFADDR.unpack_from(body)
    if kind not in (AF_INET, AF_INET6):
        return None
    found = attributes(body, 8)
    address = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
    if address is None:
        return None
    flags = _number(found[IFA_FLAGS]) if IFA_FLAGS in found else short_flags
    return AddressInfo(index, Prefix(address, length), flags)


class NeighbourInfo(NamedTuple):
    """A neighbour or FDB entry as the kernel reports it."""

    family: int
    ifindex: int
    state: int
    flags: int
    address: Address
    mac: Mac


NEIGHBOURS = Table("BxxxiHBx", (), (NDA_DST, NDA_LLADDR))
"""Rows: the fields of NeighbourInfo, and one more."""


def read_neighbour(body: bytes) -> NeighbourInfo:
    """RTM_NEWNEIGH, RTM_DELNEIGH; `address` and `mac` are empty when absent."""
    return NeighbourInfo._make(NEIGHBOURS.read_one(body)[:-1])


class RouteInfo(NamedTuple):
    """A route as the kernel reports it."""

    destination: Prefix
    table: int
    protocol: int
    type: int
    ifindex: int
    """The output device; 0 = several or none."""
    gateway: Address | None
    onlink: bool
    metric: int
    nexthop: int
    source: Address | None
    """The source address that the kernel prefers on this route."""
    extra: bytes
    """Everything about it that is neither said above nor standard."""


_PLAIN_ROUTE_ATTRS = frozenset(
    (RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_CACHEINFO, RTA_TABLE, RTA_PREF, RTA_NH_ID)
)


ROUTES = Table(
    "BBBBBBBBI",
    (RTA_TABLE, RTA_OIF, RTA_PRIORITY, RTA_NH_ID),
    (RTA_DST, RTA_GATEWAY, RTA_PREFSRC),
    _PLAIN_ROUTE_ATTRS,
)
ROUTE_LENGTH, ROUTE_DEVICE, ROUTE_NEXTHOP = 1, 10, 12
"""Where a row has the destination's length, the output device and the nexthop object."""
what_is_usual = itemgetter(3, 5, 6, 7, 9, 10, 16)
pick_usual = itemgetter(1, 11, 12, 13)
"""Of the row of a usual route: length, metric or b"", nexthop object, destination."""


def usual_route(index: int) -> Row:
    """What such a row has: TOS, protocol, scope, type, table, device, nothing odd."""
    return 0, ROUTE_PROTOCOL, RT_SCOPE_UNIVERSE, RTN_UNICAST, RT_TABLE_MAIN, index, b""


def read_route(body: bytes) -> RouteInfo | None:
    """RTM_NEWROUTE, RTM_DELROUTE; None for a family that we do not know."""
    return route_of(ROUTES.read_one(body))


def route_of(row: Row) -> RouteInfo | None:
    """The same from a row of a dump."""
    (kind, length, _src, tos, short_table, protocol, scope, type_, flags,
     table, ifindex, metric, nexthop, destination, gateway, source, odd) = row  # fmt: skip
    if kind not in (AF_INET, AF_INET6):
        return None
    extra = b""
    if odd:
        attrs = attributes(odd, 12)
        extra = b"".join(attr(k, attrs[k]) for k in sorted(attrs.keys() - _PLAIN_ROUTE_ATTRS))
    if tos or scope != RT_SCOPE_UNIVERSE or type_ != RTN_UNICAST:
        extra += bytes((tos, scope, type_))
    return RouteInfo(
        Prefix(destination or bytes(4 if kind == AF_INET else 16), length),
        table or short_table,
        protocol,
        type_,
        ifindex or 0,
        gateway or None,
        flags & RTNH_F_ONLINK != 0,
        metric or 0,
        nexthop or 0,
        source or None,
        extra,
    )


def is_direct(body: bytes, index: int) -> bool:
    """Whether an answer to `codec.route_get` says: over this device, without a gateway."""
    if len(body) < RTMSG.size or body[7] != RTN_UNICAST:  # the broadcast address, say
        return False
    found = attributes(body, RTMSG.size)
    return _number(found.get(RTA_OIF)) == index and RTA_GATEWAY not in found and RTA_VIA not in found


class NexthopInfo(NamedTuple):
    """A nexthop object as the kernel reports it."""

    number: int
    ifindex: int
    gateway: Address | None
    protocol: int
    onlink: bool


NEXTHOPS = Table("xxBxI", (NHA_ID, NHA_OIF), (NHA_GATEWAY,))


def read_nexthop(body: bytes) -> NexthopInfo:
    """RTM_NEWNEXTHOP, RTM_DELNEXTHOP."""
    return nexthop_of(NEXTHOPS.read_one(body))


def nexthop_of(row: Row) -> NexthopInfo:
    """The same from a row of a dump."""
    protocol, flags, number, ifindex, gateway, _odd = row
    return NexthopInfo(number or 0, ifindex or 0, gateway or None, protocol, flags & RTNH_F_ONLINK != 0)


def read_error(body: bytes) -> tuple[int, str]:
    """NLMSG_ERROR -> (errno, the kernel's own words or ""); errno 0 is an acknowledgement.

    With NETLINK_CAP_ACK the request is not repeated in the answer, so extended attributes follow its header.
    """
    (code,) = struct.unpack_from("=i", body)
    words = attributes(body, 20).get(1, b"") if len(body) > 20 else b""
    return -code, words.rstrip(b"\0").decode("utf-8", "replace")


def _number(payload: bytes | None) -> int:
    return int.from_bytes(payload, sys.byteorder) if payload else 0
