"""Small packets for probes, as bytes: ICMP echo and UDP in either family, wrapped for VXLAN. Pure.

Sources: RFC 791, 792, 768, 8200, 4443, 7348.
"""

import struct
from typing import NamedTuple

from flannelpy.model.address import Address, Mac

ECHO = {4: (8, 0), 16: (128, 129)}
"""By the bytes of an address: the ICMP types of request and reply."""
HEADER = {4: 20, 16: 40}
"""By the same: bytes of the IP header."""
HOP_LIMIT = {4: (0, 2), 16: (41, 52)}
"""By the same: level and name of the socket option, and of ancillary data (IP_TTL, IPV6_HOPLIMIT)."""
TIME_EXCEEDED = {4: 11, 16: 3}
"""By the same: the ICMP type."""
_TIMESTAMP = (13, 14)
_DAY = 86_400_000
_ICMP, _UDP, _ICMP6 = 1, 17, 58
_ETHERTYPE = {4: 0x0800, 16: 0x86DD}
_VXLAN = struct.Struct("!II")
_VXLAN_HAS_VNI = 0x08000000
_V4 = struct.Struct("!BBHHHBBH4s4s")
_V6 = struct.Struct("!IHBB16s16s")


class Echo(NamedTuple):
    """An ICMP echo request or reply."""

    source: Address
    target: Address
    is_reply: bool
    number: int
    """Identifier and sequence number as one number of 32 bits."""


class Seen(NamedTuple):
    """One packet that passed a device."""

    at: float
    """Seconds since 1970."""
    device: str
    outgoing: bool
    packet: bytes
    """From its IP header on."""


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of whole data."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def icmp_echo(width: int, number: int, size: int) -> bytes:
    """An echo request without its IP header; `size` is that of the IP packet. ICMPv6: the kernel's sum."""
    body = struct.pack("!BBHI", ECHO[width][0], 0, 0, number) + bytes(max(0, size - HEADER[width] - 8))
    if width == 16:
        return body
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def number_asked(width: int, data: bytes) -> int | None:
    """The number of the echo request that an ICMP message replies to, or whose time it says was exceeded."""
    if len(data) >= 8 and data[0] == ECHO[width][1]:
        return int.from_bytes(data[4:8])
    start = 8 + HEADER[width]
    if len(data) >= start + 8 and data[0] == TIME_EXCEEDED[width] and data[start] == ECHO[width][0]:
        return int.from_bytes(data[start + 4 : start + 8])
    return None


def icmp_timestamp(number: int, now: float) -> bytes:
    """A timestamp request (RFC 792) without its IP header; `now` in seconds since 1970."""
    body = struct.pack("!BBHIIII", _TIMESTAMP[0], 0, 0, number, int(now * 1000) % _DAY, 0, 0)
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def read_timestamp(data: bytes, number: int, now: float) -> float | None:
    """Seconds that the clock of the sender is ahead; None if this is not the reply with that number.

    It tells milliseconds since midnight UTC, so whole days are not seen.
    """
    if len(data) < 20 or data[0] != _TIMESTAMP[1] or int.from_bytes(data[4:8]) != number:
        return None
    received = int.from_bytes(data[12:16])
    if received >= _DAY:  # of another kind, says its highest bit
        return None
    ahead = (received - int(now * 1000)) % _DAY
    return (ahead - _DAY if ahead > _DAY / 2 else ahead) / 1000


def echo_packet(source: Address, target: Address, number: int, size: int = 64) -> bytes:
    """A whole IP packet with an echo request."""
    width = len(target)
    body = icmp_echo(width, number, size)
    if width == 16:
        body = body[:2] + struct.pack("!H", checksum(_pseudo(source, target, _ICMP6, body))) + body[4:]
    return ip_packet(source, target, _ICMP if width == 4 else _ICMP6, body)


def udp_packet(source: Address, target: Address, ports: tuple[int, int], data: bytes) -> bytes:
    """A whole IP packet with a datagram, its checksum made here."""
    head = struct.pack("!HHHH", *ports, 8 + len(data), 0)
    total = checksum(_pseudo(source, target, _UDP, head + data)) or 0xFFFF
    return ip_packet(source, target, _UDP, head[:6] + struct.pack("!H", total) + data)


def ip_packet(source: Address, target: Address, protocol: int, body: bytes, options: bytes = b"") -> bytes:
    """An IP packet; `options` are those of IPv4, in words of 4 bytes."""
    if len(target) == 16:
        return _V6.pack(6 << 28, len(body), protocol, 64, source, target) + body
    length = 20 + len(options)
    words = 0x40 | length // 4
    head = _V4.pack(words, 0, length + len(body), 0, 0x4000, 64, protocol, 0, source, target)
    total = checksum(head + options)
    return head[:10] + struct.pack("!H", total) + head[12:] + options + body


def vxlan(vni: int, target: Mac, source: Mac, packet: bytes) -> bytes:
    """The payload of the outer datagram: VXLAN header, Ethernet header, packet."""
    kind = _ETHERTYPE[4 if packet[0] >> 4 == 4 else 16]
    return _VXLAN.pack(_VXLAN_HAS_VNI, vni << 8) + target + source + struct.pack("!H", kind) + packet


def unwrap_vxlan(data: bytes) -> tuple[int, Mac, bytes] | None:
    """(VNI, source MAC, packet); None if it is none."""
    if len(data) < 22:
        return None
    flags, vni = _VXLAN.unpack_from(data)
    return (vni >> 8, data[14:20], data[22:]) if flags & _VXLAN_HAS_VNI else None


def read_udp(packet: bytes) -> tuple[Address, Address, int, int, bytes] | None:
    """(source, target, source port, target port, data) of an IP packet; None if it is another one."""
    found = _read_ip(packet)
    if found is None or found[2] != _UDP or len(found[3]) < 8:
        return None
    source, target, _protocol, body = found
    return source, target, *struct.unpack_from("!HH", body), body[8:]


def read_echo(packet: bytes) -> Echo | None:
    """An echo in an IP packet; None if it is another one."""
    found = _read_ip(packet)
    if found is None or found[2] not in (_ICMP, _ICMP6) or len(found[3]) < 8:
        return None
    source, target, _protocol, body = found
    kinds = ECHO[len(source)]
    if body[0] not in kinds:
        return None
    return Echo(source, target, body[0] == kinds[1], int.from_bytes(body[4:8]))


def addresses(packet: bytes) -> tuple[Address, Address] | None:
    """(source, target) of an IP packet; None if it is none."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        return packet[12:16], packet[16:20]
    return (packet[8:24], packet[24:40]) if version == 6 and len(packet) >= 40 else None


def _read_ip(packet: bytes) -> tuple[Address, Address, int, bytes] | None:
    """(source, target, protocol, body); None for fragments behind the first, extension headers, other."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        length = (packet[0] & 15) * 4
        if length < 20 or int.from_bytes(packet[6:8]) & 0x1FFF:
            return None
        return packet[12:16], packet[16:20], packet[9], packet[length:]
    if version == 6 and len(packet) >= 40:
        return packet[8:24], packet[24:40], packet[6], packet[40:]
    return None


def _pseudo(source: Address, target: Address, protocol: int, body: bytes) -> bytes:
    if len(target) == 4:
        return source + target + struct.pack("!BBH", 0, protocol, len(body)) + body
    return source + target + struct.pack("!II", len(body), protocol) + body
