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

_IPV4 = struct.Struct("!H14xI")
"""Version, header length and TOS; destination."""


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
    unpack = _IPV4.unpack_from
    members: list[memoryview] = []
    last: tuple[int, int] | None = None
    target: Target = ("", 0)
    tos = size = left = 0
    for packet in packets:
        length = len(packet)
        way = unpack(packet) if length >= IPV4_BYTES else None
        if way is None or way != last:
            found, tos = _target_of(packet, table)
            if found is None:
                unreachable.append(packet)
                last = None
                continue
            target = found
            if not departures or (target, tos) != departures[-1][1:]:
                left = 0
            # A packet like the last one needs no look-up; only IPv4 is known by these bytes.
            last = way if packet[0] >> 4 == 4 else None
        if left < length or length > size:
            members = []
            departures.append(Departure(members, target, tos))
            size, left = length, MAX_BYTES
        members.append(packet)
        # A shorter one ends it, and so does the last one that the kernel takes.
        left = left - length if length == size and len(members) < segments else 0
    return Outbound(departures, unreachable)


def _target_of(packet: memoryview, table: Table) -> tuple[Target | None, int]:
    """(where it goes, TOS); None if nowhere."""
    if len(packet) >= IPV4_BYTES and packet[0] >> 4 == 4:
        return table.target(4, int.from_bytes(packet[16:20])), packet[1]
    if len(packet) >= IPV6_BYTES and packet[0] >> 4 == 6:
        return table.target(16, int.from_bytes(packet[24:40])), traffic_class(packet)
    return None, 0
