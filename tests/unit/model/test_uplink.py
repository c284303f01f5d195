from collections.abc import Callable, Sequence

import pytest

from flannelpy.model.address import Address, parse_address, parse_prefix
from flannelpy.model.uplink import (
    DefaultRoute,
    Interface,
    InterfaceAddress,
    NoUplink,
    Uplink,
    Wish,
    choose,
)


def interface(index: int, name: str, *prefixes: str | InterfaceAddress, mtu: int = 1500) -> Interface:
    addresses = tuple(
        InterfaceAddress(parse_prefix(prefix)) if isinstance(prefix, str) else prefix for prefix in prefixes
    )
    return Interface(index, name, mtu, addresses)


LO = interface(1, "lo", "127.0.0.1/8", "::1/128", mtu=65536)
ETH0 = interface(2, "eth0", "192.0.2.1/24", "2001:db8::1/64", "fe80::1/64")
ETH1 = interface(3, "eth1", "198.51.100.1/24", "2001:db8:1::1/64", mtu=9000)
HOST = (LO, ETH0, ETH1)
DEFAULTS = (DefaultRoute(32, 2, 100), DefaultRoute(128, 2, 1024))


def no_route(_address: Address) -> tuple[int, Address] | None:
    return None


def pick(
    wish: Wish | None = None,
    stack: str = "4",
    interfaces: Sequence[Interface] = HOST,
    defaults: Sequence[DefaultRoute] = DEFAULTS,
    route_to: Callable[[Address], tuple[int, Address] | None] = no_route,
) -> Uplink:
    return choose(wish or Wish(), "4" in stack, "6" in stack, interfaces, defaults, route_to)[0]


def refusal(wish: Wish, stack: str = "4", **host: object) -> str:
    with pytest.raises(NoUplink) as caught:
        pick(wish, stack, **host)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def ip(text: str) -> Address:
    return parse_address(text)


def test_the_default_routes_interface_with_the_addresses_of_the_wanted_families() -> None:
    v4, v6 = ip("192.0.2.1"), ip("2001:db8::1")
    assert pick(stack="4") == Uplink("eth0", 2, 1500, v4, None, v4, None)
    assert pick(stack="6") == Uplink("eth0", 2, 1500, None, v6, None, v6)
    assert pick(stack="46") == Uplink("eth0", 2, 1500, v4, v6, v4, v6)


def test_the_reason_says_which_rule_decided() -> None:
    wish = Wish(iface=("eth0",), public_ip=ip("203.0.113.1"))
    uplink, reason = choose(wish, True, False, HOST, DEFAULTS, no_route)
    assert uplink.public_ip == ip("203.0.113.1")
    assert reason == ("eth0 (192.0.2.1), MTU 1500: named by --iface; public IP 203.0.113.1 from --public-ip")
    assert choose(Wish(), True, True, HOST, DEFAULTS, no_route)[1] == (
        "eth0 (192.0.2.1, 2001:db8::1), MTU 1500: owner of the default route"
    )


@pytest.mark.parametrize(
    ("stack", "defaults", "expected"),
    [
        ("4", [DefaultRoute(32, 2, 200), DefaultRoute(32, 3, 100)], "eth1"),
        ("4", [DefaultRoute(32, 3, 100), DefaultRoute(32, 2, 100)], "eth1"),
        ("4", [DefaultRoute(32, 9, 0), DefaultRoute(32, 3, 100)], "eth1"),
        ("4", [DefaultRoute(128, 3, 0), DefaultRoute(32, 2, 100), DefaultRoute(32, 0, 200)], "eth0"),
        ("46", [DefaultRoute(32, 2, 0), DefaultRoute(32, 3, 100), DefaultRoute(128, 3, 1024)], "eth1"),
    ],
)
def test_which_default_route_counts(stack: str, defaults: list[DefaultRoute], expected: str) -> None:
    tunnel = interface(9, "flannel.1", "10.5.1.0/32")
    assert pick(stack=stack, defaults=defaults, interfaces=(*HOST, tunnel)).name == expected


@pytest.mark.parametrize(
    ("stack", "defaults", "said"),
    [
        ("4", [], "there is no IPv4 default route"),
        ("4", [DefaultRoute(128, 2, 0)], "there is no IPv4 default route"),
        ("4", [DefaultRoute(32, 0, 0)], "the IPv4 default route has several next hops"),
        ("46", [DefaultRoute(32, 2, 0)], "there is no IPv6 default route"),
        ("46", [DefaultRoute(32, 2, 0), DefaultRoute(128, 3, 0)], "leads to eth0, the IPv6 one to eth1"),
    ],
)
def test_a_default_route_that_does_not_decide(stack: str, defaults: list[DefaultRoute], said: str) -> None:
    message = refusal(Wish(), stack, defaults=defaults)
    assert said in message
    assert "--iface" in message
    assert "eth1 (198.51.100.1, 2001:db8:1::1)" in message


