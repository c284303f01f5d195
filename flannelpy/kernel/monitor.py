"""What the kernel announces about the objects that are ours, and about the uplink.

A notification is no order. It says what was seen: an object put or removed, or that something shook so much
that everything must be looked at afresh. netlink does not announce everything: routes and nexthops that die
with their device's carrier, with link down or with a deleted nexthop are silent, and a new MAC silently
empties the neighbours. So whatever happens to a device of ours, or to the uplink, counts as such a shake.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from flannelpy.kernel import codec, replies
from flannelpy.kernel.netlink import enlarge_receive_buffer
from flannelpy.kernel.replies import LinkInfo, RouteInfo
from flannelpy.model.kernel import (
    PROTOCOL_KERNEL,
    Appeared,
    DeviceAddress,
    FdbEntry,
    Item,
    Neighbour,
    Notice,
    Route,
    Scope,
    Shaken,
    Vanished,
    is_kernels_own,
)

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUPS = (1, 3, 5, 7, 9, 11, 32)
"""RTNLGRP_ LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, NEXTHOP."""
_SO_ATTACH_FILTER = 26
_READS = 500
"""Datagrams taken before other tasks get their turn."""


class View(NamedTuple):
    """What is needed to tell what a message is about."""

    scope: Scope
    ours: dict[int, str]
    """The devices in the scope that exist: index -> name."""
    links: dict[int, LinkInfo]
    """All links as last read."""
    link_now: Callable[[int], LinkInfo | None]
    """A link as it is at this moment; None = there is none of that index."""
    is_our_nexthop: Callable[[int], bool]
    route: Callable[[RouteInfo], Route]


class Monitor:
    """A socket in the kernel's multicast groups. `port` is that of our requests, whose echoes are no news."""

    def __init__(self, view: Callable[[], View], port: int) -> None:
        self._view = view
        self._port = port
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        enlarge_receive_buffer(self._socket)
        self._narrowed: frozenset[int] | None = None
        self._arrived = asyncio.Event()
        self._causes: list[str] = []
        self.narrow(())
        self._socket.bind((0, 0))
        for group in _GROUPS:
            with suppress(OSError):  # the nexthop group is younger than Linux 5.2
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def shake(self, cause: str) -> None:
        """Tell of something that the kernel does not announce."""
        self._causes.append(cause)
        self._arrived.set()

    def narrow(self, devices: Iterable[int]) -> None:
        """Let the kernel drop echoes, and neighbours of other devices: a busy host has thousands a second."""
        wanted = frozenset(devices)
        if wanted == self._narrowed:
            return
        self._narrowed = wanted
        import ctypes  # 5 ms, and not needed before the network stands

        program = ctypes.create_string_buffer(_filter(wanted, self._port))
        fprog = struct.pack("@HP", (len(program) - 1) // 8, ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)

    async def notices(self) -> AsyncGenerator[list[Notice], None]:
        """What was announced, as it comes, for ever."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._arrived.set)
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                found: list[Notice] = list(map(Shaken, self._causes))
                self._causes.clear()
                found += self._read()
                if found:
                    yield found
        finally:
            loop.remove_reader(self._socket)

    def _read(self) -> list[Notice]:
        found: list[Notice] = []
        view = self._view()
        for _number in range(_READS):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found.append(Shaken("notifications were lost"))
                continue
            for kind, _flags, _sequence, body in codec.messages(data):
                notice = read(view, kind, body)
                if notice is not None:
                    found.append(notice)
        return found


def _filter(devices: frozenset[int], port: int) -> bytes:
    """A classic BPF program over one netlink message (linux/filter.h): 0 = drop.

    It loads in network order, so what is in host order is compared turned round.
    """

    def turned(layout: str, value: int) -> int:
        return int.from_bytes(struct.pack(f"={layout}", value))

    load_word, load_half, equal, result = 0x20, 0x28, 0x15, 0x06
    count = len(devices)
    program = [
        (load_word, 0, 0, 12),  # nlmsg_pid
        (equal, 5 + count, 0, turned("I", port)),  # -> drop
        (load_half, 0, 0, 4),  # nlmsg_type
        (equal, 1, 0, turned("H", codec.RTM_NEWNEIGH)),
        (equal, 0, 3 + count, turned("H", codec.RTM_DELNEIGH)),  # otherwise -> keep
        (load_word, 0, 0, 20),  # ndm_ifindex
        *((equal, count - position + 1, 0, turned("I", index)) for position, index in enumerate(devices)),
        (result, 0, 0, 0),
        (result, 0, 0, 0),
        (result, 0, 0, 0xFFFFFFFF),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


_LINK = (codec.RTM_NEWLINK, codec.RTM_DELLINK)


def read(view: View, kind: int, body: bytes) -> Notice | None:
    """One message, or None if it is none of our business. Pure."""
    if kind in _LINK:
        return _link(view, body)
    if kind in (codec.RTM_NEWADDR, codec.RTM_DELADDR):
        return _address(view, body, gone=kind == codec.RTM_DELADDR)
    if kind in (codec.RTM_NEWNEIGH, codec.RTM_DELNEIGH):
        return _neighbour(view, body, gone=kind == codec.RTM_DELNEIGH)
    if kind in (codec.RTM_NEWROUTE, codec.RTM_DELROUTE):
        return _route(view, body, gone=kind == codec.RTM_DELROUTE)
    if kind in (codec.RTM_NEWNEXTHOP, codec.RTM_DELNEXTHOP):
        number = replies.read_nexthop(body).number
        if view.is_our_nexthop(number):
            what = "deleted" if kind == codec.RTM_DELNEXTHOP else "altered"
            return Shaken(f"nexthop object {number} was {what}")
    return None


def _link(view: View, body: bytes) -> Notice | None:
    """Compare the device as it is now with what we know: messages about our own doing come late."""
    info = replies.read_link(body)
    known = view.links.get(info.ifindex)
    name = known.name if known else info.name
    ours = info.ifindex in view.ours or info.name in view.scope.devices
    if not ours and view.scope.uplink not in (name, info.name):
        return _news_for_a_lost_uplink(view)
    what = f"device {name}" if ours else f"uplink {name}"
    now = view.link_now(info.ifindex)
    if now is None or known is None:
        if now is known:
            return None  # both: it came and went
        return Shaken(f"{what} {'was deleted' if now is None else 'appeared'}")
    for word, before, after in (
        ("name", known.name, now.name),
        ("MTU", known.mtu, now.mtu),
        ("MAC", known.mac, now.mac),
        ("state", known.up, now.up),
        ("carrier", known.running, now.running),
        ("attributes", known.vxlan, now.vxlan),
    ):
        # A TUN has a carrier while a forwarder has it open: of its end we hear otherwise.
        if before != after and not (word == "carrier" and now.kind == "tun"):
            return Shaken(f"the {word} of {what} changed")
    # Over before it was read: its plain routes died all the same, and nobody is told.
    if (known.up and not info.up) or (known.running and not info.running):
        return Shaken(f"{what} was down for a moment")
    return None


def _address(view: View, body: bytes, *, gone: bool) -> Notice | None:
    info = replies.read_address(body)
    if info is None:
        return None
    if info.ifindex in view.ours:
        if is_kernels_own(info.prefix):
            return None
        item = DeviceAddress(view.ours[info.ifindex], info.prefix)
        return _notice(item, gone)
    known = view.links.get(info.ifindex)
    if known is not None and known.name == view.scope.uplink and not is_kernels_own(info.prefix):
        return Shaken(f"an address of uplink {known.name} changed")
    return _news_for_a_lost_uplink(view)


def _neighbour(view: View, body: bytes, *, gone: bool) -> Notice | None:
    info = replies.read_neighbour(body)
    name = view.ours.get(info.ifindex)
    if name is None or not info.address or info.address[:1] == b"\xff":
        return None
    permanent = bool(info.state & codec.NUD_PERMANENT)
    item: FdbEntry | Neighbour
    if info.family == codec.AF_BRIDGE:
        item = FdbEntry(name, info.mac, info.address, (), permanent)
    else:
        item = Neighbour(name, info.address, info.mac, permanent)
    return _notice(item, gone)


def _route(view: View, body: bytes, *, gone: bool) -> Notice | None:
    info = replies.read_route(body)
    if info is None or info.table != codec.RT_TABLE_MAIN or info.protocol == PROTOCOL_KERNEL:
        return None
    if info.destination.length == 0:
        return _news_for_a_lost_uplink(view)
    if is_kernels_own(info.destination):
        return None
    inside = any(network.contains(info.destination) for network in view.scope.networks)
    if info.ifindex not in view.ours and not inside:
        return None
    item = view.route(info)
    return _notice(item, gone)


def _news_for_a_lost_uplink(view: View) -> Notice | None:
    """While the uplink is away, whatever appears may be the new one."""
    if any(link.name == view.scope.uplink for link in view.links.values()):
        return None
    return Shaken(f"there is no {view.scope.uplink}, and something changed that may replace it")


def _notice(item: Item, gone: bool) -> Notice:
    return Vanished(item) if gone else Appeared(item)
