"""Packets in words, by scapy, which is imported nowhere else: half a second, and nothing for the daemon."""

import logging
from collections.abc import Sequence
from typing import Any

from flannelpy.errors import FlannelpyError
from flannelpy.model.address import Address
from flannelpy.model.packet import addresses, read_udp, unwrap_vxlan

_LONGEST = 400


def require() -> None:
    """Raise FlannelpyError, with the remedy, where scapy is not installed."""
    try:
        _scapy()
    except ImportError:
        raise FlannelpyError(
            "packets are decoded with scapy, which is not installed: pip install 'flannelpy[tools]'"
            " (or requirements/tools.lock)"
        ) from None


def _scapy() -> Any:
    logging.getLogger("scapy").setLevel(logging.ERROR)
    import scapy.layers.inet
    import scapy.layers.inet6
    import scapy.layers.vxlan
    import scapy.utils

    return scapy


def inner(packet: bytes, port: int | None) -> bytes | None:
    """What a packet carries, from its IP header on; None if it is not wrapped."""
    found = read_udp(packet) if port is not None else None
    if found is None or found[3] != port:
        return None
    unwrapped = unwrap_vxlan(found[4])
    if unwrapped is not None:
        return unwrapped[2]
    return found[4] if found[4][:1] and found[4][0] >> 4 in (4, 6) else None


def decoded(packet: bytes, port: int | None, *, vxlan: bool) -> Any:
    """The layers of an IP packet, those inside of the encapsulation, too."""
    scapy = _scapy()
    ip = scapy.layers.inet.IP if packet[0] >> 4 == 4 else scapy.layers.inet6.IPv6
    found = ip(packet)
    udp = scapy.layers.inet.UDP
    if port is None or udp not in found or found[udp].dport != port:
        return found
    data = bytes(found[udp].payload)
    if vxlan:
        layers = scapy.layers.vxlan.VXLAN(data)
    elif data[:1]:
        layers = (scapy.layers.inet.IP if data[0] >> 4 == 4 else scapy.layers.inet6.IPv6)(data)
    else:
        return found
    found[udp].remove_payload()
    return found / layers


def in_words(packet: bytes, port: int | None, *, vxlan: bool) -> str:
    """One line; scapy's own words. What it cannot read is told by its length."""
    try:
        text: str = decoded(packet, port, vxlan=vxlan).summary()
    except Exception as error:  # noqa: BLE001  # foreign bytes, and a large library
        return f"{len(packet)} bytes that cannot be decoded ({type(error).__name__})"
    line = text if text.isprintable() else repr(text)
    return f"{line[:_LONGEST]} ({len(packet)} bytes)"


def layers(packet: bytes, port: int | None, *, vxlan: bool) -> list[str]:
    """All fields, a layer a line."""
    try:
        found = decoded(packet, port, vxlan=vxlan)
        lines: Sequence[str] = []
        rows = []
        while found and found.name not in ("NoPayload", "Raw", "Padding"):
            fields = ", ".join(f"{key}={found.fields[key]}" for key in _SHOWN if key in found.fields)
            rows.append(f"{found.name}: {fields}")
            found = found.payload
        lines = [row if row.isprintable() else repr(row) for row in rows]
    except Exception as error:  # noqa: BLE001
        return [f"{len(packet)} bytes that cannot be decoded ({type(error).__name__})"]
    return [line[:_LONGEST] for line in lines]


_SHOWN = (
    "vni",
    "src",
    "dst",
    "ttl",
    "hlim",
    "flags",
    "sport",
    "dport",
    "type",
    "code",
    "id",
    "seq",
    "len",
    "plen",
)


class Pcap:
    """A file for tcpdump and wireshark: IP packets without link headers (LINKTYPE_RAW)."""

    def __init__(self, path: str) -> None:
        try:
            self._writer = _scapy().utils.RawPcapWriter(path, linktype=101, sync=True)
            self._writer.write_header(None)
        except OSError as error:
            raise FlannelpyError(f"cannot write {path}: {error.strerror}") from None

    def write(self, packet: bytes, at: float) -> None:
        """Add one."""
        seconds = int(at)
        self._writer.write_packet(packet, sec=seconds, usec=int((at - seconds) * 1_000_000))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def concerns(packet: bytes, port: int | None, peer: Address | None, pod: Address | None) -> bool:
    """Whether a packet is of that peer (outer address) and that pod (inner address)."""
    outside = addresses(packet)
    if outside is None or (peer is not None and peer not in outside):
        return False
    if pod is None:
        return True
    within = inner(packet, port)
    return pod in (addresses(within if within is not None else packet) or ())
