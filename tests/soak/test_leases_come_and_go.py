"""Hours in minutes: what a daemon holds does not grow while leases come and go, and at rest it rests.

`make soak` runs this; it prints its figures.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import run, wait_ready, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(1200)]

LEASES = int(os.environ.get("FLANNELPY_SOAK_LEASES", "5000"))
CYCLES = 20
IDLE_SECONDS = 30
IDLE_LIMIT = 0.3
"""Percent of one core."""
GROWTH = 1.05
_TRANSACTION = 100  # etcd refuses more than 128 operations
SUBNETS = f"{ETCD_PREFIX}/subnets"


def put_leases(lab: Lab) -> None:
    """Leases of nodes that do not exist, in 10.64.0.0/24 and above."""
    for start in range(0, LEASES, _TRANSACTION):
        puts = []
        for number in range(start, min(start + _TRANSACTION, LEASES)):
            high, low = divmod(number, 256)
            lease: dict[str, Any] = {
                "PublicIP": f"172.16.{high}.{low}",
                "PublicIPv6": None,
                "BackendType": "vxlan",
            }
            lease["BackendData"] = {"VNI": 1, "VtepMAC": f"02:00:00:01:{high:02x}:{low:02x}"}
            puts.append(f"put {SUBNETS}/10.{64 + high}.{low}.0-24 {json.dumps(json.dumps(lease))}\n")
        lab.etcdctl("txn", stdin=f"\n{''.join(puts)}\n\n")


def routes(node: Node) -> int:
    return run("ip", "route", "show", "proto", "70", netns=node.netns).count("\n")


def memory(pid: int) -> int:
    """Resident, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu_used(pid: int, seconds: float) -> float:
    """Seconds of CPU in the `seconds` to come; see clock_getcpuclockid(3)."""
    clock = ~pid << 3 | 2
    before = time.clock_gettime(clock)
    time.sleep(seconds)
    return time.clock_gettime(clock) - before


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def test_nothing_grows_and_a_daemon_at_rest_rests(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    lab.start_etcd()
    # Its own subnet lies below those of the others.
    bounds = {"SubnetMin": "10.1.0.0", "SubnetMax": "10.9.0.0"}
    lab.put_config({"Network": "10.0.0.0/8", "SubnetLen": 24, **bounds, "Backend": {"Type": "vxlan"}})
    node = lab.add_node()
    daemon = lab.start_daemon(node)
    wait_ready([daemon])
    pid = daemon.popen.pid
    resident, open_files = [], []
    for cycle in range(CYCLES):
        put_leases(lab)
        wait_until(lambda: routes(node) == LEASES, f"{LEASES} routes in cycle {cycle}", 60)
        resident.append(memory(pid))
        open_files.append(descriptors(pid))
        if cycle < CYCLES - 1:
            lab.etcdctl("del", f"{SUBNETS}/10.6", f"{SUBNETS}/10.9")
            wait_until(lambda: routes(node) == 0, f"no routes in cycle {cycle}", 60)
    wait_until(lambda: cpu_used(pid, 1) < 0.01, "the daemon to rest", 60)
    idle = cpu_used(pid, IDLE_SECONDS) / IDLE_SECONDS * 100
    sys.stderr.write(
        f"\nMiB resident: {' '.join(f'{one / 1024:.1f}' for one in resident)}\nopen files: {open_files}\n"
        f"CPU at rest with {LEASES} peers, over {IDLE_SECONDS} s: {idle:.3f} %\n"
    )
    assert mean(resident[-5:]) < mean(resident[2:7]) * GROWTH, resident
    assert mean(open_files[-5:]) <= mean(open_files[2:7]), open_files
    assert idle < IDLE_LIMIT
