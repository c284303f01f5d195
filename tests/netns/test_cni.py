"""Pods made by the CNI plugin alone, with real bridge and host-local, on nodes that run real daemons."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import inside, stop, wait_ready, wait_until
from tests.netns.nodes import V4, V6
from tests.unit.cni.calls import OURS, Answer, Host

PLUGINS = os.environ.get("CNI_PLUGINS", "/usr/lib/cni")
FLANNELD, FLANNEL_CNI = os.environ.get("FLANNELD", ""), os.environ.get("FLANNEL_CNI", "")

pytestmark = [
    pytest.mark.root,
    pytest.mark.etcd,
    pytest.mark.skipif(
        not Path(PLUGINS, "bridge").exists(),
        reason="needs bridge: apt-get install containernetworking-plugins",
    ),
]


class Kubelet:
    """What makes the pods of a node: it knows nothing but how to call the plugin."""

    def __init__(self, lab: Lab, node: Node) -> None:
        self.lab = lab
        self.node = node
        folder = node.folder / "cni"
        folder.mkdir()
        self.host = Host(folder, netns=node.netns, path=PLUGINS)
        self.host.conf |= {
            "subnetFile": str(node.subnet_file),
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
            "ipam": {"dataDir": str(folder / "ipam")},
        }

    def call(self, command: str, netns: str, **conf: Any) -> Answer:
        variables = {"CNI_CONTAINERID": netns, "CNI_NETNS": f"/run/netns/{netns}", "CNI_IFNAME": "eth0"}
        return self.host.call(command, variables=variables, conf={**self.host.conf, **conf})

    def status(self) -> Answer:
        """Whether pods can be added; what it is asked by is newer than the plugins of Debian 12."""
        recorder = str(self.host.recorder())
        conf = {**self.host.conf, "cniVersion": "1.1.0"}
        return self.host.call("STATUS", variables={"CNI_PATH": recorder}, conf=conf)

    def add(self, name: str) -> tuple[str, list[str]]:
        """A new pod -> its namespace and its addresses."""
        netns = self.lab._add_namespace(f"{self.node.name}-{name}")
        answer = self.call("ADD", netns)
        assert answer.code == 0, answer
        return netns, [ip["address"].partition("/")[0] for ip in answer.json["ips"]]


def kubelets(lab: Lab, config: dict[str, Any], nodes: int = 3) -> list[Kubelet]:
    lab.put_config(config)
    for _number in range(nodes):
        lab.add_node()
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    return [Kubelet(lab, node) for node in lab.nodes]


def assert_all_reach_all(lab: Lab, pods: Sequence[tuple[str, list[str]]]) -> None:
    for netns, _ in pods:
        for other, addresses in pods:
            if other != netns:
                for address in addresses:
                    wait_until(
                        lambda n=netns, a=address: lab.ping(n, a, size=1300, count=1).received,  # type: ignore[misc]
                        f"{netns} to reach {address}",
                    )


PACKETS = 12000
"""Enough for three restarts."""


def flow(source: str, target: str, log: Path) -> "subprocess.Popen[bytes]":
    """1,000 packets a second; when it ends, the count stands in the log."""
    ping = ("ping", "-n", "-q", "-i", "0.001", "-c", str(PACKETS), "-s", "1200", target)
    command = inside(source, "env", "LC_ALL=C", *ping)
    with log.open("wb") as output:
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=output, stderr=output)


def assert_none_lost(packets: "subprocess.Popen[bytes]", log: Path) -> None:
    """What was done was done under the flow, and every single packet came back."""
    assert packets.poll() is None
    packets.wait(60)
    assert f"{PACKETS} packets transmitted, {PACKETS} received, 0% packet loss" in log.read_text()


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_pods_of_all_nodes_reach_each_other_and_daemons_may_be_restarted(lab: Lab, backend: str) -> None:
    """Two pods on each of three nodes; then every daemon is restarted, one by one, while packets flow."""
    made = kubelets(lab, {**V4, "Backend": {"Type": backend}})
    pods = [one.add(f"pod{number}") for one in made for number in (1, 2)]
    assert len({address for _, addresses in pods for address in addresses}) == 6
    assert_all_reach_all(lab, pods)

    log = lab.folder / "flow"
    packets = flow(pods[0][0], pods[-1][1][0], log)
    for node in lab.nodes:
        assert node.daemon is not None
        stop([node.daemon])
        wait_ready([lab.start_daemon(node)])
    assert_none_lost(packets, log)

    late = made[0].add("late")
    assert_all_reach_all(lab, [late, pods[-1]])
    for one in made:
        for netns in (netns for netns, _ in pods if netns.startswith(one.node.netns)):
            assert one.call("DEL", netns).code == 0
            assert one.call("DEL", netns).code == 0
        left = {late[0], f"{late[0]}@eth0"} if one is made[0] else set()
        assert {path.name for path in one.host.state.iterdir()} == left


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
@pytest.mark.parametrize("nftables", [False, True], ids=["iptables", "nftables"])
def test_the_daemon_needs_no_more_than_its_pod_has(lab: Lab, backend: str, nftables: bool) -> None:
    """As in deploy/kubernetes: two capabilities, no new privileges, /proc/sys read-only."""
    confine = """
        mount --bind /proc/sys /proc/sys
        mount -o remount,bind,ro /proc/sys
        exec setpriv --no-new-privs --bounding-set=-all,+net_admin,+net_raw --inh-caps=-all "$@"
    """
    program = ["unshare", "--mount", "sh", "-ec", confine, "sh", sys.executable, "-m", "flannelpy"]
    lab.put_config({**V4, "Backend": {"Type": backend}, "EnableNFTables": nftables})
    for _number in range(2):
        lab.add_node()
    flags = ["--ip-masq", "--iptables-forward-rules=true"]
    wait_ready([lab.start_daemon(node, program, flags=flags) for node in lab.nodes])
    made = [Kubelet(lab, node) for node in lab.nodes]
    assert_all_reach_all(lab, [one.add("pod") for one in made])
    for node in lab.nodes:
        assert node.daemon is not None
        log = node.daemon.log.read_text()
        assert "ERROR" not in log, log
        status = Path(f"/proc/{node.daemon.popen.pid}/status").read_text()
        assert "CapEff:\t0000000000003000\n" in status


def test_dual_stack(make_lab: Any) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    made = kubelets(lab, {**V4, **V6}, nodes=2)
    pods = [one.add("pod") for one in made]
    assert all(len(addresses) == 2 for _, addresses in pods)
    assert_all_reach_all(lab, pods)


def test_a_node_without_its_daemon_keeps_deleting(lab: Lab) -> None:
    """Before there is a daemon, the reason is told; after it, pods can be deleted and addresses come back."""
    lab.put_config(V4)
    node = lab.add_node()
    one = Kubelet(lab, node)
    netns = lab._add_namespace("early")
    answer = one.call("ADD", netns)
    assert (answer.code, answer.json["code"]) == (1, 11)
    assert "no flannelpy daemon answers on this node" in answer.json["msg"]
    assert lab.etcd is not None
    stop([lab.etcd])
    daemon = lab.start_daemon(node)
    wait_until(
        lambda: "etcd cannot be reached" in daemon_says(one, netns),
        "the daemon to say that it waits for etcd",
    )
    lab.start_etcd()
    wait_ready([daemon])
    assert one.call("ADD", netns).code == 0
    assert one.status().code == 0
    assert node.daemon is not None
    stop([node.daemon])
    node.subnet_file.unlink()
    assert one.call("DEL", netns).code == 0
    leased = Path(one.host.conf["ipam"]["dataDir"], "cbr0")
    assert [path.name for path in leased.iterdir() if path.name[0].isdigit()] == []


def daemon_says(kubelet: Kubelet, netns: str) -> str:
    message: str = kubelet.call("ADD", netns).json["msg"]
    return message.partition("has no subnet yet: ")[2]


def test_fifty_pods_at_once(lab: Lab) -> None:
    made, other = kubelets(lab, V4, nodes=2)
    with ThreadPoolExecutor(50) as pool:
        pods = list(pool.map(made.add, [f"pod{number}" for number in range(50)]))
    addresses = {address for _, (address,) in pods}
    assert len(addresses) == 50
    far = other.add("pod")
    assert_all_reach_all(lab, [far, pods[0]])
    assert lab.ping(pods[49][0], far[1][0], count=1).received == 1
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda pod: made.call("DEL", pod[0]), pods))
    assert {answer.code for answer in answers} == {0}
    assert list(made.host.state.iterdir()) == []


def test_check_sees_what_is_broken(lab: Lab) -> None:
    (made,) = kubelets(lab, V4, nodes=1)
    netns = lab._add_namespace("pod")
    added = made.call("ADD", netns).json
    # The bridge of Debian 12 does not find a route without a gateway again: the kernel filled that in.
    added["routes"] = [route for route in added["routes"] if "gw" in route]
    assert made.call("CHECK", netns, prevResult=added).code == 0
    lab.ip(netns, "link set eth0 down")
    lab.ip(netns, "address flush dev eth0")
    assert made.call("CHECK", netns, prevResult=added).code != 0


def test_the_interpreter_of_this_system_runs_it(lab: Lab) -> None:
    """As installed: compiled, by the path of Debian's own Python."""
    (made,) = kubelets(lab, V4, nodes=1)
    folder = lab.folder / "bin"
    command = [sys.executable, "-m", "flannelpy", "cni", "install", f"--bin-dir={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    made.host.command = (f"{folder}/flannel",)
    netns, _ = made.add("pod")
    assert made.call("DEL", netns).code == 0


@pytest.mark.skipif(not (FLANNELD and FLANNEL_CNI), reason="FLANNELD and FLANNEL_CNI do not name a flannel")
@pytest.mark.parametrize("first", ["flannel", "flannelpy"])
def test_a_node_moves_over_with_its_pods(lab: Lab, first: str) -> None:
    """Daemon and plugin are exchanged under a flow; pods stay, new ones come, and old ones can be deleted."""
    daemons = {"flannel": [FLANNELD], "flannelpy": []}
    plugins = {"flannel": (FLANNEL_CNI,), "flannelpy": OURS}
    second = "flannelpy" if first == "flannel" else "flannel"
    lab.put_config(V4)
    moving, other = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(moving, daemons[first]), lab.start_daemon(other)])
    one, far = Kubelet(lab, moving), Kubelet(lab, other)
    one.host.command = plugins[first]
    old, partner = one.add("old"), far.add("pod")
    assert_all_reach_all(lab, [old, partner])

    log = lab.folder / "flow"
    packets = flow(old[0], partner[1][0], log)
    assert moving.daemon is not None
    stop([moving.daemon])
    wait_ready([lab.start_daemon(moving, daemons[second])])
    one.host.command = plugins[second]
    new = one.add("new")
    assert_none_lost(packets, log)
    assert_all_reach_all(lab, [old, new, partner])

    for netns, _ in (old, new):
        assert one.call("DEL", netns).code == 0
    leased = Path(one.host.conf["ipam"]["dataDir"], "cbr0")
    assert [path.name for path in leased.iterdir() if path.name[0].isdigit()] == []
