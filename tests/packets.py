"""IP packets built byte by byte, and the kernel's cutting-up of merged ones, both slowly and plainly."""

import struct
from dataclasses import dataclass, field

from flannelpy.model.address import parse_address

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128


def internet_checksum(data: bytes | bytearray) -> int:
    """RFC 1071, word by word."""
    total = 0
    for offset in range(0, len(data), 2):
        total += int.from_bytes(data[offset : offset + 2].ljust(2, b"\0"))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Packet:
    """A TCP or UDP packet; its bytes carry right checksums unless told otherwise."""

    source: str = "10.5.2.9"
    destination: str = "10.5.1.7"
    protocol: int = 6
    payload: bytes = b"x" * 100
    sport: int = 40000
    dport: int = 80
    sequence: int = 1000
    ack: int = 77
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    tcp_options: bytes = b""
    tos: int = 0
    identity: int = 1
    fragment: int = 0x4000
    ttl: int = 63
    ip_options: bytes = b""
    bad_header: bool = False
    no_checksum: bool = False
    trailer: bytes = field(default=b"")
    """Behind the packet, in the same datagram."""

    def bytes(self) -> bytes:
        """The packet, without the trailer."""
        source, destination = parse_address(self.source), parse_address(self.destination)
        if self.protocol == 6:
            words = (5 + len(self.tcp_options) // 4) << 4
            head = struct.pack(
                "!HHIIBBHHH",
                *(
                    self.sport,
                    self.dport,
                    self.sequence,
                    self.ack,
                    words,
                    self.flags,
                    self.window,
                    0,
                    self.urgent,
                ),
            )
            l4, at = head + self.tcp_options + self.payload, 16
        else:
            l4 = struct.pack("!HHHH", self.sport, self.dport, 8 + len(self.payload), 0) + self.payload
            at = 6
        pseudo = source + destination + struct.pack("!II", len(l4), self.protocol)
        if not self.no_checksum:
            total = internet_checksum(pseudo + l4) or (0xFFFF if self.protocol == 17 else 0)
            l4 = l4[:at] + total.to_bytes(2) + l4[at + 2 :]
        if len(source) == 16:
            head = struct.pack("!IHBB", 6 << 28 | self.tos << 20, len(l4), self.protocol, self.ttl)
            return head + source + destination + l4
        length = 20 + len(self.ip_options)
        head = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x40 | length // 4, self.tos, length + len(l4), self.identity, self.fragment),
            *(self.ttl, self.protocol, 0, source, destination),
        )
        head += self.ip_options
        total = internet_checksum(head) ^ (1 if self.bad_header else 0)
        return head[:10] + total.to_bytes(2) + head[12:] + l4


def cut_up(write: bytes) -> list[bytes]:
    """What the kernel makes of a virtio header and a packet: `tcp_gso_segment`, `__udp_gso_segment`."""
    flags, gso, header, size, start, offset = struct.unpack_from("=BBHHHH", write)
    packet = write[10:]
    if not flags and not gso:
        return [packet]
    assert flags == 1
    head, payload = packet[:header], packet[header:]
    assert len(payload) > size, "nothing to cut up"
    version, tcp = head[0] >> 4, gso in (1, 4)
    assert gso == (5 if not tcp else 1 if version == 4 else 4)
    assert offset == (16 if tcp else 6)
    addresses = head[12:20] if version == 4 else head[8:40]
    protocol = 6 if tcp else 17
    pseudo = addresses + struct.pack("!II", len(packet) - start, protocol)
    assert head[start + offset : start + offset + 2] == (~internet_checksum(pseudo) & 0xFFFF).to_bytes(2)
    if version == 4:
        assert internet_checksum(head[:20]) == 0
        assert int.from_bytes(head[2:4]) == len(packet)
    else:
        assert int.from_bytes(head[4:6]) == len(packet) - 40
    return [
        _segment(head, payload[at : at + size], at // size, at + size >= len(payload), at, start, tcp)
        for at in range(0, len(payload), size)
    ]


def _segment(head: bytes, part: bytes, number: int, last: bool, at: int, start: int, tcp: bool) -> bytes:
    made = bytearray(head)
    length = len(head) + len(part)
    if head[0] >> 4 == 4:
        made[2:4] = length.to_bytes(2)
        made[4:6] = ((int.from_bytes(head[4:6]) + number) & 0xFFFF).to_bytes(2)
        made[10:12] = b"\0\0"
        made[10:12] = internet_checksum(made[:20]).to_bytes(2)
        addresses = made[12:20]
    else:
        made[4:6] = (length - 40).to_bytes(2)
        addresses = made[8:40]
    if tcp:
        sequence = (int.from_bytes(head[start + 4 : start + 8]) + at) & 0xFFFFFFFF
        made[start + 4 : start + 8] = sequence.to_bytes(4)
        if not last:
            made[start + 13] &= ~(FIN | PSH) & 0xFF
        if number:
            made[start + 13] &= ~CWR & 0xFF
        field = start + 16
    else:
        made[start + 4 : start + 6] = (length - start).to_bytes(2)
        field = start + 6
    made[field : field + 2] = b"\0\0"
    pseudo = addresses + struct.pack("!II", length - start, 6 if tcp else 17)
    total = internet_checksum(pseudo + made[start:] + part) or (0 if tcp else 0xFFFF)
    made[field : field + 2] = total.to_bytes(2)
    return bytes(made) + part
