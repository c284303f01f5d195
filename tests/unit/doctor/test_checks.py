"""What the checks make of facts that a test cannot bring about, or only with great effort."""

from typing import Any

import pytest

from flannelpy.backend import load
from flannelpy.doctor import host, paths, store
from flannelpy.doctor.checks import examine
from flannelpy.doctor.facts import Daemon, Facts, Host, MacPolicy, Member, Overlay, Path, Store
from flannelpy.doctor.finding import Finding
from flannelpy.doctor.overlay import tables
from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.kernel import BLACKHOLE, Link, Route
from flannelpy.model.plan import Put, Remove
from flannelpy.model.subnet import Previous
from tests.builders import config

HOST = Host(True, {}, {}, (), {}, "/run/flannel/subnet.env", Previous(), None, has_env=True)
STORE = Store("http://10.0.0.1:2379", "/net/config", None, False, 0.002, (), None)
PEER = Path("10.5.2.0/24", parse_address("192.0.2.2"), b"\x02\0\0\0\0\x02", 8472, 1500, 1450)


def overlay(**fields: Any) -> Overlay:
    net = config()
    return Overlay(net, load(net), None, "eth0", None, None, (), None)._replace(**fields)


def facts(**fields: Any) -> Facts:
    return Facts(1e9, Daemon(True, True, 7, {"faults": []}), HOST, STORE, None)._replace(**fields)


def judged(**fields: Any) -> Finding:
    (one,) = paths.paths(facts(overlay=overlay(), paths=(PEER._replace(**fields),)))
    return one


def test_nothing_known_is_nothing_wrong() -> None:
    assert examine(facts()) == ()
    assert examine(facts(store=None, host=HOST._replace(features={"vxlan": None}))) == ()


def test_a_kernel_without_vxlan_is_told_with_the_module() -> None:
    told = facts(overlay=overlay(), host=HOST._replace(features={"vxlan": "Operation not supported"}))
    (one,) = host.kernel_features(told)
    assert one.check == "kernel-feature"
    assert "modprobe vxlan" in one.remedy
    assert "Operation not supported" in one.what


def test_a_kubelet_without_br_netfilter() -> None:
    (one,) = host.kernel_features(facts(host=HOST._replace(has_kubelet=True)))
    assert (one.check, one.severity) == ("bridge-nf", "warning")


@pytest.mark.parametrize(("ahead", "count"), [(0.0, 0), (4.9, 0), (-4.9, 0), (6.0, 1), (-3600.0, 1)])
def test_clocks(ahead: float, count: int) -> None:
    members = (Member("http://10.0.0.1:2379", None, clock_ahead=ahead),)
    assert len(list(store.clock(facts(store=STORE._replace(members=members))))) == count


def test_a_member_that_is_full_and_one_that_is_gone() -> None:
    members = (Member("a", None, "ALARM NOSPACE"), Member("b", "Connection refused"))
    found = {one.check: one for one in store.store(facts(store=STORE._replace(members=members)))}
    assert found.keys() == {"store-alarm", "store-member"}
    assert "etcdctl defrag" in found["store-alarm"].remedy


def test_a_slow_store_and_certificates_that_end_soon() -> None:
    soon = STORE._replace(seconds=2.5, cert_file="/etc/c.pem", expires=1e9 + 3600)
    assert [one.check for one in examine(facts(store=soon))] == ["store-latency", "certificate"]
    ended = STORE._replace(trouble="TLS handshake failed", cert_file="/etc/c.pem", expires=1e9 - 1)
    (one,) = store.store(facts(store=ended))
    assert one.check == "certificate"
    assert "/etc/c.pem" in one.what


def test_where_options_are_dropped_the_doubt_is_told() -> None:
    one = judged(underlay=0.001, arrives={"closed": False})
    assert one.check == "port-blocked"
    assert "flannelpy capture" in one.remedy


def test_vxlan_that_passes_on_another_port() -> None:
    told = {"closed": True, "plain": True, "vxlan": False, "4789": True, "6081": False}
    one = judged(underlay=0.001, arrives=told)
    assert one.check == "vxlan-eaten"
    assert "(4789)" in one.remedy
    one = judged(underlay=0.001, arrives={"closed": True, "plain": True, "vxlan": False, "4789": False})
    assert "Backend.Type: udp" in one.remedy


def test_an_underlay_that_answers_no_echo_is_no_fault() -> None:
    path = PEER._replace(tunnel=0.001, overlay=0.001, overlay_full=True)
    assert not list(paths.paths(facts(overlay=overlay(), paths=(path,))))


