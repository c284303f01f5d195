"""Masquerade and forward rules over restarts, moves and changes of mode, and beside a real flannel."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import run, stop, wait_ready, wait_until
from tests.netns.rules_lab import (
    ALL,
    HIDDEN,
    MODES,
    Listener,
    cluster,
    config,
    listener,
    listing,
    lone,
    programs,
    start,
    tool,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(300)]

every_mode = pytest.mark.parametrize("mode", MODES)
OUTSIDE = "192.168.77.254"
"""An address of the underlay: the world, as pods see it."""
FLANNELD = os.environ.get("FLANNELD", "")


@every_mode
def test_no_packet_goes_without_its_rule_over_restarts(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = make_lab(ipv6=True)
    (one,) = cluster(lab, mode, 1)
    with listener(lab, lab.underlay, OUTSIDE) as (heard, port):
        script = f"i=0; while :; do i=$((i+1)); printf w$i >/dev/udp/{OUTSIDE}/{port}; sleep 0.002; done"
        lab.start("flow", one.pods[0].netns, ["bash", "-c", script])
        wait_until(heard.heard, "packets")
        whole = listing(one, mode)
        for _number in range(3):
            assert one.daemon is not None
            stop([one.daemon])
            wait_ready([start(lab, one, mode)])
        assert listing(one, mode) == whole
        sources = heard.heard()
        assert len(sources) > 100
        assert set(sources.values()) == {str(one.address)}


@pytest.mark.parametrize("other", [mode for mode in MODES if mode != "nftables"])
def test_another_mode_while_packets_flow(make_lab: Callable[..., Lab], other: str) -> None:
    """There and back, with a policy that drops what no rule of ours accepts: not one packet is lost."""
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config(other))
    node = lab.add_node()
    daemon = start(lab, node, other)
    wait_ready([daemon])
    lab.add_pod(node)
    env = node.subnet_env()
    if other == "iptables-nft":  # what legacy drops no rule in nftables can save
        run(tool(other, 32), "-P", "FORWARD", "DROP", netns=node.netns)
    with listener(lab, lab.underlay, OUTSIDE) as (heard, port):
        script = f"i=0; while :; do i=$((i+1)); printf w$i >/dev/udp/{OUTSIDE}/{port}; sleep 0.002; done"
        lab.start("flow", node.pods[0].netns, ["bash", "-c", script])
        wait_until(heard.heard, "packets")
        for mode, away in (("nftables", other), (other, "nftables")) * 2:
            lab.put_config(config(mode))
            wait_until(partial(_is_moved, node, away, mode), f"rules in {mode} only", 5)
            wait_until(partial(_has_more, heard, len(heard.heard()) + 50), "more packets", 5)
        found = heard.heard()
    numbers = sorted(int(word[1:]) for word in found)
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "packets were lost"
    assert set(found.values()) == {str(node.address)}
    assert node.subnet_env() == env
    log = daemon.log.read_text()
    assert log.count("EnableNFTables from") == 4
    assert "restart" not in log.replace("restart Docker", "")
    assert log.count(" ready: ") == 1


def _has_more(heard: Listener, packets: int) -> bool:
    return len(heard.heard()) > packets


def _is_moved(node: Node, away: str, here: str) -> bool:
    """Two accepts may stay in FORWARD of iptables-nft, where it drops."""
    left = listing(node, away)
    return "FLANNEL-" not in left and "flannel-ipv" not in left and listing(node, here) != ""


def test_a_mode_that_the_host_lacks_leaves_the_rules_as_they_are(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config("nftables"))
    node = lab.add_node()
    daemon = lab.start_daemon(node, (sys.executable, "-c", HIDDEN), flags=ALL)
    wait_ready([daemon])
    whole = listing(node, "nftables")
    lab.put_config(config("iptables-nft"))
    wait_until(lambda: "they stay as they are" in daemon.log.read_text(), "the reason", 5)
    assert listing(node, "nftables") == whole
    lab.put_config(config("nftables"))
    wait_until(lambda: "the rules are well again" in daemon.log.read_text(), "the end of it", 10)


@every_mode
def test_a_new_subnet_takes_its_rules_along(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = make_lab(ipv6=True)
    node = lone(lab, mode)
    old = node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")
    (key,) = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/", "--keys-only").split()
    other = {"PublicIP": "192.168.77.99", "PublicIPv6": "fd77::99", "BackendType": "vxlan",
             "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"},
             "BackendV6Data": {"VNI": 1, "VtepMAC": "02:00:00:00:01:99"}}  # fmt: skip
    lab.etcdctl("put", key, json.dumps(other))
    wait_until(lambda: node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/") != old, "another subnet", 70)
    new = node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")
    text = listing(node, mode)
    assert new in text
    assert old not in text


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in MODES for b in MODES if a != b])
def test_another_mode_leaves_nothing_of_the_first(
    make_lab: Callable[..., Lab], first: str, second: str
) -> None:
    lab = make_lab(ipv6=True)
    node = lone(lab, first)
    assert node.daemon is not None
    stop([node.daemon])
    lab.put_config(config(second))
    wait_ready([start(lab, node, second)])
    assert listing(node, second) != ""
    assert listing(node, first) == ""


@every_mode
def test_cleanup_shows_and_removes_the_rules_and_nothing_else(
    make_lab: Callable[..., Lab], mode: str
) -> None:
    lab = make_lab(ipv6=True)
    node = lone(lab, mode)
    assert node.daemon is not None
    stop([node.daemon])
    kind = "iptables-nft" if mode == "nftables" else mode
    run(tool(kind, 32), "-A", "FORWARD", "-s", "10.5.0.0/16", "-j", "ACCEPT", netns=node.netns)
    command = (sys.executable, "-m", "flannelpy", "cleanup", f"--subnet-file={node.subnet_file}")
    before = listing(node, mode)
    shown = run(*command, netns=node.netns)
    assert listing(node, mode) == before
    run(*command, "--yes", netns=node.netns)
    assert listing(node, mode) == ""
    assert "-A FORWARD -s 10.5.0.0/16 -j ACCEPT" in run(tool(kind, 32), "-S", netns=node.netns)
    assert ("table ip flannel-ipv4" if mode == "nftables" else "chain FLANNEL-POSTRTG") in shown


def test_a_blackhole_behind_the_bridge(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    (one,) = cluster(lab, "nftables", 1, "--ip-blackhole-route")
    subnet = one.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")

    def shown(family: str) -> str:
        return run("ip", family, "route", "show", "type", "blackhole", netns=one.netns)

    assert all("proto 70 metric 2147483647" in shown(family) for family in ("-4", "-6"))
    own = str(one.pods[0].address).partition("/")[0]
    assert lab.ping(one.netns, own, count=1).received
    run("ip", "route", "del", "blackhole", subnet, netns=one.netns)
    wait_until(lambda: subnet in shown("-4"), "it again", 1)


# --- beside a real flannel ---

needs_flannel = pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")


def settled(node: Node, mode: str) -> str:
    """A flannel's rules: it says that it is ready before they stand."""

    def done() -> str:
        text = listing(node, mode)
        accepts = [line for line in text.splitlines() if line.lower().endswith("accept")]
        return text if text.lower().count("masquerade ") == len(accepts) == 4 else ""

    return wait_until(done, "flannel's rules")


