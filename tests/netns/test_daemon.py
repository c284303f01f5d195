"""Whole daemons as processes, in network namespaces, with a real etcd: a node joins the overlay."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab
from flannelpy.cli.processes import LabError, run, stop, wait_ready, wait_until
from tests.netns.nodes import (
    DUAL,
    PROGRAM,
    V4,
    V6_ONLY,
    cluster,
    exit_code,
    leases,
    links,
    log_of,
    peer,
    put_lease,
    reach,
    routes,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


@pytest.mark.parametrize(
    ("config", "mtu"), [(V4, 1450), (DUAL, 1430), (V6_ONLY, 1430)], ids=["v4", "dual", "v6"]
)
def test_pods_on_three_nodes_reach_each_other(
    make_lab: Callable[..., Lab], config: dict[str, Any], mtu: int
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    nodes = cluster(lab, config, 3)
    for node in nodes:
        assert node.subnet_env()["FLANNEL_MTU"] == str(mtu)
    for source in nodes:
        for target in nodes:
            pod = target.pods[0]
            for address in (pod.address, pod.address6):
                if address is not None and source is not target:
                    reach(lab, source, str(address.ip), mtu)
    if config is not V4:
        assert nodes[0].pods[0].address6 is not None
        assert "fe80" not in run("ip", "-6", "address", "show", "dev", "flannel-v6.1", netns=nodes[0].netns)


def test_key_value_and_subnet_env_are_flannels_byte_for_byte(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    key, value = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/").splitlines()
    mac = lab.ip_json(node.netns, "link show flannel.1")[0]["address"]
    assert value == (
        f'{{"PublicIP":"192.168.77.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
    )
    subnet = key.rpartition("/")[2].replace("-", "/")
    base = subnet.rpartition(".")[0]
    assert node.subnet_file.read_text() == (
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={base}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert node.subnet_file.stat().st_mode & 0o777 == 0o644
    address = lab.ip_json(node.netns, "address show flannel.1")[0]["addr_info"]
    assert [(entry["local"], entry["prefixlen"]) for entry in address] == [(f"{base}.0", 32)]
    ttl = json.loads(lab.etcdctl("lease", "list", "-w", "json"))["leases"]
    assert len(ttl) == 1


def test_stop_and_start_again_interrupt_nothing(lab: Lab) -> None:
    """The lease, the device and its MAC stay, packets flow on; a stop takes less than a second."""
    one, two = cluster(lab, V4)
    before = lab.ip_json(one.netns, "link show flannel.1")[0]
    env, lease = one.subnet_env(), leases(lab)
    target = str(two.pods[0].address).partition("/")[0]
    assert one.daemon is not None
    flow = ["ping", "-n", "-i", "0.01", "-c", "400", "-W", "1", target]
    pinging = lab.start("flow", one.pods[0].netns, flow)
    began = time.monotonic()
    one.daemon.popen.terminate()
    assert exit_code(one.daemon) == 0
    assert time.monotonic() - began < 1
    assert lab.ping(one.pods[0].netns, target, count=3).received == 3
    again = lab.start_daemon(one)
    wait_ready([again])
    again.popen.send_signal(signal.SIGKILL)
    again.popen.wait()
    wait_ready([lab.start_daemon(one)])
    assert exit_code(pinging, 20) == 0
    assert " 0% packet loss" in log_of(pinging)
    after = lab.ip_json(one.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
    assert (one.subnet_env(), leases(lab)) == (env, lease)


def test_a_peer_that_left_while_the_daemon_was_down_is_removed(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    put_lease(lab, "10.5.200.0-24", peer(200))
    wait_until(lambda: routes(lab, node) == 1, "the peer's route")
    assert node.daemon is not None
    stop([node.daemon])
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.200.0-24")
    wait_ready([lab.start_daemon(node)])
    wait_until(lambda: routes(lab, node) == 0, "the peer's route to go")
    assert "02:00:00:00:01:c8" not in run("bridge", "fdb", "show", "dev", "flannel.1", netns=node.netns)


def test_two_hundred_leases_in_two_transactions_all_appear(lab: Lab) -> None:
    (node,) = cluster(lab, {**V4, "Network": "10.4.0.0/14", "SubnetLen": 24}, 1)
    subnets = [f"10.{4 + number // 250}.{number % 250 + 1}.0" for number in range(200)]
    own = node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    subnets = [subnet for subnet in subnets if not subnet.startswith(f"{own}.")]
    for half in (subnets[:100], subnets[100:]):
        puts = ""
        for subnet in half:
            _, second, third, _ = subnet.split(".")
            mac = f"02:00:00:00:{int(second):02x}:{int(third):02x}"
            value = json.dumps(peer(99, BackendData={"VNI": 1, "VtepMAC": mac}))
            puts += f"put {ETCD_PREFIX}/subnets/{subnet}-24 {json.dumps(value)}\n"
        lab.etcdctl("txn", stdin=f"\n{puts}\n\n")
    wait_until(lambda: routes(lab, node) == len(subnets), f"{len(subnets)} routes")


def test_direct_routing_over_the_shared_underlay(lab: Lab) -> None:
    one, two = cluster(lab, {**V4, "Backend": {"Type": "vxlan", "DirectRouting": True}})
    (route,) = lab.ip_json(one.netns, "route show proto 70")
    assert (route["dev"], route["gateway"]) == ("eth0", str(two.address))
    assert lab.ping(one.pods[0].netns, str(two.pods[0].address).partition("/")[0], size=1450).received == 3
    put_lease(lab, "10.5.200.0-24", peer(9, PublicIP="198.51.100.9"))
    wait_until(lambda: routes(lab, one) == 2, "the far peer's route")
    far = lab.ip_json(one.netns, "route show 10.5.200.0/24")[0]
    assert far["dev"] == "flannel.1"


def test_a_device_that_flannel_made_is_adopted_with_its_mac(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    mac = "c6:d2:32:6f:8f:44"
    lab.ip(
        node.netns,
        f"link add flannel.1 address {mac} mtu 1450 txqueuelen 0"
        f" type vxlan id 1 dev eth0 local {node.address} nolearning dstport 8472",
        "link set flannel.1 up",
    )
    before = lab.ip_json(node.netns, "link show flannel.1")[0]["ifindex"]
    wait_ready([lab.start_daemon(node)])
    after = lab.ip_json(node.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before, mac)
    assert next(iter(leases(lab).values()))["BackendData"]["VtepMAC"] == mac


def test_a_lost_device_comes_back_with_the_mac_that_peers_know(lab: Lab) -> None:
    """As after a reboot: no device, but our lease is still there; and without the lease, the same hash."""
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    for lose_the_lease in (False, True):
        assert node.daemon is not None
        stop([node.daemon])
        lab.ip(node.netns, "link delete flannel.1")
        if lose_the_lease:
            lab.etcdctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/")
        wait_ready([lab.start_daemon(node)])
        assert leases(lab) == before


def test_a_deleted_lease_is_taken_back_with_the_same_subnet(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    lab.etcdctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/")
    wait_until(lambda: leases(lab) == before, "the lease to come back")
    assert node.daemon is not None
    assert node.daemon.popen.poll() is None
    assert "taking it back" in log_of(node.daemon)


def test_a_second_daemon_is_refused_and_names_the_first(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    assert node.daemon is not None
    first = run("pgrep", "-f", "-o", str(node.subnet_file)).strip()
    second = lab.start("second", node.netns, [*PROGRAM, f"--etcd-endpoints={lab.etcd_url}"])
    assert exit_code(second) == 5
    assert f"(process {first}) serves network /coreos.com/network" in log_of(second)
    # Another network that would use the same device.
    lab.put_config({"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan"}}, "/other")
    flags = [
        f"--etcd-endpoints={lab.etcd_url}",
        "--etcd-prefix=/other",
        f"--subnet-file={lab.folder}/third.env",
    ]
    third = lab.start("third", node.netns, [*PROGRAM, *flags])
    assert exit_code(third) == 5
    assert "serves device flannel.1" in log_of(third)
    # The same network in another namespace is another node.
    other = lab.add_node()
    wait_ready([lab.start_daemon(other)])


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, "the same network /coreos.com/network"),
        ({"FLANNELD_ETCD_PREFIX": "/other"}, "the same device (its subnet is 10.5.7.0/24)"),
    ],
)
def test_a_running_flannel_is_detected_and_named(lab: Lab, environ: dict[str, str], reason: str) -> None:
    """A stand-in with flannel's name: what is looked at is the process and its files, not what it does."""
    lab.put_config(V4)
    node = lab.add_node()
    flanneld, env = lab.folder / "flanneld", lab.folder / "flannel.env"
    shutil.copy(shutil.which("sleep") or "", flanneld)
    env.write_text("FLANNEL_SUBNET=10.5.7.1/24\n")
    lab.ip(
        node.netns,
        f"link add flannel.1 type vxlan id 1 dev eth0 local {node.address} dstport 8472",
        "address add 10.5.7.0/32 dev flannel.1",
    )
    variables = [f"{name}={value}" for name, value in {**environ, "FLANNELD_SUBNET_FILE": str(env)}.items()]
    running = lab.start("flannel", node.netns, ["env", *variables, str(flanneld), "60"])
    comm = Path(f"/proc/{running.popen.pid}/comm")
    wait_until(lambda: comm.read_text().strip() == "flanneld", "the stand-in")
    daemon = lab.start_daemon(node)
    assert exit_code(daemon) == 5
    assert f"flanneld (process {running.popen.pid}) serves {reason}" in log_of(daemon)
    assert leases(lab) == {}


