"""The results of `control_plane.py --output json` as a table: `python bench/report.py results.json`."""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_ROWS = (
    ("start", "", ""),
    ("env_ms", "exec to subnet.env", "ms"),
    ("first_route_ms", "exec to first route", "ms"),
    ("all_routes_ms", "exec to last route", "ms"),
    ("cpu_s", "CPU up to then", "s"),
    ("observer_cpu_s", "CPU of this program itself", "s"),
    ("settled_cpu_s", "CPU until at rest", "s"),
    ("etcd_requests", "etcd requests", ""),
    ("etcd_messages", "messages to etcd", ""),
    ("rss_mib", "memory at rest", "MiB"),
    ("peak_rss_mib", "memory, peak", "MiB"),
    ("idle_cpu_pct", "CPU at rest", "%"),
    ("single events", "", ""),
    ("etcd_ack_ms", "etcd's own answer, p50", "ms"),
    ("put_p50_ms", "put to route, p50", "ms"),
    ("put_p99_ms", "put to route, p99", "ms"),
    ("put_max_ms", "put to route, max", "ms"),
    ("put_lost", "puts without a route", ""),
    ("put_cpu_ms", "CPU per put", "ms"),
    ("delete_p50_ms", "delete to no route, p50", "ms"),
    ("delete_p99_ms", "delete to no route, p99", "ms"),
    ("delete_max_ms", "delete to no route, max", "ms"),
    ("delete_lost", "deletes without effect", ""),
    ("restart", "", ""),
    ("restart_exit_ms", "SIGTERM to exit", "ms"),
    ("restart_env_ms", "exec to new subnet.env", "ms"),
    ("restart_cpu_s", "CPU until at rest", "s"),
    ("restart_vanished", "routes that vanished", ""),
    ("restart_stale", "stale routes kept, of 10", ""),
    ("bursts", "", ""),
    ("burst_put_ms", "200 puts, etcd's share", "ms"),
    ("burst_routes", "200 puts: routes", ""),
    ("burst_last_ms", "200 puts: last route", "ms"),
    ("txn_burst_put_ms", "2 x 100, etcd's share", "ms"),
    ("txn_burst_routes", "2 x 100: routes", ""),
    ("txn_burst_last_ms", "2 x 100: last route", "ms"),
    ("exit_ms", "SIGTERM to exit", "ms"),
)
BURST = 200
_LABEL, _CELL, _RATIO = 30, 28, 9


def table(results: dict[str, Any]) -> str:
    """One block per number of leases; cells are min / median / max over the rounds."""
    about, runs = results["about"], results["runs"]
    names = list(about["daemons"])
    lines = [
        f"{about['when']}, kernel {about['kernel']}, {about['cpus']} CPUs, etcd {about['etcd']}",
        f"config {about['config']}",
        f"min / median / max of {about['rounds']} rounds (one figure: all the same)",
        f"every time from exec holds {about['exec_ms']:.1f} ms of `ip netns exec`",
        *(f"{name}: {command}" for name, command in about["daemons"].items()),
        f"ratio: of the median to {names[-1]}'s; none for a burst's last route where routes are missing",
    ]
    for leases in about["leases"]:
        lines += ["", *_block(leases, names, [run for run in runs if run["leases"] == leases])]
    problems = [
        f"  {run['daemon']}, {run['leases']} leases, round {run['round']}: {problem}"
        for run in runs
        for problem in run["problems"]
    ]
    return "\n".join([*lines, "", *_verdict(about, runs, problems)])


def _verdict(about: dict[str, Any], runs: list[dict[str, Any]], problems: list[str]) -> list[str]:
    planned = len(about["daemons"]) * len(about["leases"]) * about["rounds"]
    if problems or len(runs) < planned:
        return [f"INCOMPLETE ({len(runs)} of {planned} runs were begun)", *problems]
    return [f"all {planned} runs were complete"]


def _block(leases: int, names: list[str], runs: list[dict[str, Any]]) -> list[str]:
    lines = [_line(f"{leases:,} leases", names, ["ratio"] * (len(names) - 1))]
    for key, label, unit in _ROWS:
        if not label:
            lines.append(f"-- {key}")
            continue
        found = {name: _values(runs, name, key) for name in names}
        if not any(found.values()):
            continue
        counts = {name: sum(run["daemon"] == name for run in runs) for name in names}
        cells = [_cell(found[name], counts[name]) for name in names]
        ratios = _ratios(found, names) if _comparable(runs, key) else []
        lines.append(_line(f"{label}{f', {unit}' if unit else ''}", cells, ratios))
    lines.append(_line("exit codes", [_codes(runs, name) for name in names], []))
    lines += [f"etcd requests of {name}: {_requests(runs, name)}" for name in names]
    return lines


def _comparable(runs: list[dict[str, Any]], key: str) -> bool:
    """Whether a time means the same for all: a last route says little when routes before it never came."""
    if not key.endswith("burst_last_ms"):
        return True
    return all(run["values"].get(key.replace("last_ms", "routes"), 0) == BURST for run in runs)


def _values(runs: list[dict[str, Any]], name: str, key: str) -> list[float]:
    return [run["values"][key] for run in runs if run["daemon"] == name and key in run["values"]]


def _cell(values: list[float], runs: int) -> str:
    if not values:
        return "-"
    shown = [_number(value) for value in (min(values), statistics.median(values), max(values))]
    text = " / ".join(shown) if len(set(shown)) > 1 else shown[0]
    return text if len(values) == runs else f"{text} ({len(values)} of {runs})"


def _ratios(found: dict[str, list[float]], names: list[str]) -> list[str]:
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    base = medians.get(names[-1], 0.0)
    ratios = [medians[name] / base if base and name in medians else None for name in names[:-1]]
    return ["" if one is None else f"{one:.2f}" if one >= 0.1 or not one else f"{one:.1g}" for one in ratios]


def _codes(runs: list[dict[str, Any]], name: str) -> str:
    codes = Counter(
        "killed" if c is None else str(c) for r in runs if r["daemon"] == name for c in r["exit_codes"]
    )
    return ", ".join(f"{code} ({count}x)" for code, count in codes.items()) or "-"


def _requests(runs: list[dict[str, Any]], name: str) -> str:
    """By method, of the first run that got that far."""
    for run in runs:
        if run["daemon"] == name and run["etcd_requests"]:
            counts = run["etcd_requests"].items()
            return ", ".join(f"{method} {count}" for method, count in counts if method != "messages")
    return "-"


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _line(label: str, cells: list[str], ratios: list[str]) -> str:
    row = [
        label.ljust(_LABEL),
        *(cell.rjust(_CELL) for cell in cells),
        *(one.rjust(_RATIO) for one in ratios),
    ]
    return "".join(row).rstrip()


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
