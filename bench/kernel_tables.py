"""What 10,000 peers cost in the kernel's tables: our batches against one request at a time, in one run.

Usage and how to read the table: bench/README.md. Needs root, iproute2 and, for the whole daemon, etcd.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it also runs by its path

from bench.kernel_cases import STORM_RATE, STORM_SECONDS, Figures, events_sent, storm
from bench.netns import Namespace, sweep
from bench.peers import NODE_ADDRESS, UNDERLAY_LENGTH, Peer
from bench.rig import UPLINK, Rig
from bench.scenario import Plan, Run, Scenario

_CASES = Path(__file__).with_name("kernel_cases.py")
_BACKENDS = ("vxlan", "host-gw")
_IDLE_SECONDS = 10.0
_PROGRAM = (
    ("on_link_ms", "which are on-link"),
    ("update_ms", "Peers.update"),
    ("plan_ms", "plan"),
    ("apply_ms", "apply"),
    ("sum_ms", "sum"),
    ("sum_cpu_ms", "its CPU"),
)
_LABEL, _CELL = 44, 12

Result = dict[str, Figures]
"""Case -> its figures, medians over the rounds."""


def run_case(case: str, peers: int, backend: str) -> Figures:
    """One case in a fresh namespace and a fresh process."""
    node = Namespace("node")
    try:
        node.ip("link", "add", UPLINK, "type", "veth", "peer", "name", "far0")
        node.ip("address", "add", f"{NODE_ADDRESS}/{UNDERLAY_LENGTH}", "dev", UPLINK)
        for device in (UPLINK, "far0"):
            node.ip("link", "set", device, "up")
        words = [sys.executable, str(_CASES), case, str(peers), backend]
        done = subprocess.run(node.command(words), stdout=subprocess.PIPE, text=True, check=False)
    finally:
        node.close()
    if done.returncode != 0:
        raise SystemExit(f"{case} with {peers} peers of {backend} failed")
    figures: Figures = json.loads(done.stdout)
    return figures


def whole_daemon(command: str, peers: int) -> Figures:
    """A real daemon with etcd: its memory, and what it costs at rest, alone and beside a busy neighbour."""
    plan = Plan({"ours": command}, [peers], 1, "vxlan", 0)
    with Rig("vxlan") as rig:
        scenario = Scenario(rig, plan, Run("ours", peers, 1))
        rig.etcd.put_in_transactions([Peer(number) for number in range(peers)])
        daemon = scenario.cold_start()
        rig.node.ip("link", "add", "busy0", "type", "veth", "peer", "name", "busy1")
        rig.node.ip("link", "set", "busy0", "up")
        figures = {name: scenario.run.values[name] for name in ("rss_mib", "peak_rss_mib")}
        time.sleep(_IDLE_SECONDS)  # a start ends with a second look at everything
        for name, busy in (("quiet", False), ("storm", True)):
            process = storm(*rig.node.command([])) if busy else None
            used, began = daemon.cpu_s(), time.monotonic()
            time.sleep(STORM_SECONDS if busy else _IDLE_SECONDS)
            figures[f"{name}_cpu_pct"] = (daemon.cpu_s() - used) / (time.monotonic() - began) * 100
            if process:
                figures["events_per_s"] = events_sent(process) / STORM_SECONDS
    return figures


def measure(sizes: Sequence[int], rounds: int, command: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    most = max(sizes)
    for backend in _BACKENDS:
        for peers in sizes:
            cases = ["program", "one_by_one", "resync", *(["events"] if peers == most else [])]
            if peers == most and backend == "vxlan":
                cases.append("echoes")
            all_rounds: dict[str, list[Figures]] = {case: [] for case in cases}
            for _round in range(rounds):
                for case in cases:
                    all_rounds[case].append(run_case(case, peers, backend))
            results[f"{backend} {peers}"] = {case: _medians(some) for case, some in all_rounds.items()}
            print(f"{backend}, {peers} peers: done", file=sys.stderr)
    results["foreign"] = run_case("foreign", 0, "vxlan")
    results["daemon"] = whole_daemon(command, most)
    about = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "rounds": rounds,
        "sizes": list(sizes),
    }
    return {"about": about, "results": results}


def _medians(rounds: Sequence[Figures]) -> Figures:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def table(found: dict[str, Any]) -> str:
    """Times in ms; each figure is the median of the rounds."""
    about, results = found["about"], found["results"]
    sizes = about["sizes"]
    head = (
        f"{about['when']}, kernel {about['kernel']}, {about['cpus']} CPUs, median of {about['rounds']} rounds"
    )
    lines = [head, "times in ms; ratio: one request at a time / ours"]
    for backend in _BACKENDS:
        columns = [results[f"{backend} {peers}"] for peers in sizes]
        lines += ["", _line(backend, [f"{peers:,}" for peers in sizes])]
        lines += _programming(columns)
        lines += _single_events(sizes[-1], columns[-1])
    daemon, foreign = results["daemon"], results["foreign"]
    echoes = results[f"vxlan {sizes[-1]}"]["echoes"]
    bare = results[f"vxlan {sizes[-1]}"]["program"]["apply_cpu_ms"]
    lines += [
        "",
        f"listening, while {sizes[-1]:,} vxlan peers are programmed",
        _line("  apply, CPU, with no listener", [_number(bare)]),
        _line("  apply, CPU, with ours", [_number(echoes["apply_cpu_ms"])]),
        _line(f"  {echoes['notices']:.0f} echoes read, CPU", [_number(echoes["listen_cpu_ms"])]),
        f"{STORM_RATE:,} neighbour events a second on a foreign device, % of one core",
        _line("  listener alone, with its filter", [_number(foreign["with_filter_cpu_pct"])]),
        _line("  listener alone, without", [_number(foreign["without_filter_cpu_pct"])]),
        _line(f"  whole daemon with {sizes[-1]:,} peers", [_number(daemon["storm_cpu_pct"])]),
        _line("  the same without the events", [_number(daemon["quiet_cpu_pct"])]),
        _line(f"whole daemon with {sizes[-1]:,} peers, MiB resident", [_number(daemon["rss_mib"])]),
        _line("  its peak", [_number(daemon["peak_rss_mib"])]),
    ]
    return "\n".join(lines)


def _programming(columns: Sequence[Result]) -> Iterator[str]:
    for name, label in _PROGRAM:
        yield _line(f"  program: {label}", [_number(one["program"][name]) for one in columns])
    yield _line("  one request at a time", [_number(one["one_by_one"]["sum_ms"]) for one in columns])
    ratios = [one["one_by_one"]["sum_ms"] / one["program"]["sum_ms"] for one in columns]
    yield _line("  ratio", [f"{ratio:.1f}x" for ratio in ratios])
    yield _line("  resync with nothing to do", [_number(one["resync"]["wall_ms"]) for one in columns])
    yield _line("  its CPU", [_number(one["resync"]["cpu_ms"]) for one in columns])


def _single_events(peers: int, column: Result) -> Iterator[str]:
    yield _line(f"  one event at {peers:,} peers, CPU", ["p50", "p99"])
    for name in ("MAC", "public IP", "add", "remove"):
        if f"{name}_p50_cpu_ms" in column["events"]:
            yield _line(
                f"    {name}", [_number(column["events"][f"{name}_{at}_cpu_ms"]) for at in ("p50", "p99")]
            )
    single = column["one_by_one"]
    yield _line(
        "    add, one request at a time", [_number(single[f"add_{at}_cpu_ms"]) for at in ("p50", "p99")]
    )


def _line(label: str, cells: Sequence[str]) -> str:
    return label.ljust(_LABEL) + "".join(cell.rjust(_CELL) for cell in cells)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default="1000,5000,10000", help="how many (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep()
    command = f"{sys.executable} -m flannelpy --iptables-forward-rules=false"
    found = measure([int(one) for one in given.peers.split(",")], given.rounds, command)
    print(json.dumps(found, indent=1) if given.output == "json" else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