@pytest.mark.parametrize(
    "change", [{"Backend": {"Type": "vxlan", "VNI": 7}}, {"Backend": {"Type": "host-gw"}}]
)
def test_what_a_former_config_made_is_removed(lab: Lab, change: dict[str, Any]) -> None:
    one, _two = cluster(lab, V4)
    lab.ip(
        one.netns,
        "link add flannel.9 type vxlan id 9 dev eth0 dstport 8472",
        "address add 10.99.0.0/32 dev flannel.9",
    )
    for node in lab.nodes:
        assert node.daemon is not None
        stop([node.daemon])
    lab.put_config({**V4, **change})
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    names = wait_until(
        lambda: [names for names in [links(lab, one)] if "flannel.1" not in names], "the old device to go"
    )[0]
    assert "flannel.9" in names, "another network's device stays"
    wait_until(lambda: routes(lab, one) == 1, "the peer by the new backend")
    assert lab.ip_json(one.netns, "nexthop show dev flannel.9") == []
    for source, target in (lab.nodes, lab.nodes[::-1]):
        reach(lab, source, str(target.pods[0].address).partition("/")[0])


def test_cleanup_shows_first_and_then_removes_what_is_ours(lab: Lab) -> None:
    one, _two = cluster(lab, V4)
    lab.ip(one.netns, "route add 10.5.0.0/24 via 192.168.77.254 dev eth0")
    command = (*PROGRAM, "cleanup", f"--subnet-file={one.subnet_file}")
    with pytest.raises(LabError, match="serves"):
        run(*command, "--yes", netns=one.netns)
    assert one.daemon is not None
    stop([one.daemon])
    shown = run(*command, netns=one.netns)
    assert "would remove: device flannel.1" in shown
    assert f"would remove: file {one.subnet_file}" in shown
    assert "flannel.1" in links(lab, one), "only shown"
    removed = json.loads(run(*command, "--yes", "--output=json", netns=one.netns))
    assert removed["removed"]
    assert removed["failed"] == []
    assert "flannel.1" not in links(lab, one)
    assert "proto 70" not in run("ip", "route", netns=one.netns)
    assert run("ip", "nexthop", netns=one.netns) == ""
    assert "10.5.0.0/24" in run("ip", "route", netns=one.netns)
    assert not one.subnet_file.exists()
    assert "nothing of flannelpy's is here" in run(*command, netns=one.netns)
    assert len(leases(lab)) == 2, "the lease is for etcd to expire"
