"""How fast, and at what cost, a daemon follows etcd: several daemons side by side on this machine.

Usage and how to read the table: bench/README.md. Needs root, iproute2 and etcd.
"""

import argparse
import http.client
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it also runs by its path

from bench.netns import sweep
from bench.peers import network_config
from bench.report import table
from bench.rig import Rig
from bench.scenario import IncompleteError, Plan, Run, Scenario, percentile


def one_run(plan: Plan, run: Run) -> None:
    """Measure one run into `run`."""
    with Rig(plan.backend) as rig:
        try:
            Scenario(rig, plan, run).measure()
        except IncompleteError as error:
            run.problems.append(f"stopped there: {error}")
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            run.problems.append(f"stopped there, the bench itself failed: {error!r}")
        if rig.observer.overrun:
            run.problems.append("the observer's socket overflowed: times after that are not to be trusted")


def warm_up(plan: Plan, name: str) -> float:
    """Start a daemon once without counting it, so that its files are in the page cache; returns the ms that
    `ip netns exec` and exec take by themselves, part of every time that begins with exec."""
    with Rig(plan.backend) as rig:
        scenario = Scenario(rig, plan, Run(name, 0, 0))
        try:
            scenario.cold_start()
        except IncompleteError as error:
            print(f"{name}: the warm-up start failed: {error}", file=sys.stderr)
        return percentile([rig.node.exec_ms() for _ in range(11)], 50)


def about(plan: Plan, exec_ms: float) -> dict[str, Any]:
    """What one must know to read the figures."""
    etcd = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "etcd": etcd.split()[2],
        "config": network_config(plan.backend),
        "exec_ms": exec_ms,
        **asdict(plan),
    }


def measure(plan: Plan) -> dict[str, Any]:
    """Every run, the daemons taking turns within a round; an interruption keeps what is done."""
    runs: list[Run] = []
    exec_ms = 0.0
    try:
        for name in plan.daemons:
            exec_ms = warm_up(plan, name)
        for leases in plan.leases:
            for number in range(1, plan.rounds + 1):
                for name in plan.daemons:
                    begun = time.monotonic()
                    runs.append(Run(name, leases, number))
                    one_run(plan, runs[-1])
                    took = f"{time.monotonic() - begun:.0f} s"
                    print(
                        f"{name}, {leases} leases, round {number}: {took}",
                        *runs[-1].problems,
                        sep="\n  ",
                        file=sys.stderr,
                    )
    except KeyboardInterrupt:
        print("interrupted; the table holds what was done", file=sys.stderr)
        if runs:
            runs[-1].problems.append("interrupted in this run or right after it")
    return {"about": about(plan, exec_ms), "runs": [asdict(run) for run in runs]}


def arguments(argv: Sequence[str]) -> tuple[Plan, str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--daemon",
        action="append",
        required=True,
        metavar="NAME=COMMAND",
        help="repeatable; takes flannel's flags; {dir} is a directory of the run; the last is the reference",
    )
    parser.add_argument(
        "--leases", default="0,1000,5000", help="numbers of leases already in etcd (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--events", type=int, default=200, help="single puts, and deletes, per run (default %(default)s)"
    )
    parser.add_argument("--backend", choices=("vxlan", "host-gw"), default="vxlan")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    given = parser.parse_args(argv)
    daemons = dict(one.split("=", 1) for one in given.daemon if "=" in one)
    if len(daemons) != len(given.daemon):
        parser.error("--daemon: give each as NAME=COMMAND, each name once")
    leases = [int(one) for one in given.leases.split(",")]
    return Plan(daemons, leases, given.rounds, given.backend, given.events), given.output


def main(argv: Sequence[str]) -> int:
    plan, output = arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep()
    results = measure(plan)
    print(json.dumps(results, indent=1) if output == "json" else table(results))
    complete = len(results["runs"]) == len(plan.daemons) * len(plan.leases) * plan.rounds
    return 1 if not complete or any(run["problems"] for run in results["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
