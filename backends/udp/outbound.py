"""From the TUN to the wire: which packets leave together. Pure; batches in, batches out.

The kernel hands us finished packets (no offloads are switched on for reading: to finish a packet costs
Python more than the kernel). Consecutive ones of one size for one peer leave in one call, which the kernel
cuts up again (UDP_SEGMENT); the last one of them may be shorter.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from flannelpy.backends.udp.packet import IPV4_BYTES, IPV6_BYTES, traffic_class
from flannelpy.backends.udp.table import Table, Target

MAX_SEGMENTS = 64
"""UDP_MAX_SEGMENTS of every kernel that has UDP_SEGMENT (include/linux/udp.h)."""
MAX_BYTES = 65507
"""The largest UDP payload over IPv4."""

_IPV4 = struct.Struct("!BB14xI")
"""Version and header length, TOS, destination."""


class Departure(NamedTuple):
    """Datagrams for one peer that leave in one call."""

    packets: list[memoryview]
    """One per datagram: all as long as the first one, only the last may be shorter."""
    target: Target
    tos: int
    """DSCP and ECN of the outer header, which are those of the packets (RFC 2983, RFC 6040)."""


class Outbound(NamedTuple):
    """What a batch comes to."""

    departures: list[Departure]
    unreachable: list[memoryview]
    """Packets for which there is no peer."""


def group(packets: Sequence[memoryview], table: Table, segments: int = MAX_SEGMENTS) -> Outbound:
    """Sort a batch, in its order, into departures of at most `segments` datagrams."""
    departures: list[Departure] = []
    unreachable: list[memoryview] = []
    unpack, lookup = _IPV4.unpack_from, table.target
    members: list[memoryview] = []
    last: Target | None = None
    last_tos = size = left = 0
    for packet in packets:
        length = len(packet)
        target: Target | None
        if length >= IPV4_BYTES and packet[0] >> 4 == 4:
            _version, tos, destination = unpack(packet)
            target = lookup(4, destination)
        elif length >= IPV6_BYTES and packet[0] >> 4 == 6:
            tos = traffic_class(packet)
            target = lookup(16, int.from_bytes(packet[24:40]))
        else:
            target, tos = None, 0
        if target is None:
            unreachable.append(packet)
            continue
        if target is last and tos == last_tos and length <= size and left >= length:
            members.append(packet)
            # A shorter one ends it, and so does the last one that the kernel takes.
            left = left - length if length == size and len(members) < segments else 0
            continue
        members = [packet]
        departures.append(Departure(members, target, tos))
        last, last_tos, size, left = target, tos, length, MAX_BYTES - length if segments > 1 else 0
    return Outbound(departures, unreachable)
