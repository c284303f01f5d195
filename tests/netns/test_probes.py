"""Peers are asked whether they are there: real daemons, and what is broken between them."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from flannelpy import control
from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import run, wait_ready, wait_until
from tests.netns import bad_card
from tests.netns.nodes import DUAL, PROGRAM, V4, cluster, log_of, reach, wait_for_log

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def probed(node: Node) -> dict[str, int]:
    """Layer at fault -> peers."""
    found = control.ask(control.path_for(str(node.subnet_file)), "status")["peers"]["troubled"]
    layers = [one["reason"].partition(":")[0] for one in found if one["state"] == "unreached"]
    return {layer: layers.count(layer) for layer in layers}


def counted(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = control.ask(control.path_for(str(node.subnet_file)), "probes")
    return found


def raw_sockets(node: Node) -> int:
    return len(run("ss", "--raw", "--all", "-n", "-H", netns=node.netns).splitlines())


def drop(node: Node, *words: str, table: str = "filter", chain: str = "INPUT") -> Callable[[], object]:
    """Drop what comes in; the way back."""
    rule = (chain, *words, "-j", "DROP")
    run("iptables", "-t", table, "-I", *rule, netns=node.netns)
    return partial(run, "iptables", "-t", table, "-D", *rule, netns=node.netns)


HOST_GW = {"Backend": {"Type": "host-gw"}}


@pytest.mark.parametrize(
    "config",
    [DUAL, {**V4, "Backend": {"Type": "udp"}}, {**DUAL, **HOST_GW}],
    ids=["vxlan", "udp", "host-gw"],
)
def test_a_healthy_network_is_reached_and_says_nothing(
    make_lab: Callable[..., Lab], config: dict[str, Any]
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config)
    nodes = [lab.add_node() for _number in range(3)]
    wait_ready([lab.start_daemon(node) for node in nodes])
    for node in nodes:
        assert node.daemon is not None
        wait_until(lambda node=node: counted(node).get("reached", 0) >= 4, "probes", 30)  # type: ignore[misc]
        assert set(counted(node)) == {"reached"}
        assert probed(node) == {}
        assert "is not reached" not in log_of(node.daemon)
        peers = control.ask(control.path_for(str(node.subnet_file)), "peers")
        assert all(0 < one[rtt] < 0.5 for one in peers for rtt in ("rtt", "underlay_rtt")), peers


def test_the_layer_at_fault_is_named_and_the_end_of_it(lab: Lab) -> None:
    """Four peers at a time: one behind a closed port, one that is cut off, and two with too small an MTU."""
    lab.put_config(V4)
    one, *others = [lab.add_node() for _number in range(5)]
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    assert one.daemon is not None
    wait_until(lambda: counted(one).get("reached", 0) >= 4, "probes", 30)
    faults = {
        "encapsulation": ("-p", "udp", "--dport", "8472"),
        "underlay": ("-s", str(one.address)),
        "mtu": ("-p", "udp", "--dport", "8472", "-m", "length", "--length", "1400:"),
        "underlay mtu": ("-m", "length", "--length", "1400:"),
    }
    undo = [drop(node, *words) for node, words in zip(others, faults.values(), strict=True)]
    wait_until(lambda: probed(one) == dict.fromkeys(faults, 1), "the faults", 60)
    for back in undo:
        back()
    wait_until(lambda: probed(one) == {}, "the end of them", 60)
    text = log_of(one.daemon)
    for node, layer in zip(others, faults, strict=True):
        key = node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
        assert len(re.findall(rf"peer {key} .* is not reached \(all\): {layer}: ", text)) == 1, text
    # Five are named in a round, more are counted.
    more = sum(int(count) for count in re.findall(r"and (\d+) more peers that are reached or not", text))
    assert len(re.findall("is reached again", text)) + more == len(faults), text


def test_a_card_that_makes_wrong_sums_is_named(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    take_out = bad_card.put_into(lab, one)
    reach(lab, one, str(two.pods[0].address).partition("/")[0])
    for node in (one, two):  # what comes in by it is as wrong
        wait_until(lambda node=node: probed(node) == {"checksum": 1}, "the fault", 60)  # type: ignore[misc]
    take_out()
    for node in (one, two):
        wait_until(lambda node=node: probed(node) == {}, "the end of it", 60)  # type: ignore[misc]


def test_without_a_tunnel_the_next_hop_is_asked(lab: Lab) -> None:
    """One peer has a bridge of pods and one has none: both answer. Then the network takes routed packets."""
    lab.put_config({**V4, **HOST_GW})
    one, with_pods, without = [lab.add_node() for _number in range(3)]
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    lab.add_pod(with_pods)
    wait_until(lambda: counted(one).get("reached", 0) >= 6, "probes", 60)
    assert set(counted(one)) == {"reached"}
    undo = [drop(node, "-d", "10.5.0.0/16", table="raw", chain="PREROUTING") for node in (with_pods, without)]
    wait_until(lambda: probed(one) == {"routing": 2}, "the fault", 60)
    for back in undo:
        back()
    wait_until(lambda: probed(one) == {}, "the end of it", 60)


def test_a_host_that_is_down_is_named_and_takes_no_readiness_away(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    assert one.daemon is not None
    run("ip", "link", "set", "eth0", "down", netns=two.netns)
    wait_for_log(one.daemon, "is not reached (all): underlay", 40)
    found = control.ask(control.path_for(str(one.subnet_file)), "status")
    assert (found["state"], found["faults"]) == ("degraded", [])
    assert "1 peer(s) not answering (all) probes" in found["flaws"][0]
    # Its lease goes, and the trouble with it.
    key = two.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
    lab.etcdctl("del", f"/coreos.com/network/subnets/{key}")
    wait_until(lambda: probed(one) == {}, "it is forgotten", 20)


def test_one_flag_turns_them_off(lab: Lab) -> None:
    lab.put_config(V4)
    off, on = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(off, flags=["--peer-probes=false"]), lab.start_daemon(on)])
    wait_until(lambda: raw_sockets(on) == 2, "the sockets of one that probes")
    assert raw_sockets(off) == 0
    assert counted(off) == {}


def test_without_the_privilege_that_is_said_once(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    daemon = lab.start_daemon(node, ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", *PROGRAM))
    wait_for_log(daemon, "peers are not probed: Operation not permitted; CAP_NET_RAW is needed", 20)
    wait_ready([daemon])
