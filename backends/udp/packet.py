"""What stands in an IP packet: checksums, ECN marks, and the ICMP errors that we answer with. Pure.

A packet is a memoryview that begins with its IP header. Sources: RFC 791, 792, 1071, 1122 (3.2.2), 1812
(4.3.2.8), 4443 (2.4), 6040 (4.2), 8200.
"""

import struct

from flannelpy.model.address import Address

ECN_MASK = 3
ECT_1, ECT_0, CONGESTED = 1, 2, 3
"""The values of the ECN field (RFC 3168); 0 = the sender does not understand them."""

IPV4_BYTES, IPV6_BYTES = 20, 40
TCP, UDP = 6, 17
_ICMP, _ICMP6 = 1, 58
_ERRORS = frozenset((3, 4, 5, 11, 12))
"""ICMP types that report an error: never answered by another one."""
_ERROR_TTL = 64
_MIN_IPV6_MTU = 1280

UNREACHABLE, TOO_BIG = "unreachable", "too big"
"""What an ICMP error says: there is no way to that subnet; the packet is larger than the way allows."""

_MEANINGS = {
    4: {UNREACHABLE: (3, 0), TOO_BIG: (3, 4)},
    16: {UNREACHABLE: (1, 0), TOO_BIG: (2, 0)},
}
"""Width of the family's addresses -> meaning -> (type, code)."""


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum of the 16-bit words in ones' complement, 0..65535 (RFC 1071); an odd last byte counts as high.

    2**16 is 1 modulo 65535, so the whole number modulo 65535 is the sum of its digits: one step instead of
    a loop over the words.
    """
    number = int.from_bytes(data) << (8 if len(data) % 2 else 0)
    return number % 65535 or (65535 if number else 0)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The Internet checksum of data whose own checksum field is zero."""
    return ~ones_sum(data) & 0xFFFF


def traffic_class(packet: memoryview) -> int:
    """DSCP and ECN: the TOS byte of IPv4, the traffic class of IPv6."""
    if packet[0] >> 4 == 6:
        return (packet[0] << 4 | packet[1] >> 4) & 0xFF
    return packet[1]


def take_over_mark(packet: memoryview, outer: int) -> bool:
    """Bring the outer header's ECN mark into the packet; False if it must be dropped (RFC 6040, figure 4).

    Dropped is what met congestion and whose sender does not understand marks: the loss is the message. The
    DSCP stays the inner one: the underlay may have rewritten the outer one for its own purposes (RFC 2983).
    """
    inner = traffic_class(packet)
    mark = inner & ECN_MASK
    if outer == CONGESTED:
        if mark == 0:
            return False
        mark = CONGESTED
    elif outer == ECT_1 and mark == ECT_0:
        mark = ECT_1
    _set_traffic_class(packet, (inner & ~ECN_MASK) | mark)
    return True


def _set_traffic_class(packet: memoryview, value: int) -> None:
    """Write it; the IPv4 header's checksum follows (RFC 1624), right or wrong as it was."""
    if packet[0] >> 4 == 6:
        packet[0] = 0x60 | value >> 4
        packet[1] = (value & 0xF) << 4 | (packet[1] & 0xF)
        return
    total = (~int.from_bytes(packet[10:12]) & 0xFFFF) + (value - packet[1]) % 0xFFFF
    packet[1] = value
    packet[10:12] = (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2)


def icmp_error(packet: memoryview, source: Address, meaning: str, mtu: int = 0) -> bytes | None:
    """The ICMP error that tells the packet's sender; None where the RFCs forbid one.

    `source` is our address of the packet's family, `mtu` what fits (TOO_BIG only).
    """
    if len(source) == 4:
        return _icmp4_error(packet, source, meaning, mtu)
    return _icmp6_error(packet, source, meaning, mtu)


def _icmp4_error(packet: memoryview, source: Address, meaning: str, mtu: int) -> bytes | None:
    header_bytes = (packet[0] & 0xF) * 4
    if len(packet) < header_bytes or header_bytes < IPV4_BYTES:
        return None
    fragment = int.from_bytes(packet[6:8])
    sender, destination = bytes(packet[12:16]), bytes(packet[16:20])
    if fragment & 0x1FFF or not _answerable(sender) or destination[0] >= 224:
        return None
    if meaning == TOO_BIG and not fragment & 0x4000:
        return None
    if packet[9] == _ICMP and (len(packet) <= header_bytes or packet[header_bytes] in _ERRORS):
        return None
    kind, code = _MEANINGS[4][meaning]
    # As much as a later RFC allows (1812): the whole stays within 576 bytes.
    body = struct.pack("!BBHHH", kind, code, 0, 0, mtu) + bytes(packet[: 576 - IPV4_BYTES - 8])
    body = body[:2] + checksum(body).to_bytes(2) + body[4:]
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0xC0, IPV4_BYTES + len(body), 0, 0, _ERROR_TTL, _ICMP, 0, source, sender
    )
    return head[:10] + checksum(head).to_bytes(2) + head[12:] + body


def _icmp6_error(packet: memoryview, source: Address, meaning: str, mtu: int) -> bytes | None:
    if len(packet) < IPV6_BYTES:
        return None
    sender, destination = bytes(packet[8:24]), bytes(packet[24:40])
    if sender[0] == 0xFF or not any(sender) or (destination[0] == 0xFF and meaning != TOO_BIG):
        return None
    # Error types are below 128. Behind an extension header it cannot be told: better silent than a storm.
    if packet[6] == _ICMP6 and (len(packet) <= IPV6_BYTES or packet[IPV6_BYTES] < 128):
        return None
    if packet[6] not in (TCP, UDP, _ICMP6):
        return None
    kind, code = _MEANINGS[16][meaning]
    body = struct.pack("!BBHI", kind, code, 0, mtu) + bytes(packet[: _MIN_IPV6_MTU - IPV6_BYTES - 8])
    pseudo = source + sender + struct.pack("!II", len(body), _ICMP6)
    body = body[:2] + checksum(pseudo + body).to_bytes(2) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), _ICMP6, _ERROR_TTL) + source + sender + body


def _answerable(sender: bytes) -> bool:
    """Whether an IPv4 source names one host (RFC 1122: not zero, loopback, multicast, class E)."""
    return sender[0] not in (0, 127) and sender[0] < 224
