"""What the vxlan backend tells its peers and asks of the kernel."""

from typing import Any

import pytest

from flannelpy.backends.vxlan import VxlanBackend
from flannelpy.model.address import format_mac, parse_mac, parse_prefix, parse_v4, parse_v6
from flannelpy.model.config import ConfigError
from flannelpy.model.kernel import Link, State, Vxlan
from flannelpy.model.subnet import encode_attrs
from tests.builders import DUAL, config, facts, lease, uplink

V6_ONLY = DUAL.replace('"Network":"10.5.0.0/16",', '"EnableIPv4":false,')


def backend(options: str = "", text: str = DUAL) -> VxlanBackend:
    return VxlanBackend(config(text.replace('"vxlan"', f'"vxlan"{options}')))


def device(name: str = "flannel.1", mac: str = "02:aa:00:00:00:01", **vxlan: Any) -> Link:
    found = Vxlan(1, "eth0", parse_v4("192.0.2.1"), 8472)._replace(**vxlan)
    return Link(name, "vxlan", parse_mac(mac), 1450, True, found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (',"VNI":-1', "Backend.VNI is -1: it must be an integer from 0 to 16777215"),
        (',"VNI":16777216', "Backend.VNI is 16777216"),
        (',"VNI":"1"', 'Backend.VNI is "1"'),
        (',"vni":10000', "longer than 15 characters"),
        (',"Port":65536', "Backend.Port is 65536"),
        (',"MTU":1.5', "Backend.MTU is 1.5"),
        (',"GBP":1', "Backend.GBP is 1: it must be true or false"),
        (',"Learning":"yes"', "Backend.Learning"),
        (',"DirectRouting":null,"directrouting":"x"', "Backend.DirectRouting"),
    ],
)
def test_a_bad_option_is_named(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        backend(options)


def test_lease_data_is_flannels() -> None:
    existing = device(mac="c6:d2:32:6f:8f:44")
    attrs, warnings = backend(text='{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}').attrs(
        facts(existing), None, ()
    )
    assert encode_attrs(attrs) == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
    )
    assert warnings == ()


def mac_of(attrs: object, family: str = "backend_data") -> str:
    return str(getattr(attrs, family)["VtepMAC"])


