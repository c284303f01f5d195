"""A real Prometheus scrapes three nodes."""

import json
import shutil
from typing import Any
from urllib.parse import quote

import pytest

from flannelpy.cli.lab import Lab
from flannelpy.cli.processes import inside, run, stop, wait_ready, wait_until
from tests.conformance.test_prometheus import RULES
from tests.netns.nodes import PROGRAM, V4, routes

pytestmark = [
    pytest.mark.root,
    pytest.mark.etcd,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)"),
]

PORT = 18471
ASK = (
    "import sys, urllib.request as r;"
    "print(r.urlopen('http://127.0.0.1:9090' + sys.argv[1], timeout=5).read().decode())"
)


def api(lab: Lab, path: str) -> Any:
    """The data of an answer."""
    return json.loads(run(*inside(lab.underlay, PROGRAM[0], "-c", ASK, path)))["data"]


def values(lab: Lab, expression: str) -> dict[str, float]:
    """Instance -> value, as Prometheus has it now; empty as long as it does not answer."""
    try:
        found = api(lab, f"/api/v1/query?query={quote(expression)}")
    except Exception:  # noqa: BLE001  # it is about to start
        return {}
    return {one["metric"]["instance"]: float(one["value"][1]) for one in found["result"]}


def test_three_nodes_are_scraped(lab: Lab) -> None:
    lab.put_config(V4)
    nodes = [lab.add_node() for _number in range(3)]
    wait_ready([lab.start_daemon(node, flags=[f"--healthz-port={PORT}"]) for node in nodes])
    wait_until(lambda: all(routes(lab, node) == 2 for node in nodes), "the peers")
    places = [f"{node.address}:{PORT}" for node in nodes]
    config = {
        "global": {"scrape_interval": "300ms", "scrape_timeout": "300ms", "evaluation_interval": "300ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "flannelpy", "static_configs": [{"targets": places}]}],
    }
    path = lab.folder / "prometheus.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    lab.start(
        "prometheus",
        lab.underlay,
        ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={lab.folder / 'tsdb'}",
         "--web.listen-address=127.0.0.1:9090"],
    )  # fmt: skip
    wait_until(lambda: values(lab, "flannelpy_ready") == dict.fromkeys(places, 1.0), "three nodes", 30)
    assert values(lab, 'flannelpy_peers{state="programmed"}') == dict.fromkeys(places, 2.0)
    assert values(lab, "flannelpy_overlay_mtu_bytes") == dict.fromkeys(places, 1450.0)
    assert set(values(lab, "process_resident_memory_bytes")) == set(places)
    groups = api(lab, "/api/v1/rules")["groups"]
    assert {rule["health"] for rule in groups[0]["rules"]} <= {"ok", "unknown"}

    run("ip", "link", "del", "flannel.1", netns=nodes[0].netns)
    first = places[0]
    wait_until(
        lambda: values(lab, "sum by (instance) (flannelpy_repairs_total)").get(first, 0) > 2, "a repair"
    )
    assert values(lab, "flannelpy_repair_duration_seconds_count")[first] >= 1

    assert lab.etcd is not None
    stop([lab.etcd])
    wait_until(lambda: values(lab, "flannelpy_store_up") == dict.fromkeys(places, 0.0), "the outage", 20)
    assert values(lab, "flannelpy_ready") == dict.fromkeys(places, 1.0)
    # The alert waits for ten minutes; until then it is pending.
    wait_until(
        lambda: len([one for one in api(lab, "/api/v1/alerts")["alerts"]
                     if one["labels"]["alertname"] == "FlannelpyStoreSilent"]) == 3,
        "the alert",
    )  # fmt: skip
