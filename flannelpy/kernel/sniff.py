"""Looks at packets on devices, at IP level, whatever the device: Ethernet, a tunnel, another overlay.

A classic BPF program in the kernel lets through what is asked for; the rest never wakes us.
"""

import ctypes
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence

from flannelpy.model.address import Address, Prefix
from flannelpy.model.packet import Seen

Line = tuple[int, int, int, int]
"""One instruction: code, jump if true, jump if false, constant (linux/filter.h)."""

_SO_ATTACH_FILTER, _SOL_PACKET, _PACKET_STATISTICS = 26, 263, 6
_ETH_P_ALL = 3
_IP_KINDS = (0x0800, 0x86DD)
_OUTGOING = 4
_BUFFER = 8 << 20
_LOAD_BYTE, _LOAD_WORD, _LOAD_HALF_X, _LOAD_HALF, _X_IP_LENGTH = 0x30, 0x20, 0x48, 0x28, 0xB1
_AND, _RIGHT, _EQUAL, _RETURN = 0x54, 0x74, 0x15, 0x06


class Sniffer:
    """Sockets on some devices, each with its program; `close` it. OSError: no privilege, no device."""

    def __init__(self, asked: Sequence[tuple[str, Sequence[Line]]]) -> None:
        self._sockets: dict[socket.socket, str] = {}
        try:
            for device, program in asked:
                self._sockets[_open(device, program)] = device
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give the sockets back."""
        for one in self._sockets:
            one.close()

    def packets(self, seconds: float) -> Iterator[Seen]:
        """What passes, for so long. In the order of arrival, per device."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for one in select.select(list(self._sockets), [], [], min(left, 1.0))[0]:
                packet, where = one.recvfrom(65535)
                if where[1] in _IP_KINDS:
                    yield Seen(time.time(), self._sockets[one], where[2] == _OUTGOING, packet)

    def dropped(self) -> int:
        """Packets that came faster than they were taken, since the last question."""
        found = 0
        for one in self._sockets:
            _packets, drops = struct.unpack("=II", one.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            found += drops
        return found


def udp_to(port: int) -> list[Line]:
    """Datagrams of either family to this port, without later fragments' tails."""
    return [
        (_LOAD_BYTE, 0, 0, 0),
        (_RIGHT, 0, 0, 4),
        (_EQUAL, 0, 5, 4),
        (_LOAD_BYTE, 0, 0, 9),
        (_EQUAL, 0, 8, 17),
        (_X_IP_LENGTH, 0, 0, 0),
        (_LOAD_HALF_X, 0, 0, 2),
        (_EQUAL, 4, 5, port),
        (_LOAD_BYTE, 0, 0, 6),
        (_EQUAL, 0, 3, 17),
        (_LOAD_HALF, 0, 0, 42),
        (_EQUAL, 0, 1, port),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]


def inside(network: Prefix) -> list[Line]:
    """IPv4 packets from or to a network; of IPv6 all."""
    mask = (0xFFFFFFFF << (32 - network.length)) & 0xFFFFFFFF
    base = network.first
    return [
        (_LOAD_BYTE, 0, 0, 0),
        (_RIGHT, 0, 0, 4),
        (_EQUAL, 0, 6, 4),
        (_LOAD_WORD, 0, 0, 12),
        (_AND, 0, 0, mask),
        (_EQUAL, 3, 0, base),
        (_LOAD_WORD, 0, 0, 16),
        (_AND, 0, 0, mask),
        (_EQUAL, 0, 1, base),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]


def everything() -> list[Line]:
    """All packets."""
    return [(_RETURN, 0, 0, 0xFFFF)]


def from_host(remote: Address) -> list[Line]:
    """Datagrams that one host sends."""
    at_protocol, at_source = (9, 12) if len(remote) == 4 else (6, 8)
    words = [int.from_bytes(remote[i : i + 4]) for i in range(0, len(remote), 4)]
    count = 2 + 2 * len(words)
    code: list[Line] = [(_LOAD_BYTE, 0, 0, at_protocol), (_EQUAL, 0, count - 1, 17)]
    for position, word in enumerate(words):
        code.append((_LOAD_WORD, 0, 0, at_source + 4 * position))
        code.append((_EQUAL, 0, count - 3 - 2 * position, word))
    return [*code, (_RETURN, 0, 0, 0xFFFF), (_RETURN, 0, 0, 0)]


def _open(device: str, program: Sequence[Line]) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)  # hears nothing before the filter stands
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    attach(one, program)
    one.bind((device, _ETH_P_ALL))
    return one


def attach(one: socket.socket, program: Sequence[Line]) -> None:
    """Let a socket hear only what the program returns something for."""
    data = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    one.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(data))
    )
