"""Whole daemons with --kube-subnet-mgr, over HTTPS; pods are made by the CNI plugin alone."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import Lab
from flannelpy.cli.processes import run, stop, wait_ready, wait_until
from tests.kube.api import KUBE_APISERVER, TOKEN, StandIn
from tests.netns.kube import NETWORK, OURS, Cluster, KubeApi, RealKubeApi
from tests.netns.nodes import log_of, routes, wait_for_log
from tests.netns.test_cni import PLUGINS, Kubelet, assert_all_reach_all, assert_none_lost, flow

FLANNELD = os.environ.get("FLANNELD", "")

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not Path(PLUGINS, "bridge").exists(),
        reason="needs bridge: apt-get install containernetworking-plugins",
    ),
]

needs_real = pytest.mark.skipif(KUBE_APISERVER is None, reason="neither KUBE_APISERVER nor PATH has one")


@pytest.fixture
def make_cluster(make_lab: Callable[..., Lab]) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(backend: str = "vxlan", *, real: bool = False, **more: Any) -> Cluster:
        lab = make_lab()
        api = RealKubeApi(lab) if real else KubeApi(lab)
        made.append(Cluster(lab, {"Network": NETWORK, "Backend": {"Type": backend}} | more, api))
        return made[-1]

    yield make
    for cluster in made:
        cluster.api.stop()


@pytest.mark.parametrize(
    ("backend", "real"),
    [("vxlan", False), ("host-gw", False), ("udp", False), pytest.param("vxlan", True, marks=needs_real)],
)
def test_pods_of_all_nodes_reach_each_other_and_daemons_may_be_restarted(
    make_cluster: Callable[..., Cluster], backend: str, real: bool
) -> None:
    """Two pods on each of three nodes; then every daemon is restarted, one by one, while packets flow."""
    cluster = make_cluster(backend, real=real)
    lab = cluster.lab
    for _number in range(3):
        cluster.add_node()
    wait_ready([cluster.start(node) for node in lab.nodes])
    made = [Kubelet(lab, node) for node in lab.nodes]
    pods = [one.add(f"pod{number}") for one in made for number in (1, 2)]
    assert len({address for _, addresses in pods for address in addresses}) == 6
    assert_all_reach_all(lab, pods)
    for node in lab.nodes:
        wait_until(
            lambda name=node.name: cluster.api.condition(name) == ("False", "FlannelIsUp"),  # type: ignore[misc]
            f"the condition of {node.name}",
        )

    log = lab.folder / "flow"
    packets = flow(pods[0][0], pods[-1][1][0], log)
    for node in lab.nodes:
        assert node.daemon is not None
        stop([node.daemon])
        wait_ready([cluster.start(node)])
    assert_none_lost(packets, log)
    assert_all_reach_all(lab, [made[0].add("late"), pods[-1]])
    for node in lab.nodes:
        assert node.daemon is not None
        assert "ERROR" not in log_of(node.daemon)


def test_a_node_waits_for_its_pod_cidr_and_says_so_everywhere(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    node = cluster.add_node(cidr=False)
    daemon = cluster.start(node)
    wait_for_log(daemon, "--allocate-node-cidrs=true")
    assert daemon.popen.poll() is None
    wait_until(lambda: cluster.api.condition(node.name) == ("True", "NoPodCIDR"), "the condition")
    wait_until(lambda: [event["reason"] for event in cluster.api.events()] == ["NoPodCIDR"], "the event")
    kubelet = Kubelet(cluster.lab, node)
    answer = kubelet.call("ADD", cluster.lab._add_namespace("early"))
    assert "--allocate-node-cidrs=true" in answer.json["msg"]

    cluster.api.patch(node.name, {"spec": {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]}})
    wait_ready([daemon])
    assert node.subnet_env()["FLANNEL_SUBNET"] == "10.244.9.1/24"
    wait_until(lambda: cluster.api.condition(node.name) == ("False", "FlannelIsUp"), "the condition")


def test_a_service_account_whose_token_changes(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    lab, api = cluster.lab, cluster.api
    assert isinstance(api, StandIn)
    one, two = cluster.add_node(), cluster.add_node()
    wait_ready([daemon := cluster.start_in_pod(one), cluster.start_in_pod(two)])
    api.do("tokens", [TOKEN, "another"])
    cluster.rotate_token(daemon, "another")
    api.do("tokens", ["another"])
    api.do("cut", "clean")
    api.do("many", {"first": 0, "count": 1})
    wait_for_log(daemon, "lease big-00000 is not programmed: its subnet")
    assert two.daemon is not None
    wait_for_log(two.daemon, "answers 401 to our watch")
    assert routes(lab, two) == 1


def test_hostile_nodes_disturb_nobody(make_cluster: Callable[..., Cluster]) -> None:
    """Whoever may write a Node object may lie about itself, and only about itself."""
    cluster = make_cluster()
    lab, api = cluster.lab, cluster.api
    one, two = cluster.add_node(), cluster.add_node()
    wait_ready([cluster.start(one), cluster.start(two)])
    pods = [Kubelet(lab, node).add("pod") for node in lab.nodes]
    assert_all_reach_all(lab, pods)
    assert one.daemon is not None
    vtep = '{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}'
    for name, cidr, address, data, words in (
        (
            "bad-vni",
            "10.244.50.0/24",
            "192.168.77.50",
            '{"VNI":7,"VtepMAC":"02:00:00:00:00:98"}',
            "its VNI is 7",
        ),
        ("bad-data", "10.244.51.0/24", "192.168.77.51", '"; reboot"', "lease bad-data is not programmed"),
        ("bad-json", "10.244.52.0/24", "192.168.77.52", "{", "lease bad-json is unreadable"),
        ("outside", "10.9.0.0/24", "192.168.77.53", vtep, "its subnet 10.9.0.0/24 is not inside the network"),
        ("overlaps", "10.244.1.128/25", "192.168.77.54", vtep, "lease overlaps is not programmed"),
        ("loopback", "10.244.55.0/24", "127.0.0.1", vtep, "lease loopback is not programmed"),
    ):
        api.add_node(name, (cidr,))
        api.annotate(
            name, kube_subnet_manager="true", backend_type="vxlan", public_ip=address, backend_data=data
        )
        wait_for_log(one.daemon, words)
    assert routes(lab, one) == 1
    assert_all_reach_all(lab, pods)


def test_the_commands_of_a_node(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    one, two = cluster.add_node(), cluster.add_node()
    wait_ready([cluster.start(two)])
    wait_ready([cluster.start(one)])
    wait_until(lambda: list((one.folder / "state").glob("*.json")), "the copy of what is known")
    status = run(*OURS, "status", f"--subnet-file={one.subnet_file}", "--peers", netns=one.netns)
    assert "10.244.2.0/24  192.168.77.2  programmed" in status
    doctor = run(
        *("env", f"FLANNELD_STATE_DIR={one.folder / 'state'}", *OURS, "doctor", "--output=json"),
        f"--subnet-file={one.subnet_file}",
        netns=one.netns,
    )
    found = json.loads(doctor)
    assert [one for one in found["findings"] if one["severity"] == "error"] == []
    assert found["looked_at"]["lease"] == "node1"


def test_nodes_come_and_go_while_the_api_server_is_in_trouble(make_cluster: Callable[..., Cluster]) -> None:
    """Cut watches, a compacted history, an outage, a start without the API server, another config."""
    cluster = make_cluster(Network="10.0.0.0/8")
    lab, api = cluster.lab, cluster.api
    assert isinstance(api, StandIn)
    one, two = cluster.add_node(), cluster.add_node()
    api.do("many", {"first": 0, "count": 29})
    wait_ready([cluster.start(two)])
    wait_ready([cluster.start(one)])
    assert one.daemon is not None
    wait_until(lambda: list((one.folder / "state").glob("*.json")), "the copy of what is known")

    api.do("cut", "mid")
    api.do("many", {"first": 29, "count": 1})
    wait_until(lambda: routes(lab, one) == 31, "one more route")
    api.do("options", {"gone_by": "status"})
    api.delete_node("big-00029")
    api.do("compact")
    api.do("cut", "clean")
    wait_until(lambda: routes(lab, one) == 30, "the node that went during the gap")

    api.stop()
    wait_for_log(one.daemon, "connection refused")
    stop([one.daemon])
    wait_ready([cluster.start(one)])
    assert routes(lab, one) == 30, "from memory"
    api.start(6443)
    for node in (one, two):
        api.add_node(node.name, (f"10.244.{node.number}.0/24",))
    wait_for_log(one.daemon, "new history", 30)
    wait_until(lambda: api.annotations(one.name).get("kube-subnet-manager") == "true", "our annotations", 30)
    assert routes(lab, one) == 30, "the peers of before are held"

    config = json.loads(cluster.config.read_text())
    cluster.config.write_text(json.dumps({**config, "Network": "10.0.0.0/9"}))
    wait_for_log(one.daemon, "the running one stays until a restart")


@pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")
@pytest.mark.parametrize(
    ("backend", "real"),
    [("vxlan", False), ("host-gw", False), pytest.param("vxlan", True, marks=needs_real)],
)
@pytest.mark.parametrize("first", ["flannel", "flannelpy"])
def test_a_node_moves_over(
    make_cluster: Callable[..., Cluster], backend: str, real: bool, first: str
) -> None:
    """Beside a node that stays; daemons are exchanged under a flow, and the annotations stay equal."""
    cluster = make_cluster(backend, real=real)
    lab = cluster.lab
    programs = {"flannel": (FLANNELD,), "flannelpy": OURS}
    second = "flannelpy" if first == "flannel" else "flannel"
    moving, flannel, ours = cluster.add_node(), cluster.add_node(), cluster.add_node()
    wait_ready(
        [
            cluster.start(moving, programs[first]),
            cluster.start(flannel, programs["flannel"]),
            cluster.start(ours),
        ]
    )
    pods = [Kubelet(lab, node).add("pod") for node in lab.nodes]
    assert_all_reach_all(lab, pods)
    before = cluster.api.annotations(moving.name)

    log = lab.folder / "flow"
    packets = flow(pods[0][0], pods[1][1][0], log)
    assert moving.daemon is not None
    stop([moving.daemon])
    wait_ready([cluster.start(moving, programs[second])])
    assert_none_lost(packets, log)
    assert cluster.api.annotations(moving.name) == before
    assert_all_reach_all(lab, pods)
