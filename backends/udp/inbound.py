"""From the wire to the TUN: what is let in, and which packets are written as one. Pure; batches in and out.

The kernel delivers a batch of datagrams of one sender and one size (UDP_GRO; the last may be shorter). Each
carries one packet. A train of TCP or UDP packets that a NIC or the kernel would have merged (GRO) is written
as one packet, with a virtio header that says how to cut it up again: what is seen then is what arrived. Only
the inner checksum is made anew, for the outer one, which the kernel has verified, covered the packet.

The train is the hot path, and one subtraction decides on each of its packets: the headers of two neighbours
in a bulk transfer, as numbers, differ by exactly one step (IP ID + 1, hence IP checksum - 1; sequence number
+ payload). All else, wrap-arounds and a shorter last packet too, is looked at field by field.
"""

import struct
from collections import Counter
from collections.abc import Container
from functools import lru_cache
from typing import NamedTuple

from flannelpy.backends.udp.packet import (
    CONGESTED,
    ECN_MASK,
    ECT_1,
    IPV4_BYTES,
    IPV6_BYTES,
    TCP,
    UDP,
    checksum,
    ones_sum,
    take_over_mark,
)
from flannelpy.backends.udp.table import Spans

_VIRTIO = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr in host order: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
VIRTIO_BYTES = _VIRTIO.size
PLAIN = bytes(VIRTIO_BYTES)
"""The virtio header of a packet that is finished."""
_NEEDS_CSUM = 1
_GSO = {(4, TCP): 1, (6, TCP): 4, (4, UDP): 5, (6, UDP): 5}

_IPV4 = struct.Struct("!BxH8xI")
"""Version and header length, total length, source."""
_IPV4_DF = 0x4000
_UDP_BYTES = 8
MAX_SEGMENTS = 128
"""More datagrams than the kernel delivers at once (UDP_GRO_CNT_MAX is 64)."""
_ACK = 0x10
_AT_END = 0x09
"""PSH and FIN: only the last packet of a train may have them."""
_NEVER = 0xA6
"""CWR, URG, RST, SYN: a packet with one of them stays alone. (ECE is the same in all or they differ.)"""

MERGEABLE = frozenset((TCP, UDP))
Part = bytes | memoryview
Write = list[Part]
"""What one `writev` to the TUN takes: a virtio header, then the packet in pieces."""


class Shape(NamedTuple):
    """Where things stand in the headers of one kind of packet, read as one number of `header` bytes."""

    version: int
    protocol: int
    l3: int
    """Bytes of the IP header."""
    header: int
    """Bytes of both headers."""
    keep: int
    """Mask without the TCP or UDP checksum."""
    rigid: int
    """Mask of what is the same in all packets of a train."""
    required: int
    """Mask of what may not be all zero: UDP's checksum, for UDP without one must stay so. 0 = no matter."""
    id_step: int
    """What one more IP ID adds to the number."""
    sequence: int
    """Shift of the sequence number; 0 for UDP, which has none."""


def sort_in(
    data: bytes,
    segment: int,
    spans: Spans | None,
    tos: int,
    drops: Counter[str],
    merge: Container[int] = MERGEABLE,
) -> list[Write]:
    """One batch of datagrams -> what to write; each one that is not let in is counted by its reason.

    `segment` is the size of all datagrams but the last, `tos` is the outer one, `spans` says what the sender
    may have as inner source (None = anything), `merge` which protocols are merged.
    """
    doomed: frozenset[int] = frozenset()
    if tos & ECN_MASK in (ECT_1, CONGESTED):
        data, doomed = _take_over_marks(data, segment, tos & ECN_MASK)
    view = memoryview(data)
    writes: list[Write] = []
    start, length = 0, len(data)
    while start < length:
        end = min(start + segment, length)
        size, reason = _admit(data, start, end, spans)
        if reason or start in doomed:
            drops[f"drop_{reason or 'congestion'}"] += 1
            start = end
            continue
        if end < length and size == segment:
            shape = _shape_of(data, start, end)
            if shape is not None and shape.protocol in merge:
                parts, start = _gather(data, view, start, segment, shape)
                writes.append(parts)
                continue
        writes.append([PLAIN, view[start : start + size]])
        start = end
    return writes