def test_the_mac_is_the_devices_then_the_leases_then_a_stable_hash() -> None:
    remembered = lease("10.5.1.0/24", "192.0.2.1", mac="02:bb:00:00:00:01")
    vxlan = backend(text='{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    assert mac_of(vxlan.attrs(facts(device()), remembered, ())[0]) == "02:aa:00:00:00:01"
    assert mac_of(vxlan.attrs(facts(), remembered, ())[0]) == "02:bb:00:00:00:01"
    hashed = mac_of(vxlan.attrs(facts(), None, ())[0])
    assert hashed == mac_of(vxlan.attrs(facts(), None, ())[0])
    first = parse_mac(hashed)[0]
    assert first & 1 == 0
    assert first & 2
    others = {
        mac_of(vxlan.attrs(facts()._replace(host_id="another"), None, ())[0]),
        mac_of(vxlan.attrs(facts(uplink=uplink(public_ip="192.0.2.77")), None, ())[0]),
        mac_of(backend(',"VNI":2').attrs(facts(), None, ())[0]),
    }
    assert hashed not in others
    assert len(others) == 3


def test_the_two_families_have_two_macs() -> None:
    attrs, _ = backend().attrs(facts(), None, ())
    assert mac_of(attrs) != mac_of(attrs, "backend_v6_data")


@pytest.mark.parametrize("origin", ["device", "lease", "hash"])
def test_a_mac_of_another_node_is_not_taken_and_said(origin: str) -> None:
    vxlan = backend(text='{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    known = facts(device()) if origin == "device" else facts()
    remembered = lease("10.5.1.0/24", "192.0.2.1", mac="02:bb:00:00:00:01") if origin == "lease" else None
    wanted = mac_of(vxlan.attrs(known, remembered, ())[0])
    attrs, warnings = vxlan.attrs(known, remembered, (lease("10.5.9.0/24", "192.0.2.9", mac=wanted),))
    assert mac_of(attrs) != wanted
    assert len(warnings) == 1
    assert wanted in warnings[0]
    assert "cloned" in warnings[0]


@pytest.mark.parametrize("data", [[], {}, 5, "x", {"VtepMAC": []}, {"VtepMAC": {"a": []}}, {"VtepMAC": "zz"}])
def test_other_nodes_odd_data_does_not_disturb_the_choice_of_a_mac(data: object) -> None:
    attrs, warnings = backend().attrs(facts(), None, (lease(data=data),))
    assert mac_of(attrs)
    assert warnings == ()


def own_state(vxlan: VxlanBackend, *links: Link, mtu: int = 1500) -> State:
    known = facts(*links, uplink=uplink(mtu))
    attrs, _ = vxlan.attrs(known, None, ())
    own = lease("10.5.1.0/24", "192.0.2.1", subnet6="fd00:5:0:1::/64")._replace(attrs=attrs)
    return vxlan.own(own, known)


def test_own_devices_of_both_families() -> None:
    state = own_state(backend(',"Port":4789,"Learning":true,"GBP":true'))
    v4, v6 = state.links["flannel.1"], state.links["flannel-v6.1"]
    assert v4.vxlan == Vxlan(1, "eth0", parse_v4("192.0.2.1"), 4789, True, True)
    assert v6.vxlan == Vxlan(1, "eth0", parse_v6("2001:db8::1"), 4789, True, True)
    assert (v4.mtu, v6.mtu) == (1450, 1430)
    assert {str(item) for item in state.addresses.values()} == {
        "address 10.5.1.0/32 on flannel.1",
        "address fd00:5:0:1::/128 on flannel-v6.1",
    }


def test_flannel_mtu_is_the_smallest_of_the_enabled_families() -> None:
    v4_only = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
    assert backend(text=v4_only).mtu(facts()) == 1450
    assert backend().mtu(facts()) == 1430
    assert backend(text=V6_ONLY).mtu(facts()) == 1430
    assert backend(',"MTU":1400', v4_only).mtu(facts()) == 1350
    assert backend(',"MTU":9000', v4_only).mtu(facts()) == 1450  # no more than the uplink carries
    with pytest.raises(ValueError, match="leaves 1270 bytes for packets on flannel-v6"):
        backend().mtu(facts(uplink=uplink(1340)))


@pytest.mark.parametrize(
    "found",
    [
        device(),
        device(port=4789),  # a module parameter; ours says only "default"
        device(uplink=None),
        device(local=parse_v4("203.0.113.9")),  # the public IP: flannel >= 0.27.4
    ],
)
def test_an_existing_device_is_adopted_as_it_is(found: Link) -> None:
    vxlan = backend(text='{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    known = facts(found, uplink=uplink(public_ip="203.0.113.9"))
    attrs, _ = vxlan.attrs(known, None, ())
    state = vxlan.own(lease("10.5.1.0/24", "192.0.2.1")._replace(attrs=attrs), known)
    assert state.links["flannel.1"] == found


@pytest.mark.parametrize("wrong", [{"uplink": "eth7"}, {"local": parse_v4("192.0.2.99")}, {"gbp": True}])
def test_an_existing_device_that_differs_is_not(wrong: dict[str, Any]) -> None:
    found = device(**wrong)
    assert own_state(backend(), found).links["flannel.1"].vxlan != found.vxlan
    assert own_state(backend(), found).links["flannel.1"].mac == found.mac


def test_nothing_is_taken_from_a_device_of_another_vni() -> None:
    """It has our name, but somebody else made it: its port is none that peers send to."""
    stranger = device(vni=77, port=4789, uplink=None)
    wanted = Vxlan(1, "eth0", parse_v4("192.0.2.1"), 0)
    assert own_state(backend(), stranger).links["flannel.1"].vxlan == wanted


def test_a_dual_stack_peer() -> None:
    peer = lease(subnet6="fd00:5:0:2::/64", mac6="02:00:00:00:06:02")
    items, reason = backend().peer(peer, facts())
    assert reason is None
    assert [str(item) for item in items] == [
        "FDB entry 02:00:00:00:00:02 -> 192.0.2.2 on flannel.1",
        "neighbour 10.5.2.0 -> 02:00:00:00:00:02 on flannel.1",
        "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1",
        "FDB entry 02:00:00:00:06:02 -> 2001:db8::2 on flannel-v6.1",
        "neighbour fd00:5:0:2:: -> 02:00:00:00:06:02 on flannel-v6.1",
        "route fd00:5:0:2::/64 via fd00:5:0:2:: dev flannel-v6.1",
    ]


def test_a_v4_only_node_uses_the_v4_half_of_a_dual_stack_peer_and_the_reverse() -> None:
    dual = lease(subnet6="fd00:5:0:2::/64")
    v4_only = backend(text='{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    assert len(v4_only.peer(dual, facts()).items) == 3
    assert len(backend(text=V6_ONLY).peer(dual, facts()).items) == 3
    items, reason = backend(text=V6_ONLY).peer(lease(), facts())
    assert items == ()
    assert reason == "it has no subnet of a family that is enabled here"


def test_one_bad_half_does_not_hide_the_good_one() -> None:
    items, reason = backend().peer(lease(subnet6="fd00:5:0:2::/64", mac6="nonsense"), facts())
    assert len(items) == 3
    assert reason is not None
    assert "fd00:5:0:2::/64" in reason


def test_direct_routing_only_where_the_peer_is_on_link() -> None:
    vxlan = backend(',"DirectRouting":true', '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    assert vxlan.wants_on_link
    known = facts(on_link=frozenset([parse_v4("192.0.2.2")]))
    (route,) = vxlan.peer(lease(), known).items
    assert str(route) == "route 10.5.2.0/24 via 192.0.2.2 dev eth0"
    assert len(vxlan.peer(lease("10.5.3.0/24", "198.51.100.7"), known).items) == 3


def test_key_names_in_backend_data_match_in_any_case() -> None:
    items, reason = backend().peer(lease(data={"vni": 1, "vtepMAC": "02:00:00:00:00:02"}), facts())
    assert reason is None
    assert format_mac(parse_mac("02:00:00:00:00:02")) in str(items[0])
    assert parse_prefix("10.5.2.0/24") == lease().subnet
