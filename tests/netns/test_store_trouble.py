"""What the store does to a node, and what it must not: whole daemons on a real etcd."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import stop, wait_ready, wait_until
from tests.netns.nodes import (
    PROGRAM,
    V4,
    cluster,
    leases,
    log_of,
    peer,
    put_lease,
    reach,
    routes,
    wait_for_log,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def copy_of(node: Node) -> Path:
    """The node's copy of what it knows."""
    return node.folder / "state" / "coreos.com%2Fnetwork.json"


def pod_of(node: Node) -> str:
    address = node.pods[0].address
    assert address is not None
    return str(address.ip)


def saved(node: Node, peers: int) -> None:
    wait_until(
        lambda: copy_of(node).exists() and len(json.loads(copy_of(node).read_text())["leases"]) == peers + 1,
        f"a copy with {peers} peers",
        timeout=75,
    )


def reboot_without_store(lab: Lab, node: Node) -> None:
    """What a reboot leaves: nothing in the kernel, nothing in /run; and the store is away."""
    assert node.daemon is not None
    assert lab.etcd is not None
    stop([lab.etcd, node.daemon])
    lab.ip(node.netns, "link del flannel.1")
    node.subnet_file.unlink()


def test_a_node_that_reboots_while_etcd_is_away_works_at_once(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    saved(one, 1)
    subnet = one.subnet_env()["FLANNEL_SUBNET"]
    reboot_without_store(lab, one)
    daemon = lab.start_daemon(one)
    wait_ready([daemon], timeout=15)
    assert one.subnet_env()["FLANNEL_SUBNET"] == subnet
    assert "the store does not answer: starting with our lease" in log_of(daemon)
    assert "and 1 peers as they were" in log_of(daemon)
    reach(lab, one, pod_of(two))
    reach(lab, two, pod_of(one))
    lab.start_etcd()
    before = leases(lab)
    wait_for_log(daemon, "renewed our lease", timeout=20)
    assert leases(lab) == before
    put_lease(lab, "10.5.200.0-24", peer(200))
    wait_until(lambda: routes(lab, one) == 2, "the new peer's route", timeout=15)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "expired": lambda values: {**values, "expires": values["saved"] + 0.001},
    "from the future": lambda values: {**values, "saved": values["saved"] + 86_400},
    "another prefix": lambda values: {**values, "prefix": "/other"},
    "another store": lambda values: {**values, "endpoints": ["http://192.0.2.1:2379"]},
    "no copy at all": lambda _values: [],
}


def test_a_copy_that_does_not_apply_claims_nothing(lab: Lab) -> None:
    nodes = dict(zip(DAMAGE, cluster(lab, V4, nodes=len(DAMAGE)), strict=True))
    assert lab.etcd is not None
    for node in nodes.values():
        saved(node, len(nodes) - 1)
    stop([lab.etcd])
    daemons = []
    for case, node in nodes.items():
        reboot_without_store(lab, node)
        copy = copy_of(node)
        copy.write_text(json.dumps(DAMAGE[case](json.loads(copy.read_text()))))
        daemons.append(lab.start_daemon(node))
    for daemon in daemons:
        wait_for_log(daemon, "connection refused")
    with pytest.raises(AssertionError):
        wait_for_log(daemons[0], "starting with our lease", timeout=7)
    for daemon, node in zip(daemons, nodes.values(), strict=True):
        daemon.listen()
        assert daemon.ready_after is None
        assert "starting with our lease" not in log_of(daemon)
        assert not node.subnet_file.exists()
    lab.start_etcd()
    wait_ready(daemons)


