"""What a whole daemon says of itself: /healthz, /readyz, `flannelpy status`, the watchdog."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import Process, inside, run, stop, wait_ready, wait_until
from tests.netns.nodes import PROGRAM, V4, cluster, peer, put_lease, wait_for_log

pytestmark = [pytest.mark.root, pytest.mark.etcd]

PORT = "18471"
HTTP = (
    "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=5);"
    "c.request('GET', sys.argv[2]); a = c.getresponse(); print(a.status); print(a.read().decode())"
)


class Page(NamedTuple):
    status: int
    lines: list[str]


def page(node: Node, path: str) -> Page:
    """Asked from the node itself."""
    status, *lines = run(PROGRAM[0], "-c", HTTP, PORT, path, netns=node.netns).splitlines()
    return Page(int(status), [line for line in lines if line])


def status(node: Node, *flags: str) -> tuple[int, str]:
    """(exit code, output) of `flannelpy status`."""
    words = inside(node.netns, *PROGRAM, "status", f"--subnet-file={node.subnet_file}", *flags)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    assert done.stderr == ""
    return done.returncode, done.stdout


def as_json(node: Node, *flags: str) -> tuple[int, dict[str, Any]]:
    code, text = status(node, "--output=json", *flags)
    return code, json.loads(text)


def stand_still(process: Process) -> None:
    """Stop it until SIGCONT; the signal is on its way when kill() returns."""
    process.popen.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.popen.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")


def serving(lab: Lab, node: Node, *flags: str) -> None:
    lab.start_daemon(node, flags=[f"--healthz-port={PORT}", "--healthz-ip=127.0.0.1", *flags])


def test_from_the_first_second_to_an_outage(lab: Lab) -> None:
    node = lab.add_node()
    code, text = status(node)
    assert code == 12
    assert "no flannelpy daemon answers" in text
    assert "nothing of flannelpy's is on this host" in text

    serving(lab, node)
    assert node.daemon is not None
    wait_for_log(node.daemon, "no network config yet")
    assert page(node, "/healthz") == Page(200, ["flanneld is running"])
    waiting = page(node, "/readyz")
    assert waiting.status == 503
    assert waiting.lines[0] == "flanneld is not ready yet"
    assert "no network config yet" in waiting.lines[1]
    code, found = as_json(node)
    assert (code, found["state"], found["lease"]) == (11, "not ready", None)
    assert "no network config yet" in found["summary"]

    lab.put_config(V4)
    put_lease(lab, "10.5.200.0-24", peer(99))
    put_lease(lab, "10.9.9.0-24", peer(98))  # outside of the network
    wait_ready([node.daemon])
    wait_until(lambda: as_json(node)[1]["peers"]["programmed"] == 1, "the peer")
    code, found = as_json(node, "--peers")
    assert (code, found["state"], found["faults"]) == (10, "degraded", [])
    assert found["flaws"] == ["1 peer(s) not (all) programmed: 10.9.9.0-24"]
    assert found["network"]["devices"] == ["flannel.1"]
    assert found["lease"]["subnets"][0].startswith("10.5.")
    states = {one["key"]: one["state"] for one in found["all_peers"]}
    assert states == {"10.9.9.0-24": "refused", "10.5.200.0-24": "programmed"}
    assert next(iter(states)) == "10.9.9.0-24", "what is wrong comes first"
    lab.etcdctl("del", "/coreos.com/network/subnets/10.9.9.0-24")
    wait_until(lambda: status(node)[0] == 0, "all is well")
    assert page(node, "/readyz") == Page(200, ["flanneld is ready"])

    lab.ip(node.netns, "neigh del 10.5.200.0 dev flannel.1")
    wait_until(lambda: as_json(node)[1]["repairs"]["count"] > 0, "a repair")
    last = as_json(node)[1]["repairs"]["last"]
    assert last["what"].startswith("add neighbour 10.5.200.0")
    assert "by somebody" in last["cause"]
    text = status(node)[1]
    assert "repairs   1 since the start; the last one" in text

    assert lab.etcd is not None
    stop([lab.etcd])
    wait_until(lambda: status(node)[0] == 10, "the outage is noticed", 20)
    away = page(node, "/readyz")
    assert (away.status, away.lines[0]) == (200, "flanneld is ready")
    assert "the network goes on with what was known at 2" in away.lines[1]
    assert "store     does not answer for" in status(node)[1]

    stop([node.daemon])
    code, text = status(node)
    assert code == 12
    assert "packets may flow" in text
    assert "device flannel.1" in text


def test_a_peer_that_the_kernel_refuses_takes_readiness_away_and_gives_it_back(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 0) or [lab.add_node()]
    lab.ip(node.netns, "route add 10.5.200.0/24 via 192.168.77.254 dev eth0 proto static")
    put_lease(lab, "10.5.200.0-24", peer(99))
    serving(lab, node)
    assert node.daemon is not None
    wait_ready([node.daemon])
    assert page(node, "/readyz").status == 200, "it may be about to be put there"
    wait_until(lambda: page(node, "/readyz").status == 503, "the peer is missed", 20)
    assert page(node, "/readyz").lines[1] == "1 of 1 peer(s) not in the kernel: 10.5.200.0-24"
    code, found = as_json(node)
    assert code == 11
    assert found["peers"]["troubled"][0]["state"] == "missing"
    assert page(node, "/healthz").status == 200
    lab.ip(node.netns, "route del 10.5.200.0/24 via 192.168.77.254 dev eth0 proto static")
    wait_until(lambda: page(node, "/readyz").status == 200, "the peer is there", 20)


def test_an_own_device_that_cannot_be_made_is_not_ready(lab: Lab) -> None:
    node = lab.add_node()
    lab.put_config(V4)
    serving(lab, node)
    assert node.daemon is not None
    wait_ready([node.daemon])
    # The kernel allows one device per VNI and port: while this one is there, ours cannot be.
    stand_still(node.daemon)  # or it would be faster
    lab.ip(node.netns, "link del flannel.1", "link add thief type vxlan id 1 dev eth0 dstport 8472")
    node.daemon.popen.send_signal(signal.SIGCONT)
    wait_until(lambda: page(node, "/readyz").status == 503, "the device is missed")
    assert any("flannel.1" in line for line in page(node, "/readyz").lines)
    lab.ip(node.netns, "link del thief")
    wait_until(lambda: page(node, "/readyz").status == 200, "the device is back", 20)


def test_a_daemon_that_stands_still_answers_nobody(lab: Lab) -> None:
    """What a watchdog and a probe see of a process that hangs."""
    node = lab.add_node()
    lab.put_config(V4)
    serving(lab, node)
    assert node.daemon is not None
    wait_ready([node.daemon])
    stand_still(node.daemon)
    try:
        with pytest.raises(Exception, match=r"timed out|TimeoutError"):
            page(node, "/healthz")
        code, text = status(node)
        assert code == 12
        assert "gave no proper answer: timed out" in text
    finally:
        node.daemon.popen.send_signal(signal.SIGCONT)
    assert page(node, "/healthz").status == 200
