"""What stands in etcd is foreign: bad leases, lost leases, leases that would cut a node off."""

import re
import shutil
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab
from flannelpy.cli.processes import run, stop, wait_ready, wait_until
from tests.netns.nodes import (
    V4,
    cluster,
    leases,
    log_of,
    peer,
    put_lease,
    routes,
    wait_for_log,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def test_bad_leases_harm_nobody_and_are_named_once(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    assert node.daemon is not None
    own = node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    bad: dict[str, Any] = {
        "foo": "hello",
        "10.5.201.0-24": "{",
        "10.5.202.0-24": peer(202, PublicIP="127.0.0.1"),
        "10.5.203.0-24": peer(203, PublicIP="224.1.1.1"),
        "10.5.204.0-24": peer(204, PublicIP=str(node.address)),
        "10.5.205.0-24": peer(205, PublicIP="10.5.9.9"),
        "10.5.206.0-24": peer(206, BackendType="host-gw"),
        "10.5.207.0-24": peer(207, BackendData={"VNI": 1, "VtepMAC": "$(reboot)"}),
        "10.5.208.0-24": peer(208, BackendData=[[[[]]]]),
        "10.5.209.0-24": peer(209, PublicIP=None),
        "10.5.210.0-24": "x" * 200_000,
        "10.5.211.0-24": "",
        "0.0.0.0-1": peer(212),
        "192.168.77.0-24": peer(213),
        f"{own}.128-25": peer(214),
        "10.5.300.0-24": peer(215),
    }
    good = peer(220)
    for key, value in bad.items():
        put_lease(lab, key, value)
    put_lease(lab, "10.5.220.0-24", good)
    wait_until(lambda: routes(lab, node) >= 1, "the good peer's route")
    assert [route["dst"] for route in lab.ip_json(node.netns, "route show proto 70")] == ["10.5.220.0/24"]
    for key, value in bad.items():
        put_lease(lab, key, value)
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.220.0-24")
    wait_until(lambda: routes(lab, node) == 0, "the good peer's route to go")
    text = log_of(node.daemon)
    for key in bad:
        assert len(re.findall(rf"lease {re.escape(key)} is (?:not programmed|unreadable): ", text)) == 1, key
    assert node.daemon.popen.poll() is None
    assert all(len(line) < 500 for line in text.splitlines())
    # And the same from a listing.
    put_lease(lab, "10.5.220.0-24", good)
    stop([node.daemon])
    wait_ready([lab.start_daemon(node)])
    assert [route["dst"] for route in lab.ip_json(node.netns, "route show proto 70")] == ["10.5.220.0/24"]


def test_a_lease_that_contains_the_uplink_or_etcd_does_not_cut_the_node_off(lab: Lab) -> None:
    lab.put_config({"Network": "192.168.0.0/16", "Backend": {"Type": "vxlan"}})
    node = lab.add_node()
    lab.ip(node.netns, "route add 192.168.200.0/24 via 192.168.77.254 dev eth0 proto static")
    before = run("ip", "route", "show", "dev", "eth0", netns=node.netns)
    daemon = lab.start_daemon(node)
    wait_ready([daemon])
    for key in ("192.168.77.0-24", "192.168.77.254-31", "192.168.64.0-18", "192.168.200.0-24"):
        put_lease(lab, key, peer(9, PublicIP="172.30.0.9"))
        put_lease(lab, "192.168.222.0-24", peer(10, PublicIP="172.30.0.10"))
        wait_until(lambda: "192.168.222.0/24" in run("ip", "route", netns=node.netns), "the good peer")
        assert run("ip", "route", "show", "dev", "eth0", netns=node.netns) == before
        lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/{key}")
        lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/192.168.222.0-24")
        wait_until(
            lambda: "192.168.222.0/24" not in run("ip", "route", netns=node.netns), "the good peer to go"
        )
        assert run("ip", "route", "show", "dev", "eth0", netns=node.netns) == before
    text = log_of(daemon)
    assert "lease 192.168.77.0-24 is not programmed: its subnet 192.168.77.0/24 contains 192.168.77.1" in text
    assert "192.168.77.254, where the store is" in text
    assert "add route 192.168.200.0/24 via 192.168.200.0 dev flannel.1: eth0 has a route to it" in text


def test_the_uplink_is_not_left_for_a_second_address_or_another_default_route(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    lab.ip(
        node.netns,
        "address add 192.168.77.50/24 dev eth0",
        "link add vpn0 type veth peer name far0",
        "link set vpn0 up",
        "address add 10.99.0.2/24 dev vpn0",
        "route replace default via 10.99.0.1 dev vpn0",
        "link set eth0 mtu 1450",
    )
    wait_until(lambda: node.subnet_env()["FLANNEL_MTU"] == "1400", "the MTU change that follows it")
    assert leases(lab) == before


def test_a_bridge_that_holds_a_peers_subnet_is_named_and_left_alone(lab: Lab) -> None:
    """The classic: docker0 is still on the subnet that the node had before."""
    (node,) = cluster(lab, V4, 1)
    lab.ip(
        node.netns,
        "link add docker0 type bridge",
        "link set docker0 up",
        "address add 10.5.99.1/24 dev docker0",
    )
    put_lease(lab, "10.5.99.0-24", peer(9))
    assert node.daemon is not None
    wait_for_log(node.daemon, "add route 10.5.99.0/24 via 10.5.99.0 dev flannel.1: docker0 has a route to it")
    assert "dev docker0" in run("ip", "route", "show", "10.5.99.0/24", netns=node.netns)
    lab.ip(node.netns, "link del docker0")
    wait_until(lambda: routes(lab, node) == 1, "the peer once the bridge is gone", 20)


def test_an_emptied_etcd_gets_every_lease_back(lab: Lab) -> None:
    nodes = cluster(lab, V4)
    before = leases(lab)
    assert lab.etcd is not None
    lab.etcd.popen.kill()
    lab.etcd.popen.wait()
    shutil.rmtree(lab.folder / "etcd")
    lab.start_etcd()
    lab.put_config(V4)
    wait_until(lambda: leases(lab) == before, "the leases", 20)
    for node in nodes:
        wait_until(lambda node=node: routes(lab, node) == 1, "the peer")  # type: ignore[misc]
        assert node.daemon is not None
        assert node.daemon.popen.poll() is None


def test_a_subnet_taken_by_somebody_else_is_left_to_him(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    wait_ready([lab.start_daemon(node)])
    (key,) = leases(lab)
    put_lease(lab, key, peer(9))
    wait_until(lambda: len(leases(lab)) == 2, "another lease of ours")
    wait_until(lambda: routes(lab, node) == 1, "the new owner as a peer")
    (route,) = lab.ip_json(node.netns, "route show proto 70")
    assert route["dst"] == key.replace("-", "/")
    own = next(name for name, lease in leases(lab).items() if lease["PublicIP"] == "192.168.77.1")
    wait_until(lambda: node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0] + ".0-24" == own, "subnet.env")
    address = lab.ip_json(node.netns, "address show flannel.1")[0]["addr_info"]
    assert [entry["local"] for entry in address] == [own.partition("-")[0]]
