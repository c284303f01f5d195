"""The lab itself, without a daemon of ours: what the demo and all tests in this folder stand on."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from flannelpy.cli.lab import UNDERLAY6, Lab, leftovers
from flannelpy.cli.processes import LabError, inside, run, wait_ready, wait_until

pytestmark = pytest.mark.root

ENV = "FLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_SUBNET=10.9.{0}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"


def test_nodes_reach_each_other_and_etcd_over_the_underlay(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    first, second = lab.add_node(), lab.add_node()
    for target in (str(second.address), str(UNDERLAY6[second.number])):
        assert lab.ping(first.netns, target, size=1500).received == 3
        assert lab.ping(first.netns, target, size=1501).received == 0  # the packets must not be fragmented
    run("etcdctl", f"--endpoints={lab.etcd_url}", "put", "colour", "blue", netns=second.netns)
    assert lab.etcdctl("get", "--print-value-only", "colour").strip() == "blue"


def test_pods_sit_in_the_subnet_of_their_node_and_are_forwarded(lab: Lab) -> None:
    for number in (1, 2):
        node = lab.add_node()
        node.subnet_file.write_text(ENV.format(number))
        lab.add_pod(node)
    first, second = lab.nodes
    target = second.pods[0]
    assert str(target.address) == "10.9.2.2/24"
    assert lab.ping(first.pods[0].netns, "10.9.2.2").received == 0
    lab.ip(first.netns, f"route add 10.9.2.0/24 via {second.address}")
    lab.ip(second.netns, f"route add 10.9.1.0/24 via {first.address}")
    assert lab.ping(first.pods[0].netns, "10.9.2.2", size=1450).received == 3
    assert lab.ping(lab.add_pod(second).netns, "10.9.2.2").received == 3


def test_etcd_keeps_its_data_over_a_restart(lab: Lab) -> None:
    lab.put_config({"Network": "10.9.0.0/16"})
    assert lab.etcd is not None
    lab.etcd.popen.kill()
    lab.etcd.popen.wait()
    lab.start_etcd()
    assert "10.9.0.0/16" in lab.etcdctl("get", "/coreos.com/network/config")


def test_a_daemon_tells_when_it_is_ready(lab: Lab) -> None:
    node = lab.add_node()
    tell = "import os, signal, socket; to = os.environ['NOTIFY_SOCKET']; talk = socket.socket(1, 2)\n"
    tell += (
        "talk.sendto(b'STATUS=waiting', to); talk.sendto(b'STATUS=all is well\\nREADY=1', to); signal.pause()"
    )
    process = lab.start_daemon(node, [sys.executable, "-c", tell])
    wait_ready([process])
    assert process.status == "all is well"
    assert process.ready_after is not None
    assert 0 < process.ready_after < 20


def test_a_daemon_that_ends_early_or_stays_silent_is_named_with_its_log(lab: Lab) -> None:
    node = lab.add_node()
    ends = lab.start_daemon(node, ["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(LabError, match="node1: exit code 3") as caught:
        wait_ready([ends])
    assert caught.value.log is not None
    assert caught.value.log.read_text() == "no such thing\n"
    with pytest.raises(LabError, match=r"node1: not ready after 0\.2 s"):
        wait_ready([lab.start_daemon(node, ["sh", "-c", "exec sleep 60"])], 0.2)


def test_leaving_removes_namespaces_and_kills_what_runs_in_them(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    node = lab.add_node()
    straggler = subprocess.Popen(inside(node.netns, "sleep", "60"))
    stubborn = lab.start(
        "stubborn", node.netns, ["sh", "-c", "trap '' TERM; echo; while :; do sleep 60; done"]
    )
    wait_until(stubborn.log.read_text, "the trap to be set")
    wait_until(
        lambda: run("ip", "netns", "pids", node.netns).split().count(str(straggler.pid)), "the straggler"
    )
    lab.patience = 0.3
    lab.close()
    assert straggler.wait(5) == -9
    assert stubborn.popen.poll() == -9
    assert leftovers(lab.prefix) == []
    assert not lab.folder.exists()
