"""The udp backend's fast path: whole daemons on veths, whose forwarders should have little to do."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import LabError, run, stop, wait_ready, wait_until
from tests.netns.nodes import PROGRAM, leases, log_of, reach, wait_for_log
from tests.netns.test_udp import (
    FLANNELD,
    UDP,
    V6,
    address,
    assert_none_lost,
    cluster,
    counters,
    flow,
    forwarder,
    gain,
    inject,
    needs_flannel,
    transfer,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]

BOTH = ["flannel0 egress", "eth0 ingress"]
AUTO = {**UDP, "Backend": {"Type": "udp"}}


def attached(node: Node) -> list[str]:
    """Where filters of ours hang."""
    found = []
    for where in BOTH:
        with suppress(LabError):  # there is no such device at the moment
            if "flannelpy-udp direct-action" in run(
                "tc", "filter", "show", "dev", *where.split(), netns=node.netns
            ):
                found.append(where)
    return found


def settled(lab: Lab, *nodes: Node) -> None:
    """Every node knows which peers have a fast path."""
    for node in nodes:
        wait_until(lambda node=node: attached(node) == BOTH, f"{node.name}'s filters")  # type: ignore[misc]
        assert node.daemon is not None
        assert "no fast path" not in log_of(node.daemon)


def hang(name: str, priority: int, node: Node) -> None:
    """Somebody else's program, which lets everything go on, on the ingress of eth0."""
    script = (
        "import sys; from flannelpy.kernel import bpf, fast_path;"
        "from flannelpy.kernel.netlink import NetlinkSocket; link = NetlinkSocket();"
        "fast_path._NAME, fast_path._PRIORITY = sys.argv[1], int(sys.argv[2]);"
        "code = bytes.fromhex('b7000000ffffffff9500000000000000');"
        "program = bpf.load_program('theirs', bpf.Program(code, ()), 'Apache-2.0', {});"
        "index = __import__('socket').if_nametoindex('eth0');"
        "link.request(fast_path.filter_put(index, fast_path._INGRESS, program))"
    )
    run(sys.executable, "-c", script, name, str(priority), netns=node.netns)


def carried_by_forwarder(lab: Lab, source: Node, target: Node) -> int:
    """How many of 20 pings and their answers the source's forwarder saw."""
    before = counters(source)
    words = ("ping", "-n", "-c", "20", "-i", "0.01", "-W", "2", address(target))
    assert " 0% packet loss" in run(*words, netns=source.pods[0].netns)
    found = gain(source, before)
    return found.get("sent_packets", 0) + found.get("received_packets", 0)


@pytest.mark.parametrize("config", [AUTO, {**AUTO, **V6}], ids=["v4", "dual"])
def test_the_kernel_carries_what_it_can(make_lab: Callable[..., Lab], config: dict[str, object]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    one, two = cluster(lab, config)
    settled(lab, one, two)
    assert [lease["BackendData"] for lease in leases(lab).values()] == [{"FastPath": True}] * 2
    wait_until(lambda: carried_by_forwarder(lab, one, two) == 0, "the forwarders to have nothing to do")
    reach(lab, one, address(two), 1472)
    words = ("ping", "-n", "-c", "1", "-W", "2", "-s", "4000", address(two))
    assert "1 received" in run(*words, netns=one.pods[0].netns)
    before = [counters(node) for node in (one, two)]
    for source, target in ((one, two), (two, one)):
        assert transfer(lab, source, target) == 1 << 22
    for node, had in zip((one, two), before, strict=True):
        assert gain(node, had).get("sent_packets", 0) == 0
    six = two.pods[0].address6
    if six is not None:
        reach(lab, one, str(six.ip), 1472)  # by the forwarder


def test_packets_flow_on_while_daemons_and_forwarders_come_and_go(lab: Lab) -> None:
    one, two = cluster(lab, AUTO)
    settled(lab, one, two)
    flowing = flow(lab, two, one, 600)
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([lab.start_daemon(one)])
    one.daemon.popen.kill()
    one.daemon.popen.wait()
    run("kill", "-9", str(forwarder(lab, two)))
    wait_ready([lab.start_daemon(one)])
    assert_none_lost(flowing, one, two)
    settled(lab, one, two)
    wait_until(lambda: carried_by_forwarder(lab, one, two) == 0, "the forwarders to have nothing to do")


@pytest.mark.parametrize("config", [UDP, AUTO], ids=["forwarder", "fast path"])
def test_what_a_restart_costs_in_a_pid_namespace_of_its_own(lab: Lab, config: dict[str, object]) -> None:
    """As in a container: the forwarder ends with the daemon. What the kernel carries goes on."""
    lab.put_config(config)
    one, two = lab.add_node(), lab.add_node()
    boxed = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *PROGRAM)
    wait_ready([lab.start_daemon(one, boxed), lab.start_daemon(two)])
    for node in (one, two):
        lab.add_pod(node)
    reach(lab, one, address(two))
    if config is AUTO:
        settled(lab, one, two)
    flowing = flow(lab, two, one, 400)
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([lab.start_daemon(one, boxed)])
    flowing.popen.wait(40)
    sent, received = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", log_of(flowing))[0])
    assert sent == 400
    if os.environ.get("FLANNELPY_TABLE"):
        sys.stderr.write(f"\n{sent - received} of {sent} pings lost, one each 10 ms\n")
    if config is AUTO:
        assert received == sent
    else:
        assert 0 < sent - received < 300


