"""What the udp backend tells its peers and asks of the machine, and the ICMP errors that it answers with."""

from typing import Any

import pytest

from flannelpy.backends.udp import UdpBackend
from flannelpy.backends.udp.packet import TOO_BIG, UNREACHABLE, icmp_error
from flannelpy.model.address import host, parse_address, parse_prefix, parse_v4
from flannelpy.model.config import ConfigError
from flannelpy.model.kernel import DeviceAddress, Forward, Link, Route, State, Tunnel
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import encode_attrs
from tests.builders import DUAL, V4, config, facts, lease, uplink
from tests.packets import Packet, internet_checksum

V6_ONLY = DUAL.replace('"Network":"10.5.0.0/16",', '"EnableIPv4":false,')


def backend(text: str = V4, options: str = "") -> UdpBackend:
    return UdpBackend(config(text.replace('"vxlan"', f'"udp"{options}')))


def peer(backend_type: str = "", **changes: Any) -> Lease:
    made = lease(backend_type=backend_type, **changes)
    return made._replace(attrs=made.attrs._replace(backend_data=None, backend_v6_data=None))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (V4, '{"PublicIP":"192.0.2.1","PublicIPv6":null}'),
        (DUAL, '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1"}'),
        (V6_ONLY, '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}'),
    ],
    ids=["v4", "dual", "v6"],
)
def test_the_lease_names_no_backend_as_flannels_does(text: str, value: str) -> None:
    attrs, warnings = backend(text).attrs(facts(), None, (peer(),))
    assert (encode_attrs(attrs), warnings) == (value, ())


def test_a_config_without_a_backend_is_udp() -> None:
    udp = UdpBackend(config('{"Network":"10.5.0.0/16"}'))
    assert udp.own(lease("10.5.1.0/24"), facts()).tunnels["flannel0"].port == 8285


@pytest.mark.parametrize(
    ("text", "options", "local", "mtu"),
    [
        (V4, "", "192.0.2.1", 1472),
        (V4, ',"Port":9000,"AcceptAnySource":true', "192.0.2.1", 1472),
        (DUAL, "", "192.0.2.1", 1472),
        (V6_ONLY, "", "2001:db8::1", 1452),
    ],
    ids=["v4", "options", "dual", "v6"],
)
def test_for_ourselves_a_device_a_forwarder_and_one_route(
    text: str, options: str, local: str, mtu: int
) -> None:
    own = lease("" if text is V6_ONLY else "10.5.1.0/24", subnet6="" if text is V4 else "fd00:5:0:1::/64")
    bases = tuple(subnet.address for subnet in own.subnets())
    networks = {
        4: Route(parse_prefix("10.5.0.0/16"), "flannel0", None),
        16: Route(parse_prefix("fd00:5::/48"), "flannel0", None, metric=1024),
    }
    port, is_open = (9000, True) if options else (8285, False)
    udp = backend(text, options)
    assert udp.own(own, facts()) == State(
        [
            Link("flannel0", "tun", b"", mtu, up=True),
            *(DeviceAddress("flannel0", host(base)) for base in bases),
            Tunnel("flannel0", parse_address(local), port, mtu, bases, is_open, "eth0"),
            *(networks[len(base)] for base in bases),
        ]
    )
    assert udp.mtu(facts()) == mtu


@pytest.mark.parametrize(
    ("text", "remote"),
    [(V4, "192.0.2.2"), (DUAL, "192.0.2.2"), (V6_ONLY, "2001:db8::2")],
    ids=["v4", "dual", "v6"],
)
@pytest.mark.parametrize("backend_type", ["", "udp"])
def test_a_peer_gets_an_entry_for_each_subnet(text: str, remote: str, backend_type: str) -> None:
    them = peer(backend_type, subnet="" if text is V6_ONLY else "10.5.2.0/24", subnet6="fd00:5:0:2::/64")
    subnets = [subnet for subnet in them.subnets() if text is not V4 or subnet.bits == 32]
    items, reason = backend(text).peer(them, facts())
    assert items == tuple(Forward("flannel0", subnet, parse_address(remote)) for subnet in subnets)
    assert reason is None


@pytest.mark.parametrize(
    ("text", "them", "reason"),
    [
        (V4, peer("vxlan"), "its backend type is 'vxlan', ours is 'udp'"),
        (V6_ONLY, peer(), "it has no public IPv6 address"),
        (V4, peer(subnet="", subnet6="fd00:5:0:2::/64"), "it has no public IPv4 address"),
    ],
)
def test_a_peer_that_cannot_be_reached_is_refused(text: str, them: Lease, reason: str) -> None:
    assert backend(text).peer(them, facts()) == ((), reason)


