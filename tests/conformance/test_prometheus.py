"""What Prometheus' own tools say of our metrics, alerts and dashboard."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flannelpy.exposition import Exposition, Family, families
from flannelpy.health import Health
from flannelpy.metrics import Repair
from flannelpy.verdict import judge
from tests.unit.test_status import node

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/flannelpy.rules.yml"
DASHBOARD = ROOT / "deploy/grafana/flannelpy.json"
REFERENCE = (ROOT / "docs/reference.md").read_text()
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: prometheus)")


def promtool(*arguments: str, stdin: bytes = b"") -> str:
    """What it prints; it must be content."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], input=stdin, capture_output=True, check=False, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def everything() -> list[Family]:
    health = Health()
    health.ready, health.peers, health.unreadable = True, 2, {'k"\\\n': "x"}
    for seconds, cause in ((0.003, "route was removed by somebody"), (70.0, "resync")):
        health.metrics.note_repair(Repair("x", cause, seconds), ["add Route", "add FdbEntry"])
    packets = {"sent_packets": 5, "received_packets": 7, "drop_stranger": 2}
    return families(node(), packets, health, judge(health, 0.0, 10))


def test_the_page_is_what_the_values_say() -> None:
    exposition = Exposition()
    answer = exposition.page(everything())
    assert answer.status == 200
    assert answer.content_type.startswith("text/plain; version=")
    text = answer.body.decode()
    for line in (
        'flannelpy_peers{state="unreadable"} 1.0',
        'flannelpy_repairs_total{action="add",noticed="resync",object="route"} 1.0',
        'flannelpy_repair_duration_seconds_bucket{le="0.01"} 1.0',
        'flannelpy_repair_duration_seconds_bucket{le="60"} 1.0',
        'flannelpy_repair_duration_seconds_bucket{le="+Inf"} 2.0',
        "flannelpy_repair_duration_seconds_sum 70.003",
        "flannelpy_repair_duration_seconds_count 2.0",
        'flannelpy_pool_subnets{family="ipv4"} 255.0',
        'flannelpy_pool_used_subnets{family="ipv4"} 2.0',
        'flannelpy_forwarder_drops_total{reason="stranger"} 2.0',
        "flannelpy_degraded 1.0",
    ):
        assert line in text.splitlines(), text
    assert "process_resident_memory_bytes" in text
    assert exposition.page(everything()).body.decode().count("# HELP flannelpy_ready ") == 1


def test_a_start_has_metrics_before_there_is_a_node() -> None:
    health = Health()
    body = Exposition().page(families(None, {}, health, judge(health, 0.0, 10))).body.decode()
    assert "flannelpy_ready 0.0" in body
    assert "flannelpy_pool_subnets" not in body


@needs_promtool
def test_promtool_finds_nothing_to_say_about_the_metrics() -> None:
    body = Exposition().page(everything()).body
    ours = b"\n".join(line for line in body.splitlines() if b"flannelpy_" in line) + b"\n"
    assert promtool("check", "metrics", stdin=ours) == ""


def test_every_metric_is_in_the_reference() -> None:
    section = REFERENCE.partition("### Metrics\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(flannelpy_\w+)`", section, re.MULTILINE))
    made = {f"flannelpy_{family.name}{'_total' * (family.kind == 'counter')}" for family in everything()}
    assert documented == made


# --- alerts ---


def names_in(expression: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"flannelpy_\w+", expression)}


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    made = {f"flannelpy_{family.name}{'_total' * (family.kind == 'counter')}" for family in everything()}
    for path in (RULES, DASHBOARD):
        for expression in re.findall(r'"?expr"?: "?(.*)', path.read_text()):
            assert names_in(expression) <= made, expression


@needs_promtool
def test_promtool_accepts_the_alerts() -> None:
    assert "SUCCESS: 13 rules found" in promtool("check", "rules", str(RULES))


