"""How a daemon follows the nodes of a large Kubernetes cluster: time, memory, requests, heartbeats.

    sudo .venv/bin/python -m bench.kube_scale --nodes 1000,5000 --rounds 3 \\
        --daemon ours='.venv/bin/flannelpy' --daemon flannel='/path/to/flanneld'

The API server is the stand-in of the tests, over HTTPS, in the namespace of the node; its own time is in
all figures, for every daemon alike. Each node object has about 5 KB. A change is a new node; 100 of them;
what it takes to ask the API server for it is in the time, and stands above it.
A flannel with 5,000 nodes and more needs EVENT_QUEUE_DEPTH (env EVENT_QUEUE_DEPTH=20000 /path/to/flanneld):
with its default it uses a whole processor for ever.
Heartbeats: the status of every node is written once; CPU is what the daemon used from then until it rests.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.netns import Namespace, sweep
from bench.observer import ROUTE, Observer
from tests.kube.api import StandIn

_CHANGES = 100
_DEADLINE_S = 120.0


class Inside(StandIn):
    """The stand-in in a namespace."""

    def __init__(self, folder: Path, netns: Namespace) -> None:
        self._netns = netns
        super().__init__(folder, "127.0.0.1", command=tuple(netns.command([])))

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        with self._netns.entered():
            return super().call(method, path, body, kind)


class Daemon:
    """One process, without what its environment says of itself."""

    def __init__(self, netns: Namespace, command: str, flags: list[str], log: Path) -> None:
        self.began = time.monotonic_ns()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                netns.command([*shlex.split(command), *flags]),
                stdout=output, stderr=output, env=environ | {"NODE_NAME": "bench"},
            )  # fmt: skip

    def cpu_s(self) -> float:
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> tuple[float, float]:
        """(resident now, the peak)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split() for line in lines}
        return int(found["VmRSS"][1]) / 1024, int(found["VmHWM"][1]) / 1024

    def settle(self) -> float:
        """Wait until it uses less than 10 ms in half a second -> its CPU time then. Some never rest."""
        used = self.cpu_s()
        for _half_second in range(60):
            time.sleep(0.5)
            now = self.cpu_s()
            if now - used < 0.01:
                break
            used = now
        return used

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def wait(condition: Callable[[], object], what: str, log: Path) -> int:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited in vain for {what}:\n{log.read_text()[-2000:]}")
        time.sleep(0.0005)
    return time.monotonic_ns()


def measure(command: str, nodes: int) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="kube-scale-"))
    netns = Namespace("kube")
    api = None
    try:
        netns.ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
        netns.ip("link", "set", "up1", "up")
        netns.ip("address", "add", "192.168.77.1/24", "dev", "up0")
        netns.ip("link", "set", "up0", "up")
        netns.ip("link", "set", "lo", "up")
        netns.ip("route", "add", "default", "via", "192.168.77.254")
        api = Inside(folder, netns)
        api.add_node("bench", ("10.127.0.0/24",))
        api.do("many", {"first": 0, "count": nodes})
        return measured(Run(folder, netns, api, command), nodes)
    finally:
        if api is not None:
            api.stop()
        netns.close()
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """Where one daemon is measured."""

    def __init__(self, folder: Path, netns: Namespace, api: Inside, command: str) -> None:
        config = folder / "net-conf.json"
        config.write_text(json.dumps({"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}))
        self.env = folder / "subnet.env"
        self.log = folder / "log"
        self.api = api
        self._netns = netns
        self._command = command.replace("{dir}", str(folder))
        self._flags = [
            "--kube-subnet-mgr", f"--kubeconfig-file={api.kubeconfig()}", f"--net-config-path={config}",
            f"--subnet-file={self.env}", "--iface=up0", "--iptables-forward-rules=false",
        ]  # fmt: skip
        self.observer = Observer(netns)

    def start(self) -> Daemon:
        return Daemon(self._netns, self._command, self._flags, self.log)


def asked(api: Inside) -> float:
    """How long it takes to ask the API server something, the connection included."""
    began = time.monotonic_ns()
    api.do("state")
    return (time.monotonic_ns() - began) / 1e6


def measured(run: Run, nodes: int) -> dict[str, float]:
    """A start, changes, heartbeats, a restart."""
    values: dict[str, float] = {}
    observer = run.observer
    daemon = run.start()
    values["exec to subnet.env, ms"] = (wait(run.env.exists, "subnet.env", run.log) - daemon.began) / 1e6
    added = observer.added
    if not observer.wait_for(lambda: len(added[ROUTE]) >= nodes, _DEADLINE_S):
        raise SystemExit(f"{len(added[ROUTE])} of {nodes} routes:\n{run.log.read_text()[-2000:]}")
    values["exec to last route, ms"] = (max(added[ROUTE].values()) - daemon.began) / 1e6
    values["CPU until at rest, s"] = daemon.settle()
    values["memory at rest, MiB"], values["memory peak, MiB"] = daemon.memory_mib()
    for verb, count in run.api.requests().items():
        values[f"requests of a start: {verb}"] = count - (1 if verb == "create" else 0)

    values["the API server's own answer p50, ms"] = statistics.median(asked(run.api) for _ in range(_CHANGES))
    taken = []
    for number in range(nodes, nodes + _CHANGES):
        observer.forget()
        began = time.monotonic_ns()
        run.api.do("many", {"first": number, "count": 1})
        if observer.wait_for(lambda: bool(observer.added[ROUTE]), 5):
            taken.append((min(observer.added[ROUTE].values()) - began) / 1e6)
        time.sleep(0.015)
    taken.sort()
    values["changes without a route"] = _CHANGES - len(taken)
    values["node to route p50, ms"] = statistics.median(taken)
    values["node to route p99, ms"] = taken[int(len(taken) * 0.99) - 1]

    before, rounds = daemon.settle(), max(1, 5000 // nodes)
    for _round in range(rounds):
        run.api.do("heartbeats", nodes)
    values["CPU of a heartbeat, us"] = (daemon.settle() - before) / (nodes * rounds) * 1e6
    daemon.stop()

    counted = run.api.requests()
    observer.forget()
    daemon = run.start()
    wait(lambda: run.api.requests()["watch"] > counted["watch"], "the watch", run.log)
    values["CPU of a restart, s"] = daemon.settle()
    values["requests of a restart"] = sum(run.api.requests().values()) - sum(counted.values())
    observer.drain()
    values["routes that vanished"] = len(observer.removed[ROUTE])
    daemon.stop()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--daemon", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--nodes", default="1000,5000")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    daemons = dict(one.split("=", 1) for one in options.daemon)
    sweep()
    for nodes in map(int, options.nodes.split(",")):
        found: dict[str, dict[str, list[float]]] = {name: {} for name in daemons}
        for number in range(options.rounds):
            for name, command in daemons.items():
                print(f"{nodes} nodes, round {number + 1}, {name}", file=sys.stderr)
                for key, value in measure(command, nodes).items():
                    found[name].setdefault(key, []).append(value)
        print(f"\n{nodes} nodes (median of {options.rounds})\n")
        for key in dict.fromkeys(key for values in found.values() for key in values):
            cells = [statistics.median(values[key]) if key in values else None for values in found.values()]
            shown = "".join(f"{'-' if cell is None else f'{cell:.1f}':>12}" for cell in cells)
            print(f"{key:40}{shown}")


if __name__ == "__main__":
    main()