def test_two_machines_with_one_public_ip_are_named_and_do_not_fight(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    third = lab.add_node()
    wait_ready([lab.start_daemon(third, flags=[f"--public-ip={one.address}", "--iface=eth0"])])
    assert one.daemon is not None
    assert third.daemon is not None
    told = f"another machine has our public IP {one.address} and claims our lease"
    wait_until(
        lambda: told in log_of(one.daemon) and told in log_of(third.daemon),  # type: ignore[arg-type]
        "both say so",
        timeout=15,
    )

    # The one that was there first keeps the lease.
    wait_for_log(third.daemon, "the lease is left to it", timeout=15)
    assert "uplink eth0 192.168.77.1" in log_of(third.daemon)
    assert "uplink eth0 192.168.77.3" in log_of(one.daemon)
    assert log_of(third.daemon).count(told) == log_of(one.daemon).count(told) == 1
    wait_until(lambda: '192.168.77.1"' in signature(lab, one), "its signature")
    revision = record_revision(lab, one)
    # The record stays as it is from here on.
    assert routes(lab, two) == 1
    assert record_revision(lab, one) == revision
    # It goes away for good: the other one is not stuck.
    stop([one.daemon])
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/{key_of(one)}")
    wait_for_log(third.daemon, "the other machine with our public IP is gone", timeout=70)
    wait_until(lambda: '192.168.77.3"' in signature(lab, one), "the other's signature")
    assert key_of(third) == key_of(one)


def test_a_machine_that_starts_names_the_one_that_wrote_its_lease_meanwhile(lab: Lab) -> None:
    (one,) = cluster(lab, V4, nodes=1)
    assert one.daemon is not None
    wait_until(lambda: signature(lab, one) != "", "its signature")
    ours = json.loads(signature(lab, one))
    stop([one.daemon])
    again = lab.start_daemon(one)
    wait_ready([again])
    wait_until(lambda: json.loads(signature(lab, one) or "{}").get("process") not in (None, ours["process"]),
               "the restarted one's signature")  # fmt: skip
    stop([again])
    assert "has written our lease" not in log_of(again), "a restart is no other machine"

    theirs = {**ours, "host": "twin", "boot": "another-boot", "since": ours["since"] + 3600}
    lab.etcdctl("put", f"{ETCD_PREFIX}/flannelpy/nodes/{key_of(one)}", json.dumps(theirs))
    daemon = lab.start_daemon(one)
    wait_ready([daemon])
    wait_for_log(daemon, f"another machine has our public IP {one.address} and has written our lease")
    said = next(line for line in log_of(daemon).splitlines() if "has written our lease" in line)
    assert "host twin, uplink eth0 192.168.77.1" in said
    assert f"we are host {ours['host']}, uplink eth0 192.168.77.1" in said
    assert "--public-ip" in said
    assert log_of(daemon).count("has written our lease") == 1


def key_of(node: Node) -> str:
    address = node.subnet_env()["FLANNEL_SUBNET"]
    return re.sub(r"\.1/24$", ".0-24", address)


def signature(lab: Lab, node: Node) -> str:
    """Who says that they wrote the node's record."""
    return lab.etcdctl("get", "--print-value-only", f"{ETCD_PREFIX}/flannelpy/nodes/{key_of(node)}")


def record_revision(lab: Lab, node: Node) -> int:
    reply: dict[str, Any] = json.loads(
        lab.etcdctl("get", f"{ETCD_PREFIX}/subnets/{key_of(node)}", "--write-out=json")
    )
    found: int = reply["kvs"][0]["mod_revision"]
    return found


def test_a_config_that_changes_under_a_daemon(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    assert one.daemon is not None
    daemon = one.daemon
    lab.put_config({**V4, "SubnetMin": "10.5.180.0"})
    wait_for_log(daemon, "the network config changed: SubnetMin from 10.5.100.0 to 10.5.180.0; applied")
    lab.put_config({**V4, "Backend": {"Type": "vxlan", "VNI": 9}})
    wait_for_log(daemon, '"VNI":9}; SubnetMin')
    lab.etcdctl("put", f"{ETCD_PREFIX}/config", "{")
    wait_for_log(daemon, "is not usable")
    lab.etcdctl("del", f"{ETCD_PREFIX}/config")
    wait_for_log(daemon, "was deleted; the running one stays until a restart")
    lab.put_config({**V4, "SubnetMin": "10.5.180.0"})
    wait_for_log(daemon, "the network config is the running one again")
    reach(lab, one, pod_of(two))
    # A subnet that is claimed from now on lies in the new range: ours is given to somebody else.
    before = key_of(one)
    put_lease(lab, before, peer(77))
    wait_for_log(daemon, f"our subnet changed from {before} to 10.5.1", timeout=20)
    wait_until(lambda: key_of(one) != before, "subnet.env follows")
    assert 180 <= int(key_of(one).split(".")[2]) <= 190
    [address] = [
        found["local"]
        for found in lab.ip_json(one.netns, "addr show flannel.1")[0]["addr_info"]
        if found["family"] == "inet"
    ]
    assert address == key_of(one).removesuffix("-24")
    # The old subnet's new owner is a peer, as soon as the bridge does not claim that subnet any more.
    wait_for_log(daemon, "pods0 has a route to it already, which is left alone")
    lab.ip(one.netns, "link del pods0")
    wait_until(lambda: routes(lab, one) == 2, "the old subnet's new owner is a peer")


def test_a_new_history_holds_the_peers_until_they_are_let_go(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    assert one.daemon is not None
    assert two.daemon is not None
    assert lab.etcd is not None
    stop([two.daemon, lab.etcd])
    data = lab.folder / "etcd"
    data.rename(lab.folder / "lost")
    lab.start_etcd()
    wait_for_log(one.daemon, "the store begins a new history", timeout=20)
    wait_for_log(one.daemon, "not written into the store's new history yet: there is no network config")
    reach(lab, one, pod_of(two))
    assert leases(lab) == {}
    lab.put_config(V4)
    wait_until(lambda: list(leases(lab)) == [key_of(one)], "our own lease, as it was", timeout=15)
    assert routes(lab, one) == 1
    command = [*PROGRAM, "lease", "confirm", f"--subnet-file={one.subnet_file}", "--output=json"]
    refused = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert (refused.returncode, routes(lab, one)) == (1, 1)
    assert "confirm with --yes" in refused.stderr
    answer = json.loads(subprocess.check_output([*command, "--yes"]))
    assert answer == {"action": "confirm", "peers": [key_of(two)], "done": True}
    wait_until(lambda: routes(lab, one) == 0, "the peer is let go")
    wait_ready([lab.start_daemon(two)])
    wait_until(lambda: routes(lab, one) == 1, "the peer is back")
    reach(lab, one, pod_of(two))