@pytest.mark.parametrize(
    ("iface", "stack", "expected"),
    [
        ("eth1", "4", ("eth1", "198.51.100.1", None)),
        ("198.51.100.1", "4", ("eth1", "198.51.100.1", None)),
        ("2001:db8:1::1", "6", ("eth1", None, "2001:db8:1::1")),
        ("fe80::1", "6", ("eth0", None, "fe80::1")),
        # flannel dereferences nil here
        ("2001:db8:1::1", "46", ("eth1", "198.51.100.1", "2001:db8:1::1")),
        ("198.51.100.1", "46", ("eth1", "198.51.100.1", "2001:db8:1::1")),
        ("2001:db8:1::1", "4", ("eth1", "198.51.100.1", None)),
    ],
)
def test_iface_by_name_or_address(
    iface: str, stack: str, expected: tuple[str, str | None, str | None]
) -> None:
    uplink = pick(Wish(iface=(iface,)), stack)
    name, v4, v6 = expected
    assert uplink.name == name
    assert uplink.address == uplink.public_ip == (ip(v4) if v4 else None)
    assert uplink.address6 == uplink.public_ipv6 == (ip(v6) if v6 else None)


def test_ifaces_are_tried_in_order_then_regexes_then_can_reach() -> None:
    eth0_way = lambda _: (2, ip("192.0.2.1"))  # noqa: E731
    target = ip("203.0.113.9")
    assert pick(Wish(iface=("wlan0", "eth1"), iface_regex=("eth0",))).name == "eth1"
    assert (
        pick(Wish(iface=("wlan0",), iface_regex=("eth1",), can_reach=target), route_to=eth0_way).name
        == "eth1"
    )
    assert (
        pick(Wish(iface=("wlan0",), iface_regex=("x",), can_reach=target), route_to=eth0_way).name == "eth0"
    )
    message = refusal(Wish(iface=("wlan0", "203.0.113.1"), iface_regex=("x", "("), can_reach=target))
    for said in (
        "--iface wlan0: there is no interface of this name",
        "--iface 203.0.113.1: no interface has this address",
        "--iface-regex 'x' matches no address",
        "--iface-regex '(' is not a regular expression",
        "--iface-can-reach 203.0.113.9: there is no route",
        "lo (127.0.0.1, ::1)",
    ):
        assert said in message


# The dummy interface of flannel's own tests of this choice.
DUMMY = interface(
    4,
    "dummy0",
    *("1.10.100.1/24", "192.168.200.128/24", "172.16.30.18/24", "172.16.31.200/24", "172.16.32.100/24"),
)


@pytest.mark.parametrize(
    ("wish", "address", "public"),
    [
        (Wish(iface_regex=(r"192\.168\.200\.\d+",)), "192.168.200.128", "192.168.200.128"),
        (Wish(iface_regex=(r"dummy\d+",)), "1.10.100.1", "1.10.100.1"),
        (Wish(iface_regex=("dummy[[:digit:]]+",)), "1.10.100.1", "1.10.100.1"),
        (Wish(iface=("dummy0",)), "1.10.100.1", "1.10.100.1"),
        (Wish(iface=("172.16.30.18",)), "172.16.30.18", "172.16.30.18"),
        (Wish(iface_regex=("172.16.30",), public_ip=ip("172.16.31.200")), "172.16.30.18", "172.16.31.200"),
        (Wish(can_reach=ip("172.16.32.254")), "172.16.32.100", "172.16.32.100"),
    ],
)
def test_flannels_cases(wish: Wish, address: str, public: str) -> None:
    uplink = pick(wish, interfaces=(LO, DUMMY), route_to=lambda _: (4, ip("172.16.32.100")))
    assert (uplink.name, uplink.address, uplink.public_ip) == ("dummy0", ip(address), ip(public))


def test_a_regex_never_mixes_interfaces_in_dual_stack() -> None:
    # flannel keeps eth0's IPv4 address in mind and joins it with eth1's IPv6 address.
    half = interface(2, "eth0", "10.0.0.1/24")
    whole = interface(3, "eth1", "10.0.1.1/24", "fd00::10:1/64", "fd00::2/64")
    assert pick(Wish(iface_regex=("10",)), "46", (half, whole)) == Uplink(
        "eth1", 3, 1500, ip("10.0.1.1"), ip("fd00::10:1"), ip("10.0.1.1"), ip("fd00::10:1")
    )
    other_v6 = interface(2, "eth0", "10.0.0.1/24", "fd00::a/64")
    assert pick(Wish(iface_regex=("10",)), "46", (other_v6, whole)).name == "eth1"
    only_v4_matches = pick(Wish(iface_regex=(r"^10\.",)), "46", (half, whole))
    assert (only_v4_matches.name, only_v4_matches.address6) == ("eth1", ip("fd00::10:1"))


def test_a_regex_prefers_addresses_to_names_and_names_that_can_serve() -> None:
    bare = interface(2, "eth0")
    odd = interface(3, "net192.0.2")
    assert pick(Wish(iface_regex=(r"192\.0\.2",)), interfaces=(odd, ETH0)).name == "eth0"
    assert pick(Wish(iface_regex=("^eth",)), interfaces=(bare, ETH1)).name == "eth1"
    assert "eth0 (its name matches --iface-regex 'eth') has no usable IPv4 address" in refusal(
        Wish(iface_regex=("eth",)), interfaces=(bare,)
    )


