"""Which reservations can be made, and which are given back at once."""

from collections.abc import Sequence

import pytest

from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.reservation import Keep, Make, is_in_use, pair, reserve
from flannelpy.model.subnet import encode_attrs
from tests.builders import DUAL, V4, config, entry, value

LEASED = entry("10.5.1.0-24", value("192.0.2.1"))
RESERVED = entry("10.5.2.0-24", '{"PublicIP":"192.0.2.2"}', lease_id=0)
BROKEN = entry("10.5.3.0-24", "{")
LONG = entry("10.5.4.0-25", value("192.0.2.4"))
RECORDS = (LEASED, RESERVED, BROKEN, LONG)


def asked(network: str, subnets: Sequence[str], addresses: Sequence[str]) -> Make | Keep:
    wanted = pair([parse_prefix(text) for text in subnets])
    return reserve(config(network), RECORDS, wanted, [parse_address(text) for text in addresses])


@pytest.mark.parametrize(
    ("network", "subnets", "addresses", "key", "text"),
    [
        (V4, ["10.5.9.0/24"], ["192.0.2.9"], "10.5.9.0-24", '{"PublicIP":"192.0.2.9","PublicIPv6":null}'),
        (V4, ["10.5.9.0/24"], [], "10.5.9.0-24", '{"PublicIP":"0.0.0.0","PublicIPv6":null}'),
        (
            DUAL,
            ["fd00:5:0:9::/64", "10.5.9.0/24"],
            ["2001:db8::9", "192.0.2.9"],
            "10.5.9.0-24&fd00:5:0:9::-64",
            '{"PublicIP":"192.0.2.9","PublicIPv6":"2001:db8::9"}',
        ),
    ],
)
def test_a_new_reservation_has_flannels_form(
    network: str, subnets: list[str], addresses: list[str], key: str, text: str
) -> None:
    made = asked(network, subnets, addresses)
    assert isinstance(made, Make)
    assert (made.lease.key, encode_attrs(made.lease.attrs)) == (key, text)


@pytest.mark.parametrize("addresses", [[], ["192.0.2.1"]])
def test_a_lease_is_kept_for_its_node(addresses: list[str]) -> None:
    assert asked(V4, ["10.5.1.0/24"], addresses) == Keep(LEASED)


@pytest.mark.parametrize(
    ("network", "subnets", "addresses", "reason"),
    [
        (V4, ["10.6.1.0/24"], [], "not inside the network 10.5.0.0/16"),
        (V4, ["10.5.8.0/23"], [], "the config asks for 24"),
        (V4, ["10.5.0.0/24"], [], "10.5.1.0 to 10.5.255.0"),
        (V4, ["10.5.9.1/24"], [], "10.5.9.0/24 is"),
        (V4, ["10.5.9.0/24", "10.5.8.0/24"], [], "of one family"),
        (V4, ["fd00:5:0:9::/64"], [], "no IPv4 subnet"),
        (DUAL, ["10.5.9.0/24"], [], "no IPv6 subnet"),
        (V4, ["10.5.2.0/24"], [], "a reservation already, for 192.0.2.2"),
        (V4, ["10.5.3.0/24"], [], "unreadable: release it first"),
        (V4, ["10.5.4.0/24"], [], "10.5.4.0-25 overlaps it"),
        (V4, ["10.5.1.0/24"], ["192.0.2.9"], "leased by 192.0.2.1"),
        (V4, ["10.5.9.0/24"], ["192.0.2.1"], "192.0.2.1 has 10.5.1.0-24 already"),
        (V4, ["10.5.9.0/24"], ["10.5.7.7"], "inside the overlay network"),
        (V4, ["10.5.9.0/24"], ["127.0.0.1"], "no address of a host"),
        (V4, ["10.5.9.0/24"], ["192.0.2.8", "192.0.2.9"], "of one family"),
    ],
)
def test_what_cannot_be_reserved_says_why(
    network: str, subnets: list[str], addresses: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        asked(network, subnets, addresses)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("text", "network", "in_use"),
    [
        ('{"PublicIP":"192.0.2.2"}', V4, False),
        (value("192.0.2.2"), V4, True),
        (value("0.0.0.0"), V4, False),
        ('{"PublicIP":"192.0.2.2"}', V4.replace("vxlan", "alloc"), True),
        ('{"PublicIP":"0.0.0.0"}', V4.replace("vxlan", "alloc"), False),
        ('{"PublicIP":"192.0.2.2"}', None, True),
        ("{", V4, False),
    ],
)
def test_a_reservation_is_deleted_only_if_no_node_has_taken_it(
    text: str, network: str | None, in_use: bool
) -> None:
    known = None if network is None else config(network)
    assert is_in_use(known, entry("10.5.2.0-24", text, lease_id=0)) is in_use
