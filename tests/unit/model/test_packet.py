"""Probes as bytes: what is built is read back, and its checksums are right."""

import pytest

from flannelpy.model import packet
from flannelpy.model.address import parse_address
from tests.packets import internet_checksum

V4 = parse_address("192.0.2.1"), parse_address("198.51.100.2")
V6 = parse_address("2001:db8::1"), parse_address("2001:db8::2")


@pytest.mark.parametrize(("source", "target"), [V4, V6])
def test_an_echo_comes_back_out_of_its_vxlan_packet(source: bytes, target: bytes) -> None:
    whole = packet.echo_packet(source, target, 0x01020304, size=100)
    assert len(whole) == 100
    data = packet.vxlan(7, b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02", whole)
    assert packet.unwrap_vxlan(data) == (7, b"\x02\0\0\0\0\x02", whole)
    assert packet.read_echo(whole) == packet.Echo(source, target, False, 0x01020304)


def test_checksums_agree_with_another_implementation() -> None:
    whole = packet.udp_packet(*V4, (5, 6), b"odd")
    assert internet_checksum(whole[:20]) == 0
    pseudo = V4[0] + V4[1] + b"\0\x11" + len(whole[20:]).to_bytes(2)
    assert internet_checksum(pseudo + whole[20:]) == 0
    assert packet.read_udp(whole) == (*V4, 5, 6, b"odd")


def test_options_lengthen_the_header() -> None:
    whole = packet.ip_packet(*V4, 17, b"12345678", bytes((7, 7, 3, 0, 0, 0, 0, 0)))
    assert whole[0] == 0x47
    assert internet_checksum(whole[:28]) == 0
    assert whole[28:] == b"12345678"


@pytest.mark.parametrize("data", [b"", b"\x45", b"\x45" * 20, b"\x60" * 39, b"\0" * 64, b"E" + b"\xff" * 63])
def test_what_is_no_packet_is_none(data: bytes) -> None:
    assert packet.read_udp(data) is None
    assert packet.read_echo(data) is None
    assert packet.unwrap_vxlan(data[:21]) is None
