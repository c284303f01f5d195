"""The document of `flannelpy status`, and what a terminal shows of it."""

import json
import re

from flannelpy.backends.vxlan import VxlanBackend
from flannelpy.cli import status as command
from flannelpy.health import Health
from flannelpy.metrics import Repair
from flannelpy.status import Node, document, peers
from flannelpy.verdict import judge
from tests.builders import config, facts, lease

OWN = "10.5.1.0-24"


def node(count: int = 2) -> Node:
    """With the lease 10.5.1.0/24 and so many peers behind it."""
    text = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
    leases = [lease("10.5.1.0/24", "192.0.2.1")]
    leases += [lease(f"10.5.{n // 250 + 2}.{n % 250}/32", "192.0.2.9") for n in range(count)]
    backend = VxlanBackend(config(text))
    return Node(config(text), backend, facts(), leases[0], {one.key: one for one in leases}, ())


def troubled() -> Health:
    health = Health()
    health.ready, health.summary, health.peers = True, "10.5.1.0-24 on flannel.1, 2 peers", 1
    health.refused = {"10.5.2.1-32": "its public IP is our own"}
    health.unreadable = {"evil\x1b[2J": "no JSON"}
    health.lease_expires = 90_000.0
    health.metrics.started = 0.0
    return health


def test_what_is_wrong_comes_first() -> None:
    health = troubled()
    found = document(node(), health, judge(health, 0.0, 10))
    assert json.loads(json.dumps(found)) == found, "plain values"
    assert found["state"] == "degraded"
    assert found["peers"] | {"troubled": 0} == {
        "leases": 2, "programmed": 1, "missing": 0, "refused": 1, "unreadable": 1, "held": 0, "unreached": 0,
        "troubled": 0,
    }  # fmt: skip
    assert [one["state"] for one in peers(node(), health)] == ["refused", "unreadable", "programmed"]
    lines = command.lines(found, None, 3600.0)
    assert lines[0].endswith("degraded, started 1 h 0 min ago")
    assert lines[1].startswith("  ! 1 peer(s) not (all) programmed: 10.5.2.1-32")
    assert all(line.isprintable() for line in lines), "foreign text stays harmless"
    assert any(
        re.match(r"lease +10\.5\.1\.0/24, expires in 24 h 0 min unless renewed", line) for line in lines
    )
    assert lines[-1].endswith("no JSON")


def test_a_start_has_no_node_yet() -> None:
    health = Health()
    health.summary = "waiting: no network config yet"
    found = document(None, health, judge(health, 0.0, 10))
    assert (found["state"], found["lease"], found["peers"]) == ("not ready", None, None)
    assert peers(None, health) == []
    text = "\n".join(command.lines(found, None, 10.0))
    assert "X not ready yet: waiting: no network config yet" in text


def test_the_last_repair_is_told() -> None:
    health = troubled()
    health.metrics.note_repair(Repair("add route", "route was removed by somebody", 0.0123), ["add Route"])
    found = document(node(), health, judge(health, 0.0, 10))
    assert found["repairs"]["operations"] == {"add Route (announced)": 1}
    text = "\n".join(command.lines(found, None, health.metrics.last_repair_at + 90))
    assert "1 since the start; the last one 1 min ago, in 12 ms: add route (route was removed by some" in text


def test_a_large_cluster_is_a_short_document() -> None:
    health = troubled()
    health.refused = {f"10.5.{n // 250 + 2}.{n % 250}-32": "x" for n in range(1000)}
    found = document(node(5000), health, judge(health, 0.0, 10))
    assert len(found["peers"]["troubled"]) == 50
    assert len(json.dumps(found)) < 20_000
    assert len(peers(node(5000), health)) == 5001


def test_spans_of_time() -> None:
    assert [command.span(seconds) for seconds in (-1, 59, 60, 3599, 3600, 47 * 3600, 49 * 3600)] == [
        "0 s", "59 s", "1 min", "59 min", "1 h 0 min", "47 h 0 min", "2 days",
    ]  # fmt: skip
