"""An operator's commands beside running daemons: what they promise about traffic is so."""

import json
import re
import signal
import socket
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import run, wait_until
from tests.netns.nodes import PROGRAM, V4, cluster, log_of, reach, routes, wait_for_log

pytestmark = [pytest.mark.root, pytest.mark.etcd]

TAKEN_BACK = "was deleted or overwritten by somebody else: taking it back"


def operate(lab: Lab, *words: str) -> Any:
    """What a command says in JSON."""
    where = f"--etcd-endpoints={lab.etcd_url}"
    return json.loads(run(*PROGRAM, *words, where, "--output=json", netns=lab.nodes[0].netns))


def is_on_an_etcd_lease(lab: Lab, key: str) -> bool:
    (kv,) = json.loads(lab.etcdctl("get", f"{ETCD_PREFIX}/subnets/{key}", "-w=json"))["kvs"]
    return bool(kv.get("lease"))


def key_of(node: Node) -> str:
    return node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")


def pod_of(node: Node) -> str:
    address = node.pods[0].address
    assert address is not None
    return str(address.ip)


def test_a_reservation_made_and_ended_loses_no_packet(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    key, subnet = key_of(two), two.subnet_env()["FLANNEL_SUBNET"]
    reach(lab, one, pod_of(two))
    assert [record["key"] for record in operate(lab, "lease", "show", str(two.address))["leases"]] == [key]
    assert operate(lab, "lease", "check")["findings"] == []
    (shown,) = operate(lab, "lease", "show", key)["leases"]
    assert shown["written_by"]["host"] == socket.gethostname()
    flow = lab.start("flow", one.pods[0].netns, ["ping", "-n", "-i", "0.01", pod_of(two)])
    assert two.daemon is not None
    assert operate(lab, "lease", "reserve", key.replace("-", "/"), "--yes")["done"]
    wait_for_log(two.daemon, f"our lease {key} was written by somebody else with the same value")
    assert not is_on_an_etcd_lease(lab, key)
    assert operate(lab, "lease", "unreserve", key, "--yes")["done"]
    assert is_on_an_etcd_lease(lab, key)
    config = {**V4, "SubnetMax": "10.5.189.0"}
    assert operate(lab, "config", "set", json.dumps(config), "--yes")["stranded"] in (
        [],
        [key],
        [key_of(one)],
    )
    flow.popen.send_signal(signal.SIGINT)
    flow.popen.wait(10)
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", log_of(flow))
    assert counts is not None
    assert counts[1] == counts[2], "not one is lost"
    assert int(counts[1]) > 20
    assert two.subnet_env()["FLANNEL_SUBNET"] == subnet


def test_a_released_subnet_comes_back_to_its_node(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    key = key_of(two)
    before = lab.etcdctl("get", f"{ETCD_PREFIX}/subnets/{key}")
    assert operate(lab, "lease", "release", key, "--yes")["done"]
    assert two.daemon is not None
    wait_for_log(two.daemon, f"our lease {key} {TAKEN_BACK}")
    wait_until(lambda: lab.etcdctl("get", f"{ETCD_PREFIX}/subnets/{key}") == before, "the record to be back")
    wait_until(lambda: routes(lab, one) == 1, "the route on the peer")
    reach(lab, one, pod_of(two))
