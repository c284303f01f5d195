"""A daemon may end at any moment: the next start makes everything right, and no packet is lost meanwhile."""

import json
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import Process, run, wait_ready, wait_until
from tests.netns.test_repair import CONFIG, picture

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(240)]

PEERS = 3
PACKETS = 6000


def put_peers(lab: Lab) -> None:
    for number in range(1, PEERS + 1):
        lease = {
            "PublicIP": f"192.168.77.{200 + number}",
            "PublicIPv6": f"fd77::{200 + number}",
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": f"02:00:00:00:04:0{number}"},
            "BackendV6Data": {"VNI": 1, "VtepMAC": f"02:00:00:00:06:0{number}"},
        }
        key = f"{ETCD_PREFIX}/subnets/10.5.{200 + number}.0-24&fd00:5:0:{200 + number}::-64"
        lab.etcdctl("put", key, json.dumps(lease))


def end(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()


def ends_or_is_ready(process: Process) -> bool:
    process.listen()
    return process.popen.poll() is not None or process.ready_after is not None


def nexthops(lab: Lab, node: Node) -> list[dict[str, Any]]:
    return lab.ip_json(node.netns, "nexthop show")


def assert_nexthops_are_whole(lab: Lab, node: Node) -> None:
    """One object per peer and family, each used by its route: none twice, none left over."""
    found = nexthops(lab, node)
    assert len({(one["dev"], one["gateway"]) for one in found}) == len(found) == 2 * PEERS
    routes = "".join(run(*f"ip {family} route".split(), netns=node.netns) for family in ("-4", "-6"))
    assert {one["id"] for one in found} == {int(number) for number in re.findall(r"nhid (\d+)", routes)}


def test_a_kill_after_every_single_change_is_mended_by_the_next_start(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(CONFIG)
    put_peers(lab)
    node = lab.add_node()

    def start_whole() -> str:
        daemon = lab.start_daemon(node)
        wait_ready([daemon])
        end(daemon)
        return picture(lab, node)

    whole = start_whole()
    assert_nexthops_are_whole(lab, node)
    assert whole.count("proto 70") == 2 * PEERS
    changes = 0
    while True:
        changes += 1
        lab.ip(node.netns, "link del flannel.1", "link del flannel-v6.1")
        assert nexthops(lab, node) == []
        node.subnet_file.unlink(missing_ok=True)
        mortal = lab.start_daemon(node, [sys.executable, "-m", "tests.netns.mortal_daemon", str(changes)])
        wait_until(lambda: ends_or_is_ready(mortal), f"the end after {changes} changes")  # noqa: B023
        if mortal.ready_after is not None:
            break
        assert mortal.popen.wait() == -signal.SIGKILL, f"after {changes} changes"
        assert start_whole() == whole, f"killed after {changes} changes"
        assert_nexthops_are_whole(lab, node)
    # Two devices with three requests and an address each; nexthop, FDB entry, neighbour and route per peer.
    assert changes > 2 * 4 + 2 * PEERS * 4


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_no_packet_is_lost_over_a_restart(lab: Lab, backend: str) -> None:
    """1,000 packets a second between two pods, while both nodes' daemons are stopped, killed and started."""
    lab.put_config({"Network": "10.5.0.0/16", "Backend": {"Type": backend}})
    one, two = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(one), lab.start_daemon(two)])
    for node in (one, two):
        lab.add_pod(node)
        wait_until(lambda node=node: lab.ip_json(node.netns, "route show proto 70"), "the peer")  # type: ignore[misc]
    source, target = one.pods[0].netns, str(two.pods[0].address).partition("/")[0]
    wait_until(lambda: lab.ping(source, target, count=1).received, "the overlay")
    flow = lab.start(
        "flow", source, ["ping", "-n", "-q", "-i", "0.001", "-c", str(PACKETS), "-W", "1", target]
    )
    for number in (signal.SIGTERM, signal.SIGKILL):
        for node in (one, two):
            assert node.daemon is not None
            node.daemon.popen.send_signal(number)
            node.daemon.popen.wait()
        wait_ready([lab.start_daemon(one), lab.start_daemon(two)])
    assert flow.popen.poll() is None, "the flow has to last longer than the restarts"
    flow.popen.wait(60)
    assert f"{PACKETS} packets transmitted, {PACKETS} received, 0% packet loss" in flow.log.read_text()