def test_fragmentation_is_a_warning_and_a_loss_an_error() -> None:
    good = {"underlay": 0.001, "tunnel": 0.001, "overlay": 0.001, "udp_plain": True, "udp_offloaded": True}
    one = judged(**good, underlay_full=False, underlay_fits=1400, overlay_full=True)
    assert (one.check, one.severity) == ("path-mtu", "warning")
    one = judged(**good, underlay_full=False, underlay_fits=1400, overlay_full=False, out_full=True)
    assert (one.check, one.severity) == ("path-mtu", "error")
    assert "way back" in one.what


def test_sums_that_only_the_processor_gets_right() -> None:
    one = judged(underlay=0.001, tunnel=0.001, overlay=0.001, overlay_full=True, udp_plain=True)
    assert one.check == "checksum"


ROUTED = PEER._replace(port=None, mac=None, mtu=1500, device="eth0", underlay=0.001, underlay_full=True)


def test_without_a_tunnel_the_network_itself_must_carry_packets_and_sum_them() -> None:
    (one,) = paths.paths(facts(overlay=overlay(), paths=(ROUTED._replace(),)))
    assert (one.check, one.severity) == ("not-routed", "error")
    # Where the host's own tables are at fault that is said, and no more.
    wrong = overlay(confirmed=(Remove(Route(parse_prefix("10.5.3.0/24"), BLACKHOLE, None)),))
    assert not list(paths.paths(facts(overlay=wrong, paths=(ROUTED,))))
    small = ROUTED._replace(overlay=0.001, overlay_full=False, udp_plain=True, udp_offloaded=True)
    (one,) = paths.paths(facts(overlay=overlay(), paths=(small,)))
    assert one.check == "path-mtu"
    (one,) = paths.paths(
        facts(overlay=overlay(), paths=(small._replace(overlay_full=True, udp_offloaded=False),))
    )
    assert one.check == "checksum"
    assert "ethtool -K eth0 " in one.remedy


@pytest.mark.parametrize(
    ("ahead", "whose"),
    [
        ((0.0, 4.9, None), None),
        ((0.0, -60.0), "the host"),
        ((-60.0, -61.0), "this host"),
        ((60.0,), "the host"),
    ],
)
def test_clocks_of_peers(ahead: tuple[float | None, ...], whose: str | None) -> None:
    good = PEER._replace(underlay=0.001, tunnel=0.001, overlay=0.001, udp_plain=True, udp_offloaded=True)
    told = tuple(good._replace(clock_ahead=one) for one in ahead)
    found = list(paths.paths(facts(overlay=overlay(), paths=told)))
    assert [one.check for one in found] == ["clock"] * (whose is not None)
    assert all(f" on {whose}" in one.remedy for one in found)


@pytest.mark.parametrize(
    ("policy", "is_named"),
    [(None, False), (MacPolicy("none", "/f"), False), (MacPolicy("persistent", "/usr/lib/99.link"), True)],
)
def test_udev_is_named_for_a_wrong_mac_where_it_may_have_done_it(
    policy: MacPolicy | None, is_named: bool
) -> None:
    link = Link("flannel.1", "vxlan", b"\x02\0\0\0\0\x01", 1450, up=True)
    told = facts(overlay=overlay(confirmed=(Put(link, link._replace(mac=b"\x02\0\0\0\0\x02")),)))
    (one,) = tables(told._replace(host=HOST._replace(mac_policy=policy)))
    assert one.check == "mac"
    assert ("/usr/lib/99.link says MACAddressPolicy=persistent" in one.remedy) == is_named


@pytest.mark.parametrize(
    ("mode", "packets", "days", "count"),
    [("count", 0, 1.5, 1), ("count", 0, 0.9, 0), ("count", 3, 9, 0), ("enforce", 0, 9, 0), (None, 0, 9, 0)],
)
def test_a_filter_that_counted_nobody_for_a_day_may_drop(
    mode: str | None, packets: int, days: float, count: int
) -> None:
    status: dict[str, Any] = {"faults": [], "peer_filter": mode, "unexplained_packets": packets}
    status["started"] = 1e9 - days * 86_400
    found = examine(facts(daemon=Daemon(True, True, 7, status)))
    assert [(one.check, one.severity) for one in found] == [("peer-filter", "note")] * count
    assert all("--peer-filter=enforce" in one.remedy for one in found)