FIRES: dict[str, tuple[str, str]] = {
    "FlannelpyDown": ('up{job="flannelpy",instance="a"}', "0"),
    "FlannelpyStuck": ('flannelpy_stuck{instance="a"}', "1"),
    "FlannelpyNotReady": ('flannelpy_ready{instance="a"}', "0"),
    "FlannelpyPeersMissing": ('flannelpy_peers{instance="a",state="missing"}', "2"),
    "FlannelpyPeersUnreached": ('flannelpy_unreached_peers{instance="a",layer="mtu"}', "2"),
    "FlannelpyRecordsUnusable": ('flannelpy_peers{instance="a",state="refused"}', "1"),
    "FlannelpyStoreSilent": ('flannelpy_store_up{instance="a"}', "0"),
    "FlannelpyLeaseEndsSoon": ('flannelpy_lease_expiry_timestamp_seconds{instance="a"}', "2900"),
    "FlannelpyLeaseConflict": ('flannelpy_lease_conflict{instance="a"}', "1"),
    "FlannelpyRulesMissing": ('flannelpy_rules_ok{instance="a"}', "0"),
    "FlannelpyRepairsOften": ('flannelpy_repairs_total{instance="a"}', "grows"),
    "FlannelpyPoolNearlyFull": ('flannelpy_pool_used_subnets{instance="a",family="ipv4"}', "240"),
    "FlannelpyStrangers": ('flannelpy_unexplained_packets_total{instance="a",reason="stranger"}', "grows"),
}
WELL = {
    "up": "1", "stuck": "0", "ready": "1", "store_up": "1", "lease_conflict": "0", "rules_ok": "1",
    "lease_expiry": "90000", "peers": "0", "repairs": "3", "pool_used": "100", "unexplained": "0",
    "unreached": "0",
}  # fmt: skip


def series(values: dict[str, str]) -> list[dict[str, str]]:
    """Every metric of the alerts for 20 minutes, one value a minute."""
    pool = {'flannelpy_pool_subnets{instance="a",family="ipv4"}': "255"}
    return [
        {"series": name, "values": "0+10x20" if value == "grows" else f"{value}x20"}
        for name, value in {**values, **pool}.items()
    ]


def well() -> dict[str, str]:
    found = {}
    for name, _value in FIRES.values():
        bare = name.removeprefix("flannelpy_")
        (key,) = sorted((key for key in WELL if bare.startswith(key)), key=len)[-1:]
        found[name] = WELL[key]
    return found


@needs_promtool
@pytest.mark.parametrize("alert", [*FIRES, ""])
def test_each_alert_fires_when_it_should_and_alone(tmp_path: Path, alert: str) -> None:
    values = well()
    if alert:
        values[FIRES[alert][0]] = FIRES[alert][1]
    expected = [
        {"eval_time": "20m", "alertname": name, "exp_alerts": [] if name != alert else [firing(alert)]}
        for name in FIRES
    ]
    test: dict[str, Any] = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series(values), "alert_rule_test": expected}],
    }
    path = tmp_path / "test.yml"
    path.write_text(json.dumps(test))  # JSON is YAML
    assert "SUCCESS" in promtool("test", "rules", str(path))


def firing(alert: str) -> dict[str, Any]:
    """Labels and annotations as the rule has them, filled in for our one instance."""
    block = RULES.read_text().partition(f"- alert: {alert}\n")[2].partition("- alert:")[0]
    texts = dict(re.findall(r'(summary|description): "(.*)"', block))
    value = {"FlannelpyPoolNearlyFull": "94.12%"}.get(alert, FIRES[alert][1])
    for mark, text in (
        ("{{ $labels.instance }}", "a"),
        ("{{ $labels.family }}", "ipv4"),
        ("{{ $labels.layer }}", "mtu"),
        ("{{ $value | humanizePercentage }}", value),
        ("{{ $value }}", value),
    ):
        texts = {key: words.replace(mark, text) for key, words in texts.items()}
    labels = dict(re.findall(r'(\w+)="(\w+)"', FIRES[alert][0]))
    if "sum by (instance)" in block:
        labels = {"instance": "a"}
    (severity,) = re.findall(r"severity: (\w+)", block)
    return {"exp_labels": {**labels, "severity": severity}, "exp_annotations": texts}


# --- the dashboard ---


@needs_promtool
def test_the_dashboards_queries_are_valid(tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(found) >= 10
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places), "two panels in one place"
    plain = [text.replace("$__rate_interval", "5m").replace("$instance", ".*") for text in found]
    rules = [{"record": f"check:{number}", "expr": text} for number, text in enumerate(plain)]
    path = tmp_path / "dashboard.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(found)} rules found" in promtool("check", "rules", str(path))
