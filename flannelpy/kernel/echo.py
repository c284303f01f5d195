"""Probes of peers over raw sockets: ICMP echo requests (RFC 792, 4443) and refused datagrams. CAP_NET_RAW.

A filter lets in the answers to us alone: a host that pings all day wakes nobody here. Packets may not be
fragmented, and the kernel's idea of the path's MTU is not asked, so that a lost one says something.

A request to the next hop has a hop limit of one. A host that does not have the address itself would have to
forward it, and says "time exceeded" instead; that quotes the request.
"""

import asyncio
import errno
import os
import socket
import struct
from typing import Any, NamedTuple

from flannelpy.model import packet
from flannelpy.model.address import Address

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_SO_ATTACH_FILTER = 26
_CLOSED_PORT = 33434
"""traceroute's first: nobody listens there."""
_PAYLOAD = 56
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}


class _Request(NamedTuple):
    """That waits for its answer."""

    target: Address
    next_hop: bool
    answered_at: asyncio.Future[float]


class Echo:
    """Both families' sockets; PermissionError without the privilege. To be used inside of a running loop."""

    def __init__(self) -> None:
        self._identifier = int.from_bytes(os.urandom(2))
        self._sequence = 0
        self._waiting: dict[int, _Request] = {}
        """By the identifier and sequence number, as one number."""
        self._sockets: dict[int, socket.socket] = {}
        try:
            self._open(4, socket.AF_INET, socket.getprotobyname("icmp"))
            if socket.has_ipv6:
                self._open(16, socket.AF_INET6, socket.IPPROTO_ICMPV6)
        except OSError as error:
            if 4 not in self._sockets or isinstance(error, PermissionError):
                self.close()
                raise

    def close(self) -> None:
        """Give the sockets back."""
        loop = asyncio.get_running_loop()
        for one in self._sockets.values():
            loop.remove_reader(one)
            one.close()
        self._sockets.clear()

    async def ask(
        self, address: Address, size: int, seconds: float, *, next_hop: bool = False
    ) -> float | None:
        """The round trip time of a packet of `size` bytes, IP header and all; None if nothing comes back.

        `next_hop`: it goes no further, and what the next hop says about that counts as an answer.
        """
        loop = asyncio.get_running_loop()
        width = len(address)
        one = self._sockets.get(width)
        if one is None:
            return None
        self._sequence = (self._sequence + 1) & 0xFFFF
        number = self._identifier << 16 | self._sequence
        future: asyncio.Future[float] = loop.create_future()
        self._waiting[number] = _Request(address, next_hop, future)
        try:
            began = loop.time()
            data = packet.icmp_echo(width, number, size)
            limit = [(*packet.HOP_LIMIT[width], struct.pack("@i", 1))] if next_hop else []
            one.sendmsg([data], limit, 0, (socket.inet_ntop(one.family, address), 0))
            async with asyncio.timeout(seconds):
                return await future - began
        except (OSError, TimeoutError):  # no route, larger than the device's MTU, no buffer: no answer
            return None
        finally:
            del self._waiting[number]

    async def is_refused(self, address: Address, seconds: float, *, summed_here: bool = False) -> bool:
        """Whether the host says that a datagram came to a closed port.

        The checksum is left to the device, as for all that sockets send; or it is made here.
        """
        loop = asyncio.get_running_loop()
        try:
            one = _datagram(address, summed_here=summed_here)
        except OSError:
            return False
        heard = asyncio.Event()
        loop.add_reader(one, heard.set)
        try:
            async with asyncio.timeout(seconds):
                await heard.wait()
            return one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(one)
            one.close()

    def _open(self, width: int, family: socket.AddressFamily, protocol: int) -> None:
        one = socket.socket(family, socket.SOCK_RAW, protocol)
        self._sockets[width] = one
        one.setblocking(False)
        if width == 4:
            one.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        else:
            one.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        self._filter(one, width)
        asyncio.get_running_loop().add_reader(one, self._read, one, width)

    def _filter(self, one: socket.socket, width: int) -> None:
        """Let in echo replies with our identifier, and errors that quote it.

        An IPv4 socket gets the IP header, too.
        """
        import ctypes

        load_byte, load_half, equal, result, length = 0x50, 0x48, 0x15, 0x06, 0xB1
        start = [(length, 0, 0, 0)] if width == 4 else [(0x01, 0, 0, 0)]  # X = where ICMP begins
        lines = [
            *start,
            (load_byte, 0, 0, 0),
            (equal, 0, 2, packet.ECHO[width][1]),
            (load_half, 0, 0, 4),
            (equal, 3, 4, self._identifier),
            (equal, 0, 3, packet.TIME_EXCEEDED[width]),
            (load_half, 0, 0, 8 + packet.HEADER[width] + 4),
            (equal, 0, 1, self._identifier),
            (result, 0, 0, 0xFFFFFFFF),
            (result, 0, 0, 0),
        ]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
        one.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("@HP", len(lines), ctypes.addressof(program)),
        )

    def _read(self, one: socket.socket, width: int) -> None:
        now = asyncio.get_running_loop().time()
        for _number in range(100):
            try:
                data, sender = one.recvfrom(128)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about one of ours; its absence is the answer
            data = data[(data[0] & 0xF) * 4 if width == 4 and data else 0 :]
            request = self._waiting.get(packet.number_asked(width, data) or -1)
            if request is None or request.answered_at.done():
                continue
            is_reply = data[0] == packet.ECHO[width][1]
            answers = _address(sender) == request.target if is_reply else request.next_hop
            if answers:
                request.answered_at.set_result(now)


def _address(sender: Any) -> Address:
    """Of what `recvfrom` returns."""
    host = str(sender[0].partition("%")[0])
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def _datagram(target: Address, *, summed_here: bool) -> socket.socket:
    """A connected socket that has sent a datagram to a closed port. Raises OSError.

    `summed_here`: over a raw socket, so that nobody has to put a checksum in.
    """
    family, width = _FAMILY[len(target)], len(target)
    where = (socket.inet_ntop(family, target), _CLOSED_PORT)
    one = socket.socket(family, socket.SOCK_DGRAM)
    try:
        one.setblocking(False)
        one.connect(where)
        if summed_here:
            source, port = one.getsockname()[:2]
            whole = packet.udp_packet(
                socket.inet_pton(family, source), target, (port, _CLOSED_PORT), bytes(_PAYLOAD)
            )
            # The datagram socket keeps its port, and hears the error.
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
                raw.sendto(whole[packet.HEADER[width] :], (where[0], 0))
        else:
            one.send(bytes(_PAYLOAD))
    except OSError:
        one.close()
        raise
    return one