def _admit(data: bytes, start: int, end: int, spans: Spans | None) -> tuple[int, str]:
    """(bytes of the packet, why it is not let in). What follows a packet in its datagram is cut off."""
    length = end - start
    version = data[start] >> 4 if length else 0
    if version == 4 and length >= IPV4_BYTES:
        first, size, source = _IPV4.unpack_from(data, start)
        width = 4
        if first < 0x45 or size < (first & 0xF) * 4:
            return 0, "malformed"
    elif version == 6 and length >= IPV6_BYTES:
        size = IPV6_BYTES + int.from_bytes(data[start + 4 : start + 6])
        source = int.from_bytes(data[start + 8 : start + 24])
        width = 16
    else:
        return 0, "malformed"
    if size > length:
        return 0, "malformed"
    if spans is None:
        return size, ""
    for kind, first, last in spans:
        if first <= source <= last and kind == width:
            return size, ""
    return 0, "spoofed"


def _take_over_marks(data: bytes, segment: int, outer: int) -> tuple[bytes, frozenset[int]]:
    """The batch with the outer ECN mark in each packet, and where those begin that must be dropped."""
    marked = bytearray(data)
    view = memoryview(marked)
    doomed = set()
    for start in range(0, len(data), segment):
        packet = view[start : start + segment]
        if len(packet) >= IPV4_BYTES and not take_over_mark(packet, outer):
            doomed.add(start)
    return bytes(marked), frozenset(doomed)


# --- trains ----------------------------------------------------------------------------------------------


@lru_cache(64)
def _shape(version: int, protocol: int, l4: int) -> Shape:
    l3 = IPV4_BYTES if version == 4 else IPV6_BYTES
    header = l3 + l4

    def mask(offset: int, value: int, width: int = 2) -> int:
        return value << (header - offset - width) * 8

    everything = (1 << header * 8) - 1
    tcp = protocol == TCP
    sum_field = mask(l3 + (16 if tcp else 6), 0xFFFF)
    loose = sum_field | mask(2 if version == 4 else 4, 0xFFFF)
    if version == 4:
        loose |= mask(4, 0xFFFF) | mask(10, 0xFFFF)
    loose |= (mask(l3 + 4, 0xFFFFFFFF, 4) | mask(l3 + 13, _AT_END, 1)) if tcp else mask(l3 + 4, 0xFFFF)
    return Shape(
        version,
        protocol,
        l3,
        header,
        everything & ~sum_field,
        everything & ~loose,
        0 if tcp else sum_field,
        mask(4, 1) - mask(10, 1) if version == 4 else 0,
        (header - l3 - 8) * 8 if tcp else 0,
    )


def _shape_of(data: bytes, start: int, end: int) -> Shape | None:
    """The shape of a packet that others may follow; None if it stays alone."""
    version = data[start] >> 4
    if version == 4:
        # No options, no fragment, a right checksum: it is made anew for the whole train.
        if data[start] != 0x45 or int.from_bytes(data[start + 6 : start + 8]) & ~_IPV4_DF:
            return None
        if ones_sum(data[start : start + IPV4_BYTES]) != 0xFFFF:
            return None
        protocol, l4 = data[start + 9], start + IPV4_BYTES
    else:
        protocol, l4 = data[start + 6], start + IPV6_BYTES
    if protocol == TCP and end - l4 >= 20:
        header = (data[l4 + 12] >> 4) * 4
        if data[l4 + 13] & (_NEVER | _AT_END | _ACK) != _ACK or header < 20 or header >= end - l4:
            return None
        return _shape(version, TCP, header)
    if protocol == UDP and end - l4 > _UDP_BYTES:
        if int.from_bytes(data[l4 + 4 : l4 + 6]) != end - l4 or not any(data[l4 + 6 : l4 + 8]):
            return None
        return _shape(version, UDP, _UDP_BYTES)
    return None


