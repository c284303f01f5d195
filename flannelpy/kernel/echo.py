"""ICMP echo requests (RFC 792, RFC 4443) over raw sockets, for probes of peers. Needs CAP_NET_RAW.

A filter lets in the answers to us alone: a host that pings all day wakes nobody here. Packets may not be
fragmented, and the kernel's idea of the path's MTU is not asked, so that a lost one says something.
"""

import asyncio
import os
import socket
import struct

from flannelpy.model import packet
from flannelpy.model.address import Address

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_SO_ATTACH_FILTER = 26
_HEADER = struct.Struct("!BBHHH")
"""Type, code, checksum, identifier, sequence number."""


class Echo:
    """Both families' sockets; PermissionError without the privilege. To be used inside of a running loop."""

    def __init__(self) -> None:
        self._identifier = int.from_bytes(os.urandom(2))
        self._sequence = 0
        self._waiting: dict[tuple[Address, int], asyncio.Future[float]] = {}
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

    async def ask(self, address: Address, size: int, seconds: float) -> float | None:
        """The round trip time of a packet of `size` bytes, IP header and all; None if nothing comes back."""
        loop = asyncio.get_running_loop()
        width = len(address)
        one = self._sockets.get(width)
        if one is None:
            return None
        self._sequence = (self._sequence + 1) & 0xFFFF
        key = (address, self._sequence)
        future: asyncio.Future[float] = loop.create_future()
        self._waiting[key] = future
        try:
            began = loop.time()
            data = packet.icmp_echo(width, self._identifier << 16 | self._sequence, size)
            one.sendto(data, (socket.inet_ntop(one.family, address), 0))
            async with asyncio.timeout(seconds):
                return await future - began
        except (OSError, TimeoutError):  # no route, larger than the device's MTU, no buffer: no answer
            return None
        finally:
            del self._waiting[key]

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
        """Let in echo replies with our identifier. An IPv4 socket gets the IP header too."""
        import ctypes

        load_byte, load_half, equal, result, length = 0x50, 0x48, 0x15, 0x06, 0xB1
        start = [(length, 0, 0, 0)] if width == 4 else [(0x01, 0, 0, 0)]  # X = where ICMP begins
        lines = [
            *start,
            (load_byte, 0, 0, 0),
            (equal, 0, 3, packet.ECHO[width][1]),
            (load_half, 0, 0, 4),
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
                data, sender = one.recvfrom(64)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about one of ours; its absence is the answer
            start = (data[0] & 0xF) * 4 if width == 4 and data else 0
            if len(data) < start + _HEADER.size:
                continue
            kind, _code, _sum, identifier, sequence = _HEADER.unpack_from(data, start)
            if (kind, identifier) != (packet.ECHO[width][1], self._identifier):
                continue
            address = socket.inet_pton(one.family, sender[0].partition("%")[0])
            future = self._waiting.get((address, sequence))
            if future is not None and not future.done():
                future.set_result(now)
