import pytest

from flannelpy.model.address import (
    Prefix,
    format_address,
    format_mac,
    host,
    is_link_local,
    is_unicast,
    parse_address,
    parse_mac,
    parse_prefix,
    parse_v4,
    parse_v6,
)


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("10.5.0.1", b"\x0a\x05\x00\x01"),
        ("255.255.255.255", b"\xff" * 4),
        ("2001:db8::1", bytes.fromhex("20010db8000000000000000000000001")),
        ("::", bytes(16)),
        ("::ffff:1.2.3.4", bytes(10) + b"\xff\xff\x01\x02\x03\x04"),
    ],
)
def test_addresses_become_packed_bytes_and_text_again(text: str, packed: bytes) -> None:
    assert parse_address(text) == packed
    assert format_address(packed) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "10.5.0", "10.5.0.256", "010.5.0.1", "10.5.0.1 ", "10.5.0.1\n", "1.2.3.4\0", "\uff11.2.3.4"),
        *("2001:db8", "fe80::1%eth0", ":::", "20011::", "[::1]", "\ud800::"),
    ],
)
def test_what_is_no_address_is_a_value_error(text: str) -> None:
    for parse in (parse_address, parse_v4, parse_v6):
        with pytest.raises(ValueError, match="is not an"):
            parse(text)


def test_a_long_text_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ValueError, match="is not an IP address") as caught:
        parse_address("1" * 100_000)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "text", ["10.5.0.0", "10.5.0.0/", "10.5.0.0/33", "10.5.0.0/-1", "::/129", "10.5.0.0/²"]
)
def test_what_is_no_prefix_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"CIDR|length"):
        parse_prefix(text)


def test_a_prefix_keeps_host_bits_until_told_otherwise() -> None:
    prefix = parse_prefix("10.3.7.9/16")
    assert str(prefix) == "10.3.7.9/16"
    assert str(prefix.network()) == "10.3.0.0/16"
    assert prefix.network().network() == prefix.network()
    assert (prefix.first, prefix.last) == (0x0A030000, 0x0A03FFFF)
    assert prefix.nth(256) == parse_v4("10.3.1.0")
    assert str(parse_prefix("fd00::1/0").network()) == "::/0"
    assert host(parse_v6("::1")) == parse_prefix("::1/128")


@pytest.mark.parametrize(
    ("outer", "inner", "contains", "overlaps"),
    [
        ("10.244.0.0/16", "10.244.0.0/16", True, True),
        ("10.244.0.0/16", "10.244.255.0/24", True, True),
        ("10.244.0.0/16", "10.244.0.0/15", False, True),
        ("10.244.0.0/16", "192.168.0.0/24", False, False),
        ("10.244.0.0/16", "10.245.0.0/16", False, False),
        ("10.244.3.4/16", "10.244.9.9/24", True, True),
        ("0.0.0.0/0", "10.0.0.0/8", True, True),
        ("2001:db8:1234::/48", "2001:db8:1234:ffff::/64", True, True),
        ("2001:db8:1234::/48", "2001:db8:1234::/47", False, True),
        ("2001:db8:1234::/48", "fe02::/32", False, False),
        ("::/0", "10.0.0.0/8", False, False),
        ("0.0.0.0/0", "::/96", False, False),
    ],
)
def test_containment_and_overlap(outer: str, inner: str, contains: bool, overlaps: bool) -> None:
    one, other = parse_prefix(outer), parse_prefix(inner)
    assert one.contains(other) is contains
    assert one.overlaps(other) is overlaps
    assert other.overlaps(one) is overlaps
    assert one.has(other.address) is one.contains(host(other.address))


def test_mac_addresses() -> None:
    assert parse_mac("C6:d2:32:6f:8f:44") == bytes.fromhex("c6d2326f8f44")
    assert format_mac(bytes.fromhex("c6d2326f8f44")) == "c6:d2:32:6f:8f:44"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "c6:d2:32:6f:8f",
        "c6:d2:32:6f:8f:44:55",
        "c6-d2-32-6f-8f-44",
        "  :d2:32:6f:8f:44",
        "c6:d2:32:6f:8f:4g",
    ],
)
def test_what_is_no_mac_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not a MAC address"):
        parse_mac(text)


@pytest.mark.parametrize(
    ("text", "unicast", "link_local"),
    [
        ("192.0.2.1", True, False),
        ("169.254.1.1", True, True),
        ("0.0.0.0", False, False),
        ("127.0.0.1", False, False),
        ("224.0.0.1", False, False),
        ("255.255.255.255", False, False),
        ("240.0.0.1", True, False),
        ("2001:db8::1", True, False),
        ("fe80::1", True, True),
        ("febf::1", True, True),
        ("fec0::1", True, False),
        ("::", False, False),
        ("::1", False, False),
        ("ff02::1", False, False),
        ("::ffff:192.0.2.1", False, False),
    ],
)
def test_what_packets_can_be_sent_to(text: str, unicast: bool, link_local: bool) -> None:
    assert is_unicast(parse_address(text)) is unicast
    assert is_link_local(parse_address(text)) is link_local


def test_prefixes_are_values() -> None:
    assert {Prefix(b"\x0a\x00\x00\x00", 8)} == {parse_prefix("10.0.0.0/8")}