def _gather(data: bytes, view: memoryview, start: int, segment: int, shape: Shape) -> tuple[Write, int]:
    """The packet at `start` with all that follow it, as one write; and where the next one begins."""
    header, keep, required = shape.header, shape.keep, shape.required
    payload, limit = segment - header, len(data) - segment
    steps = _steps(data, start, payload, shape)
    number = int.from_bytes
    previous = number(data[start : start + header]) & keep
    parts: Write = [PLAIN, b"", view[start + header : start + segment]]
    last, position, length = start, start + segment, len(data)
    ends = False
    while position < length and not ends:
        raw = number(data[position : position + header])
        current = raw & keep
        if current - previous not in steps or position > limit or (required and not raw & required):
            end = min(position + segment, length)
            if not _joins(data, last, position, end, shape, payload):
                break
            closes = shape.protocol == TCP and data[position + shape.l3 + 13] & _AT_END
            ends = end - position < segment or bool(closes)
        parts.append(view[position + header : position + segment])
        previous, last = current, position
        position += segment
    if last == start:
        return [PLAIN, view[start : start + segment]], position
    parts[0], parts[1] = _headers(data, start, last, min(position, length), shape, len(parts) - 2, payload)
    return parts, position


def _steps(data: bytes, start: int, payload: int, shape: Shape) -> tuple[int, ...]:
    """By what the headers' number may grow from packet to packet; nothing where a field could overflow."""
    step = 0
    if shape.sequence:
        sequence = start + shape.l3 + 4
        if int.from_bytes(data[sequence : sequence + 4]) + len(data) > 0xFFFFFFFF:
            return ()
        step = payload << shape.sequence
    if shape.version == 6:
        return (step,)
    identity, check = (int.from_bytes(data[start + at : start + at + 2]) for at in (4, 10))
    if identity + MAX_SEGMENTS > 0xFFFF or check < MAX_SEGMENTS:
        return ()
    if data[start + 6] & 0x40:
        return (step + shape.id_step, step)  # never fragmented: its ID means nothing (RFC 6864)
    return (step + shape.id_step,)


def _joins(data: bytes, last: int, start: int, end: int, shape: Shape, payload: int) -> bool:
    """Whether the packet at `start` continues the train whose last one begins at `last`, field by field."""
    header, l3 = shape.header, shape.l3
    size = end - start
    if not header < size <= header + payload:
        return False
    here, before = data[start : start + header], data[last : last + header]
    if (int.from_bytes(here) ^ int.from_bytes(before)) & shape.rigid:
        return False
    if shape.version == 4:
        step = (int.from_bytes(here[4:6]) - int.from_bytes(before[4:6])) & 0xFFFF
        in_turn = step == 1 or (step == 0 and here[6] & 0x40)
        if not in_turn or int.from_bytes(here[2:4]) != size or ones_sum(here[:l3]) != 0xFFFF:
            return False
    elif int.from_bytes(here[4:6]) != size - l3:
        return False
    field = int.from_bytes(here[l3 + 4 : l3 + 8])
    if shape.protocol == UDP:
        return field >> 16 == size - l3 and field & 0xFFFF != 0
    return field == (int.from_bytes(before[l3 + 4 : l3 + 8]) + payload) & 0xFFFFFFFF


def _headers(
    data: bytes, first: int, last: int, end: int, shape: Shape, count: int, payload: int
) -> tuple[bytes, bytes]:
    """The virtio header and the packet headers of a whole train."""
    l3, header, protocol = shape.l3, shape.header, shape.protocol
    size = header + (count - 1) * payload + (end - last - header)
    made = bytearray(data[first : first + header])
    if shape.version == 4:
        made[2:4] = size.to_bytes(2)
        made[10:12] = b"\0\0"
        made[10:12] = checksum(made[:l3]).to_bytes(2)
        addresses = made[12:20]
    else:
        made[4:6] = (size - l3).to_bytes(2)
        addresses = made[8:40]
    # The kernel finishes the checksum: in the field stands the sum of the pseudo header.
    pseudo = ones_sum(addresses + struct.pack("!II", size - l3, protocol)).to_bytes(2)
    if protocol == TCP:
        made[l3 + 13] |= data[last + l3 + 13] & _AT_END
        made[l3 + 16 : l3 + 18] = pseudo
    else:
        made[l3 + 4 : l3 + 6] = (size - l3).to_bytes(2)
        made[l3 + 6 : l3 + 8] = pseudo
    offset = 16 if protocol == TCP else 6
    gso = _GSO[shape.version, protocol]
    return _VIRTIO.pack(_NEEDS_CSUM, gso, header, payload, l3, offset), bytes(made)