def test_a_node_with_a_fast_path_says_so_and_knows_who_has_one_too() -> None:
    can, cannot = facts(no_fast_path=""), facts(no_fast_path="no clang")
    auto = backend(V4)
    attrs, warnings = auto.attrs(can, None, ())
    assert (attrs.backend_data, warnings) == ({"FastPath": True}, ())
    assert auto.attrs(cannot, None, ())[0].backend_data is None
    own = lease("10.5.1.0/24")
    assert auto.own(own, can).tunnels["flannel0"].fast
    assert not auto.own(own, cannot).tunnels["flannel0"].fast
    for data, fast in (({"FastPath": True}, True), ({"FastPath": 1}, False), (None, False), ([1], False)):
        them = peer("")
        them = them._replace(attrs=them.attrs._replace(backend_data=data))
        assert [item.fast for item in auto.peer(them, can).items if isinstance(item, Forward)] == [fast]
        assert [item.fast for item in auto.peer(them, cannot).items if isinstance(item, Forward)] == [False]
    off = backend(V4, ',"FastPath":"off"')
    assert not off.wants_fast_path
    assert off.attrs(can, None, ())[0].backend_data is None
    assert not backend(V6_ONLY).wants_fast_path
    (warning,) = backend(V4, ',"FastPath":"on"').attrs(cannot, None, ())[1]
    assert "no clang" in warning


@pytest.mark.parametrize(
    "options",
    [',"Port":0', ',"Port":65536', ',"Port":"8285"', ',"AcceptAnySource":1', ',"FastPath":"yes"'],
)
def test_a_wrong_option_is_named(options: str) -> None:
    with pytest.raises(ConfigError, match=options.split('"')[1]):
        backend(V4, options)


@pytest.mark.parametrize(
    ("text", "mtu", "wanted"),
    [(V4, 95, "leaves 67"), (DUAL, 1307, "leaves 1279"), (V6_ONLY, 1327, "leaves 1279")],
)
def test_an_uplink_that_is_too_narrow_is_named(text: str, mtu: int, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"MTU {mtu} {wanted} bytes for packets on flannel0"):
        backend(text).mtu(facts(uplink=uplink(mtu)))
    assert backend(V4).mtu(facts(uplink=uplink(65536))) == 65507


# --- ICMP errors ---


@pytest.mark.parametrize(
    ("meaning", "kind", "code"), [(UNREACHABLE, 3, 0), (TOO_BIG, 3, 4)], ids=["unreachable", "too big"]
)
def test_an_icmp_error_is_what_the_rfc_says(meaning: str, kind: int, code: int) -> None:
    offender = Packet(payload=bytes(900)).bytes()
    error = icmp_error(memoryview(offender), parse_v4("10.5.1.0"), meaning, 1472)
    assert error is not None
    assert internet_checksum(error[:20]) == internet_checksum(error[20:]) == 0
    assert (error[12:16], error[16:20]) == (parse_v4("10.5.1.0"), offender[12:16])
    assert (error[20], error[21], int.from_bytes(error[26:28])) == (kind, code, 1472)
    assert int.from_bytes(error[2:4]) == len(error) == 576
    assert offender.startswith(error[28:])


@pytest.mark.parametrize(
    ("meaning", "kind"), [(UNREACHABLE, 1), (TOO_BIG, 2)], ids=["unreachable", "too big"]
)
def test_so_is_an_icmpv6_error(meaning: str, kind: int) -> None:
    ours = parse_address("fd00:5:0:1::")
    offender = Packet(source="fd00:5:0:1::9", destination="fd00:5:0:9::9", payload=bytes(1400)).bytes()
    error = icmp_error(memoryview(offender), ours, meaning, 1472)
    assert error is not None
    assert len(error) == 1280
    pseudo = error[8:40] + (len(error) - 40).to_bytes(4) + b"\0\0\0\x3a"
    assert internet_checksum(pseudo + error[40:]) == 0
    assert (error[40], error[41], int.from_bytes(error[44:48])) == (kind, 0, 1472)
    assert error[24:40] == offender[8:24]
    assert offender.startswith(error[48:])


@pytest.mark.parametrize(
    "offender",
    [
        Packet(fragment=8).bytes(),
        Packet(source="0.0.0.0").bytes(),
        Packet(source="224.0.0.1").bytes(),
        Packet(destination="224.0.0.251").bytes(),
        Packet(destination="255.255.255.255").bytes(),
        Packet().bytes()[:9] + b"\1" + Packet().bytes()[10:20] + b"\3" + bytes(20),
        Packet().bytes()[:9] + b"\1" + Packet().bytes()[10:20],
        Packet(source="ff02::1", destination="fd00::1").bytes(),
        Packet(source="fd00::1", destination="ff02::1").bytes(),
        Packet(source="fd00::1", destination="fd00::2").bytes()[:6] + b"\x3a" + bytes(33) + b"\1" + bytes(9),
    ],
)
def test_some_packets_are_never_answered(offender: bytes) -> None:
    source = parse_v4("10.5.1.0") if offender[0] >> 4 == 4 else parse_address("fd00:5:0:1::")
    assert icmp_error(memoryview(offender), source, UNREACHABLE) is None


def test_a_packet_that_may_be_fragmented_is_not_too_big() -> None:
    assert icmp_error(memoryview(Packet(fragment=0).bytes()), parse_v4("10.5.1.0"), TOO_BIG, 1472) is None