@needs_flannel
@pytest.mark.parametrize("mode", ["iptables-nft", "iptables-legacy"])
def test_the_listing_is_that_of_a_real_flannel(make_lab: Callable[..., Lab], mode: str) -> None:
    """Flannel's rules are right as they are: the take-over changes nothing. And back."""
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config(mode))
    node = lab.add_node()
    path = f"PATH={programs(lab.folder, mode)}:/usr/sbin:/usr/bin:/sbin:/bin"
    wait_ready([lab.start_daemon(node, ["env", path, FLANNELD], flags=ALL)])
    assert node.daemon is not None
    theirs = settled(node, mode)
    stop([node.daemon])
    wait_ready([start(lab, node, mode)])
    ours = listing(node, mode)
    if "v0.20" in FLANNELD:
        assert len(ours.splitlines()) == 24  # other rules, of which nothing is left
        return
    assert ours == theirs
    assert "rules:" not in node.daemon.log.read_text().rpartition("flannelpy 0")[2]
    stop([node.daemon])
    run(tool(mode, 32), "-t", "nat", "-F", netns=node.netns)
    wait_ready([start(lab, node, mode)])
    assert sorted(listing(node, mode).splitlines()) == sorted(ours.splitlines())
    stop([node.daemon])
    wait_ready([lab.start_daemon(node, ["env", path, FLANNELD], flags=ALL)])
    wait_until(lambda: sorted(listing(node, mode).splitlines()) == sorted(theirs.splitlines()), "the same")


@needs_flannel
@pytest.mark.skipif("v0.20" in FLANNELD, reason="that flannel has no nftables")
def test_a_real_flannel_and_we_share_the_nftables_tables(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config("nftables"))
    node = lab.add_node()
    wait_ready([lab.start_daemon(node, [FLANNELD], flags=ALL)])
    theirs = settled(node, "nftables")
    assert node.daemon is not None
    stop([node.daemon])
    wait_ready([start(lab, node, "nftables")])
    ours = listing(node, "nftables")
    different = set(ours.splitlines()) ^ set(theirs.splitlines())
    # The two rules that flannel has wrong: the fourth, and the mark without its mask. Per family.
    assert len(different) == 6, different
    stop([node.daemon])
    wait_ready([lab.start_daemon(node, [FLANNELD], flags=ALL)])
    wait_until(lambda: sorted(listing(node, "nftables").splitlines()) == sorted(theirs.splitlines()), "it")
