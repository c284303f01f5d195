"""What the host-gw backend tells its peers and asks of the kernel."""

from typing import Any

import pytest

from flannelpy.backends.hostgw import HostGwBackend
from flannelpy.model.address import parse_address, parse_v4, parse_v6
from flannelpy.model.kernel import Route, State
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import encode_attrs
from tests.builders import DUAL, V4, config, facts, lease, uplink

V6_ONLY = DUAL.replace('"Network":"10.5.0.0/16",', '"EnableIPv4":false,')
ON_LINK = frozenset([parse_v4("192.0.2.2"), parse_v6("2001:db8::2")])
REMEDY = ": put the nodes in one L2 network, or use vxlan with DirectRouting"


def backend(text: str = V4) -> HostGwBackend:
    return HostGwBackend(config(text.replace('"vxlan"', '"host-gw","VNI":"ignored"')))


def peer(**changes: Any) -> Lease:
    made = lease(backend_type="host-gw", **changes)
    return made._replace(attrs=made.attrs._replace(backend_data=None, backend_v6_data=None))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (V4, '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}'),
        (DUAL, '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}'),
        (V6_ONLY, '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}'),
    ],
    ids=["v4", "dual", "v6"],
)
def test_the_lease_is_flannels_and_nothing_is_made_for_ourselves(text: str, value: str) -> None:
    hostgw = backend(text)
    attrs, warnings = hostgw.attrs(facts(), None, (peer(),))
    assert encode_attrs(attrs) == value
    assert warnings == ()
    assert hostgw.own(lease("10.5.1.0/24")._replace(attrs=attrs), facts()) == State()
    assert hostgw.mtu(facts(uplink=uplink(9000))) == 9000


V4_ROUTE = Route(peer().subnet, "eth0", parse_v4("192.0.2.2"))  # type: ignore[arg-type]
V6_ROUTE = Route(peer(subnet6="fd00:5:0:2::/64").subnet6, "eth0", parse_v6("2001:db8::2"), metric=1024)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "routes"),
    [(V4, (V4_ROUTE,)), (DUAL, (V4_ROUTE, V6_ROUTE)), (V6_ONLY, (V6_ROUTE,))],
    ids=["v4", "dual", "v6"],
)
def test_a_peer_gets_one_plain_route_per_enabled_family(text: str, routes: tuple[Route, ...]) -> None:
    found = backend(text).peer(peer(subnet6="fd00:5:0:2::/64"), facts(on_link=ON_LINK))
    assert found == (routes, None)
    assert all(not route.onlink and route.protocol == 70 for route in routes)


def test_the_route_is_on_the_uplink_whatever_its_name() -> None:
    known = facts(uplink=uplink()._replace(name="bond0.7"), on_link=ON_LINK)
    ((route,), _reason) = backend().peer(peer(), known)
    assert str(route) == "route 10.5.2.0/24 via 192.0.2.2 dev bond0.7"


@pytest.mark.parametrize(
    ("text", "on_link", "routes", "reason"),
    [
        (V4, (), (), "its public IP 192.0.2.2 is not on-link on eth0"),
        # A neighbour of the peer in the same prefix says nothing about the peer.
        (V4, ("192.0.2.3",), (), "its public IP 192.0.2.2 is not on-link on eth0"),
        (V6_ONLY, ("192.0.2.2",), (), "its public IP 2001:db8::2 is not on-link on eth0"),
        (DUAL, ("192.0.2.2",), (V4_ROUTE,), "its public IP 2001:db8::2 is not on-link on eth0"),
        (DUAL, ("2001:db8::2",), (V6_ROUTE,), "its public IP 192.0.2.2 is not on-link on eth0"),
        (
            DUAL,
            (),
            (),
            "; ".join(f"its public IP {ip} is not on-link on eth0" for ip in ("192.0.2.2", "2001:db8::2")),
        ),
    ],
)
def test_a_peer_that_is_not_on_link_gets_no_route_and_a_reason(
    text: str, on_link: tuple[str, ...], routes: tuple[Route, ...], reason: str
) -> None:
    known = facts(on_link=frozenset(map(parse_address, on_link)))
    assert backend(text).peer(peer(subnet6="fd00:5:0:2::/64"), known) == (routes, reason + REMEDY)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (lease(), "its backend type is 'vxlan', ours is 'host-gw'"),
        (lease(backend_type=""), "its backend type is '', ours is 'host-gw'"),
        (lease(backend_type="Host-GW"), "its backend type is 'Host-GW', ours is 'host-gw'"),
        (
            peer(subnet="", subnet6="fd00:5:0:2::/64"),
            "it has no subnet of a family that is enabled here",
        ),
        (
            peer()._replace(attrs=peer().attrs._replace(public_ip=None)),
            "it has no public IP for 10.5.2.0/24",
        ),
    ],
)
def test_leases_that_are_of_no_use(found: Lease, reason: str) -> None:
    assert backend().peer(found, facts(on_link=ON_LINK)) == ((), reason)


def test_odd_data_in_a_peers_lease_does_not_matter() -> None:
    odd = peer()._replace(attrs=peer().attrs._replace(backend_data=[{"VtepMAC": 5}]))
    assert backend().peer(odd, facts(on_link=ON_LINK)) == ((V4_ROUTE,), None)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        (V4, {"public_ip": parse_v4("203.0.113.9")}, "--public-ip 203.0.113.9 is not the address 192.0.2.1"),
        (V6_ONLY, {"public_ipv6": parse_v6("2001:db8::9")}, "--public-ipv6 2001:db8::9 is not the address"),
    ],
)
def test_a_translated_public_ip_is_refused(text: str, changes: dict[str, Any], words: str) -> None:
    known = facts(uplink=uplink()._replace(**changes))
    for ask in (lambda: backend(text).mtu(known), lambda: backend(text).attrs(known, None, ())):
        with pytest.raises(ValueError, match=words) as caught:
            ask()
        assert "use vxlan" in str(caught.value)
        assert "\n" not in str(caught.value)