def test_a_filter_of_somebody_else_stays_and_ours_comes_back(lab: Lab) -> None:
    lab.put_config(AUTO)
    one, two = lab.add_node(), lab.add_node()
    run("tc", "qdisc", "add", "dev", "eth0", "clsact", netns=one.netns)
    hang("theirs", 7, one)
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    for node in (one, two):
        lab.add_pod(node)
    settled(lab, one, two)
    reach(lab, one, address(two))
    assert "theirs direct-action" in run("tc", "filter", "show", "dev", "eth0", "ingress", netns=one.netns)
    run("tc", "filter", "del", "dev", "eth0", "ingress", "prio", "18000", netns=one.netns)
    assert attached(one) == BOTH[:1]
    lab.ip(one.netns, "link set flannel0 mtu 1400")  # something that makes the daemon look
    wait_until(lambda: attached(one) == BOTH, "the filter to be back")
    lab.ip(one.netns, "link delete flannel0")
    wait_until(lambda: attached(one) == BOTH, "the device and its filter to be back")
    wait_until(lambda: carried_by_forwarder(lab, one, two) == 0, "the forwarders to have nothing to do")


def test_a_taken_place_is_left_alone_and_said_once(lab: Lab) -> None:
    lab.put_config(AUTO)
    one, two = lab.add_node(), lab.add_node()
    run("tc", "qdisc", "add", "dev", "eth0", "clsact", netns=one.netns)
    hang("theirs", 18000, one)
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    for node in (one, two):
        lab.add_pod(node)
    assert one.daemon is not None
    said = "the forwarder carries everything: filter priority 18000 is taken by 'theirs'"
    assert log_of(one.daemon).count(said) == 1
    assert "theirs direct-action" in run("tc", "filter", "show", "dev", "eth0", "ingress", netns=one.netns)
    reach(lab, one, address(two), 1472)
    for source, target in ((one, two), (two, one)):
        assert transfer(lab, source, target) == 1 << 22
    assert sorted(str(lease.get("BackendData")) for lease in leases(lab).values()) == [
        "None",
        "{'FastPath': True}",
    ]


def test_strangers_and_liars_are_the_forwarders_to_judge(lab: Lab) -> None:
    one, two = cluster(lab, AUTO)
    settled(lab, one, two)
    stranger = lab.add_node()
    target = one.pods[0].address
    assert target is not None
    own = two.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    before = counters(one)
    inject(stranger, one, f"{own}.77", str(target.ip), no_sum=True)
    inject(two, one, "10.5.222.9", str(target.ip), no_sum=True)
    inject(two, one, "", "", no_sum=True)
    wait_until(lambda: gain(one, before).get("drop_malformed"), "the last one")
    found = {name: count for name, count in gain(one, before).items() if name.startswith("drop")}
    assert found == {"drop_stranger": 1, "drop_spoofed": 1, "drop_malformed": 1}


def test_given_up_it_takes_datagrams_in_until_the_peers_know(lab: Lab) -> None:
    """A peer that hears late still sends unfinished checksums: they go on to be taken by the kernel."""
    one, two = cluster(lab, AUTO)
    settled(lab, one, two)
    assert one.daemon is not None
    assert two.daemon is not None
    stop([one.daemon, two.daemon])  # two hears nothing from now on, its programs go on
    lab.put_config(UDP)
    wait_ready([lab.start_daemon(one)])
    wait_for_log(one.daemon, "datagrams are taken in for 60 s more")
    assert attached(one) == ["eth0 ingress"]
    assert leases(lab)[one.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")].get("BackendData") is None
    assert transfer(lab, two, one) == 1 << 22  # fast there, slow back
    lab.put_config(AUTO)
    stop([one.daemon])
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    settled(lab, one, two)
    assert transfer(lab, one, two) == 1 << 22


def test_clean_up_takes_the_filters_off(lab: Lab) -> None:
    one, two = cluster(lab, AUTO)
    settled(lab, one, two)
    assert one.daemon is not None
    stop([one.daemon])
    run(*PROGRAM, "cleanup", "--yes", f"--subnet-file={one.subnet_file}", netns=one.netns)
    assert "flannelpy" not in run("tc", "filter", "show", "dev", "eth0", "ingress", netns=one.netns)


@needs_flannel
def test_a_flannel_beside_it_is_served_by_the_forwarder(lab: Lab) -> None:
    """On veths: a flannel could not finish the checksums."""
    lab.put_config(AUTO)
    ours, theirs, third = lab.add_node(), lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(ours)])
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(third)])
    for node in lab.nodes:
        lab.add_pod(node)
    settled(lab, ours, third)
    for source in lab.nodes:
        for target in lab.nodes:
            if source is not target:
                reach(lab, source, address(target), 1472)
                words = ("ping", "-n", "-c", "1", "-W", "2", "-s", "4000", address(target))
                assert "1 received" in run(*words, netns=source.pods[0].netns)
    for source, target in ((ours, theirs), (theirs, ours), (ours, third)):
        assert transfer(lab, source, target) == 1 << 22