@pytest.mark.parametrize("name", ["flannel.1", "flannel-v6.1", "flannel0", "flannel-wg", "flannel.ipip"])
def test_an_overlay_is_never_found_by_search(name: str) -> None:
    overlay = interface(5, name, "10.5.1.0/32", "fd00:5::/128")
    uplink = interface(6, "flannelling", "10.6.0.1/24")
    for wish in (Wish(iface_regex=(r"10\.",)), Wish(iface_regex=("flannel",))):
        assert pick(wish, interfaces=(overlay, uplink)).name == "flannelling"
    assert "no IPv4 default route" in refusal(
        Wish(), interfaces=(overlay, uplink), defaults=[DefaultRoute(32, 5, 0)]
    )
    assert "does not leave" in refusal(
        Wish(can_reach=ip("10.5.9.9")), interfaces=(overlay,), route_to=lambda _: (5, ip("10.5.1.0"))
    )


def test_can_reach_uses_the_source_address_of_either_family() -> None:
    way = lambda _: (3, ip("2001:db8:1::77"))  # noqa: E731
    wish = Wish(can_reach=ip("2001:db8:9::1"))
    assert pick(wish, "6", route_to=way).address6 == ip("2001:db8:1::77")
    dual = pick(wish, "46", route_to=way)
    assert (dual.name, dual.address, dual.address6) == ("eth1", ip("198.51.100.1"), ip("2001:db8:1::77"))
    assert "does not leave" in refusal(
        Wish(can_reach=ip("192.0.2.1")), route_to=lambda _: (1, ip("192.0.2.1"))
    )


def test_a_public_ip_alone_must_be_an_address_of_this_host() -> None:
    uplink = pick(Wish(public_ip=ip("198.51.100.1")))
    assert (uplink.name, uplink.address, uplink.public_ip) == ("eth1", ip("198.51.100.1"), ip("198.51.100.1"))
    message = refusal(Wish(public_ip=ip("203.0.113.1")))
    assert "--public-ip 203.0.113.1 is not an address of this host" in message
    assert "add --iface" in message
    assert pick(Wish(public_ipv6=ip("2001:db8:1::1")), "46").name == "eth1"
    both = Wish(public_ip=ip("192.0.2.1"), public_ipv6=ip("2001:db8:1::1"))
    assert "two interfaces, eth0 and eth1" in refusal(both, "46")
    assert pick(both, "4").name == "eth0"
    assert pick(both, "6").name == "eth1"


def test_public_ips_are_told_only_for_the_wanted_families() -> None:
    wish = Wish(iface=("eth0",), public_ip=ip("203.0.113.1"), public_ipv6=ip("2001:db8:9::1"))
    assert pick(wish, "4").public_ipv6 is None
    assert pick(wish, "6").public_ip is None
    dual = pick(wish, "46")
    assert (dual.public_ip, dual.public_ipv6) == (ip("203.0.113.1"), ip("2001:db8:9::1"))
    assert "--public-ip 224.0.0.1 is not" in refusal(wish._replace(public_ip=ip("224.0.0.1")))


def test_the_order_of_addresses() -> None:
    def address(text: str, **flags: bool) -> InterfaceAddress:
        return InterfaceAddress(parse_prefix(text), **flags)

    old = address("2001:db8::1/64", deprecated=True)
    local = address("fe80::1/64")
    privacy = address("2001:db8::2/64", permanent=False, temporary=True)
    dynamic = address("2001:db8::3/64", permanent=False)
    static = address("2001:db8::4/64")
    for addresses, expected in (
        ((old, local, privacy, dynamic, static), "2001:db8::4"),
        ((old, local, privacy, dynamic), "2001:db8::3"),
        ((old, local, privacy), "2001:db8::2"),
        ((old, local), "fe80::1"),
        ((static, address("2001:db8::5/64")), "2001:db8::4"),
    ):
        assert pick(stack="6", interfaces=(interface(2, "eth0", *addresses),)).address6 == ip(expected)
    assert "no usable IPv6 address" in refusal(Wish(), "6", interfaces=(interface(2, "eth0", old),))


def test_an_interface_without_mtu_is_refused() -> None:
    assert "has MTU 0" in refusal(
        Wish(iface=("eth0",)), interfaces=(interface(2, "eth0", "192.0.2.1/24", mtu=0),)
    )


def test_the_list_of_interfaces_is_short_and_starts_with_usable_ones() -> None:
    veths = [interface(100 + number, f"veth{number}", "fe80::1/64") for number in range(500)]
    message = refusal(Wish(iface=("wlan0",)), interfaces=(*veths, ETH0))
    assert "there are eth0 (192.0.2.1" in message
    assert "and 489 more" in message
    assert len(message) < 700
