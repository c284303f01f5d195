"""The doctor: nothing on a healthy cluster; for each fault its cause and its remedy. Real daemons."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import LabError, Process, inside, run, stop, wait_ready, wait_until
from tests.certificates import Authority
from tests.netns import bad_card
from tests.netns.doctor_faults import CARD, PATHS, ROUTED, STORE, TABLES, Fault
from tests.netns.nodes import PROGRAM, V4, cluster, leases, peer, put_lease, reach, routes

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
    errors = any(one["severity"] == "error" for one in document["findings"])
    assert document["code"] == (11 if errors else 10), fault.name
    assert all(one["what"] and one["why"] for one in document["findings"])


def names_of(lab: Lab, node: Node, other: Node) -> dict[str, str]:
    def base(one: Node) -> str:
        return one.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0] + ".0"

    def mac(one: Node) -> str:
        found = [link for link in lab.ip_json(one.netns, "link show") if link["ifname"] == "flannel.1"]
        return str(found[0]["address"]) if found else ""

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
    [V4, DUAL, {**V4, "Backend": {"Type": "host-gw"}}, {**V4, "Backend": {"Type": "udp", "FastPath": "off"}}],
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
        assert path["clock_ahead"] is None or abs(path["clock_ahead"]) < 1
        assert (path["clock_ahead"] is None) == (":" in path["remote"])


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


@pytest.mark.parametrize(
    ("config", "faults"),
    [(V4, PATHS), ({**V4, "Backend": {"Type": "host-gw"}}, ROUTED)],
    ids=["vxlan", "host-gw"],
)
def test_faults_on_the_way(lab: Lab, config: dict[str, Any], faults: tuple[Fault, ...]) -> None:
    one, two = cluster(lab, config)
    names = names_of(lab, one, two)
    pod = str(two.pods[0].address).partition("/")[0]
    for fault in faults:
        reach(lab, one, pod)
        do(lab, fault.damage, names)
        found(doctor(one, "--peers"), fault, names, set())
        do(lab, fault.mend, names)
        wait_until(lambda: lab.ping(one.pods[0].netns, pod, count=1).received, f"packets after: {fault.name}")


def test_faults_of_the_store_and_its_records(lab: Lab) -> None:
    lab.put_config(NET)
    one, two = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    wait_until(lambda: routes(lab, one) == 1, "the route to the peer")
    free = sorted({f"10.5.{n}.0-24" for n in range(100, 104)} - leases(lab).keys())
    assert len(free) == 2
    faults = {fault.check: fault for fault in STORE}
    assert lab.etcd is not None
    end(lab.etcd)
    found(doctor(one), faults["store"], {}, set())
    lab.start_etcd("--quota-backend-bytes=4000000")
    assert checks(doctor(one)) == set()

    with pytest.raises(LabError, match="space exceeded"):
        fill(lab)
    found(doctor(one), faults["store-alarm"], {}, set())
    lab.etcdctl("del", "rubbish")
    revision = json.loads(lab.etcdctl("get", "x", "--write-out=json"))["header"]["revision"]
    for line in (f"compact {revision} --physical", "defrag", "alarm disarm"):
        lab.etcdctl(*line.split())
    assert checks(doctor(one)) == set()

    put_lease(lab, free[0], peer(1))
    found(doctor(one), faults["public-ip"], {}, set())
    put_lease(lab, free[0], {"PublicIP": "192.168.77.50"})
    put_lease(lab, free[1], {"PublicIP": "192.168.77.51"})
    found(doctor(one), faults["pool-full"], {}, set())
    lab.etcdctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/{free[0]}")

    expired = https_etcd(lab, Authority(lab.folder, "ca"))
    found(doctor(one, *expired), faults["certificate"], {}, set())

    for words in (("user", "add", "root:secret"), ("user", "grant-role", "root", "root"), ("auth", "enable")):
        lab.etcdctl(*words)
    wrong = doctor(one, "--etcd-username=root", "--etcd-password=wrong")
    found(wrong, faults["store-auth"], {}, set())
    assert "wrong" not in json.dumps(wrong["findings"]).replace("wrong user", "")


def fill(lab: Lab) -> None:
    for _number in range(20):
        lab.etcdctl("put", "rubbish", stdin="x" * 1_000_000)


def https_etcd(lab: Lab, authority: Authority) -> list[str]:
    """An etcd whose certificate has expired; the flags to reach it."""
    server = authority.issue("server", address="192.168.77.254", expired=True)
    url, peer_url = "https://192.168.77.254:2399", "http://127.0.0.1:2398"
    flags = [f"--listen-client-urls={url}", f"--advertise-client-urls={url}", "--name=tls"]
    flags += [f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"]
    flags += [f"--cert-file={server.certificate}", f"--key-file={server.key}"]
    flags += [f"--data-dir={lab.folder / 'tls'}", f"--initial-cluster=tls={peer_url}"]
    etcd = lab.start("etcd-tls", lab.underlay, ["etcd", *flags])
    wait_until(lambda: "serving client" in etcd.log.read_text(), "etcd with TLS")
    return [f"--etcd-endpoints={url}", f"--etcd-cafile={authority.file}"]


def test_an_overlay_over_the_wrong_interface(lab: Lab) -> None:
    fault = next(one for one in STORE if one.check == "uplink")
    lab.put_config(V4)
    one, two = lab.add_node(), lab.add_node()
    # A second network that leads nowhere, as the 10.0.2.15 of many virtual machines.
    lab.ip(two.netns, "link add eth1 type veth peer name eth2", "link set eth1 up", "link set eth2 up")
    lab.ip(two.netns, "address add 10.0.2.15/24 dev eth1")
    wait_ready([lab.start_daemon(one), lab.start_daemon(two, flags=["--iface=eth1"])])
    wait_until(lambda: routes(lab, two) == 1, "the route to the peer")
    found(doctor(two), fault, {}, set())


def test_a_card_that_makes_wrong_checksums(lab: Lab) -> None:
    (fault,) = CARD
    one, two = cluster(lab, V4)
    assert checks(doctor(one, "--peers")) == set()
    bad_card.put_into(lab, one)
    reach(lab, one, str(two.pods[0].address).partition("/")[0])
    document = doctor(one, "--peers")
    found(document, fault, {}, set())
