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


@pytest.mark.parametrize("width", [4, 16])
def test_the_number_of_an_echo_is_read_out_of_its_reply_and_of_an_error_that_quotes_it(width: int) -> None:
    source, target = (V4, V6)[width == 16]
    request = packet.echo_packet(source, target, 0x01020304)
    reply = bytes([packet.ECHO[width][1]]) + request[packet.HEADER[width] + 1 :]
    assert packet.number_asked(width, reply) == 0x01020304
    error = bytes([packet.TIME_EXCEEDED[width]]) + bytes(7) + request
    assert packet.number_asked(width, error[: 8 + packet.HEADER[width] + 8]) == 0x01020304
    assert packet.number_asked(width, error[: 8 + packet.HEADER[width] + 7]) is None
    assert packet.number_asked(width, request[packet.HEADER[width] :]) is None, "our own request"
    assert packet.number_asked(width, b"") is None


@pytest.mark.parametrize(
    ("now", "theirs", "ahead"),
    [
        (100.0, 100_000, 0.0),
        (100.0, 160_500, 60.5),
        (86_400 * 9 + 1.0, 86_399_000, -2.0),
        (0.5, 1 << 31, None),
    ],
)
def test_timestamps_tell_the_clock_across_midnight_too(now: float, theirs: int, ahead: float | None) -> None:
    request = packet.icmp_timestamp(7, now)
    assert internet_checksum(request) == 0
    reply = b"\x0e" + request[1:12] + theirs.to_bytes(4) + bytes(4)
    assert packet.read_timestamp(reply, 7, now) == ahead
    assert packet.read_timestamp(reply, 8, now) is None
    assert packet.read_timestamp(request, 7, now) is None
    assert packet.read_timestamp(reply[:19], 7, now) is None
