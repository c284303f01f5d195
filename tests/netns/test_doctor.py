"""The doctor: nothing on a healthy cluster; for each fault its cause and its remedy. Real daemons."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import Process, inside, run, stop, wait_ready, wait_until
from tests.netns.doctor_faults import PATHS, TABLES, Fault
from tests.netns.nodes import PROGRAM, V4, cluster, reach, routes

pytestmark = [pytest.mark.root, pytest.mark.etcd]

NET = {**V4, "EnableNFTables": True, "SubnetMin": "10.5.100.0", "SubnetMax": "10.5.103.0"}
DUAL = {**V4, "IPv6Network": "fd00:5::/48", "EnableIPv6": True}


def doctor(node: Node, *flags: str) -> dict[str, Any]:
    """The document that it writes, and `code`, its exit code."""
    command = [*PROGRAM, "doctor", f"--subnet-file={node.subnet_file}", "--output=json", *flags]
    done = subprocess.run(
        inside(node.netns, *command), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout, done.stderr
    return {**json.loads(done.stdout), "code": done.returncode}


def checks(document: dict[str, Any]) -> set[str]:
    return {one["check"] for one in document["findings"]}


def found(document: dict[str, Any], fault: Fault, names: dict[str, str], also: set[str]) -> None:
    """It names this cause and its remedy, and nothing that is not so."""
    assert checks(document) == {fault.check} | also, (fault.name, document["findings"])
    remedy = fault.remedy.format_map(names)
    mine = [one for one in document["findings"] if one["check"] == fault.check]
    assert any(remedy in one["remedy"] for one in mine), (fault.name, remedy, mine)
    assert document["code"] == 11, fault.name
    assert all(one["what"] and one["why"] for one in document["findings"])


def names_of(lab: Lab, node: Node, other: Node) -> dict[str, str]:
    def base(one: Node) -> str:
        return one.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0] + ".0"

    def mac(one: Node) -> str:
        return str(lab.ip_json(one.netns, "link show flannel.1")[0]["address"])

    assert other.daemon is not None
    return {
        "base": base(other),
        "own": base(node),
        "mac": mac(other),
        "own_mac": mac(node),
        "peer": str(other.address),
        "env": str(node.subnet_file),
        "pid2": str(other.daemon.popen.pid),
    }


def do(lab: Lab, commands: tuple[str, ...], names: dict[str, str]) -> None:
    places = {"2:": lab.nodes[1].netns, "u:": lab.underlay}
    for command in commands:
        place = places.get(command[:2])
        text = command[2:] if place else command
        run("sh", "-ec", text.format_map(names), netns=place or lab.nodes[0].netns)


def end(daemon: Process | None) -> None:
    assert daemon is not None
    stop([daemon])


@pytest.mark.parametrize(
    "config",
    [V4, DUAL, {**V4, "Backend": {"Type": "host-gw"}}, {**V4, "Backend": {"Type": "udp"}}],
    ids=["vxlan", "dual stack", "host-gw", "udp"],
)
def test_a_healthy_cluster_has_nothing(make_lab: Callable[..., Lab], config: dict[str, Any]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    # Two of udp: one route leads to the whole network, and says nothing about the third.
    peers = 1 if config.get("Backend", {}).get("Type") == "udp" else 2
    node = cluster(lab, config, nodes=1 + peers)[0]
    document = doctor(node, "--peers")
    assert document["findings"] == []
    assert document["code"] == 0
    assert len(document["paths"]) == (2 * peers if config is DUAL else peers)
    # It did look: every way was answered on each layer that it has.
    for path in document["paths"]:
        assert path["underlay"]
        assert path["underlay_full"]
        assert path["overlay"]
        if path["port"]:
            assert path["tunnel"]
            assert path["overlay_full"]
            assert path["udp_offloaded"]


def test_faults_of_this_host(lab: Lab) -> None:
    lab.put_config(NET)
    one, two = lab.add_node(), lab.add_node()
    flags = ["--ip-masq", "--iptables-forward-rules"]
    wait_ready([lab.start_daemon(node, flags=flags) for node in (one, two)])
    wait_until(lambda: routes(lab, one) == 1, "the route to the peer")
    names = names_of(lab, one, two)
    end(one.daemon)
    known = [f"--etcd-endpoints={lab.etcd_url}", *flags]
    assert checks(doctor(one, *known)) == {"daemon"}
    for fault in TABLES:
        do(lab, fault.damage, names)
        found(doctor(one, *known), fault, names, {"daemon"})
        do(lab, fault.mend, names)


def test_faults_on_the_way(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    names = names_of(lab, one, two)
    pod = str(two.pods[0].address).partition("/")[0]
    for fault in PATHS:
        reach(lab, one, pod)
        do(lab, fault.damage, names)
        found(doctor(one, "--peers"), fault, names, set())
        do(lab, fault.mend, names)
        wait_until(lambda: lab.ping(one.pods[0].netns, pod, count=1).received, f"packets after: {fault.name}")
