"""How fast packets travel from pod to pod, by backend: TCP, packets a second, ping, and what it costs.

    sudo .venv/bin/python -m bench.data_path [--flannel /path/to/flanneld] [--rounds 3] [--output json]

What is measured how stands in bench/README.md.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.offloads import PLAIN_NIC, set_features
from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import NETNS, inside, wait_ready, wait_until

PREFIX = "fpdata"
WIRES = ("1500", "offload")
_TICKS = os.sysconf("SC_CLK_TCK")
_LOSS = 0.01
Figures = dict[str, float]


def main() -> int:
    """Measure in turns (A B A B), print a table or JSON."""
    options = _options()
    modes = options.modes.split(",")
    commands = {mode: [options.flannel] if mode.startswith("flannel") else [] for mode in modes}
    results: dict[str, dict[str, list[Figures]]] = {}
    for number in range(options.rounds):
        for wire in options.wires.split(","):
            for mode in modes:
                print(f"round {number + 1}: {mode}, {wire} wire", file=sys.stderr, flush=True)
                with _pods(mode, commands[mode], wire) as (lab, one, two):
                    figures = _measure(lab, one, two, options.seconds)
                results.setdefault(wire, {}).setdefault(mode, []).append(figures)
    print(json.dumps(results, indent=1) if options.output == "json" else _table(results))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--flannel", default=os.environ.get("FLANNELD", ""), help="a flanneld to compare with"
    )
    parser.add_argument(
        "--modes", default="", help="of: host-gw, vxlan, udp, slow udp, flannel udp; comma-separated"
    )
    parser.add_argument("--wires", default=",".join(WIRES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    options.modes = options.modes or "host-gw,vxlan,udp,slow udp" + (
        ",flannel udp" if options.flannel else ""
    )
    return options


@contextlib.contextmanager
def _pods(mode: str, command: Sequence[str], wire: str) -> Iterator[tuple[Lab, Node, Node]]:
    """Two nodes of one backend with a pod each, which reach each other."""
    backend: dict[str, str] = {"Type": mode.rpartition(" ")[2]}
    if mode == "slow udp":
        backend["FastPath"] = "off"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        lab = stack.enter_context(Lab(f"{PREFIX}{os.getpid()}-", folder / "lab"))
        lab.start_etcd()
        lab.put_config({"Network": "10.5.0.0/16", "Backend": backend})
        one, two = lab.add_node(), lab.add_node()
        if wire == "1500":
            for node in (one, two):
                _inside(node.netns, "eth0", PLAIN_NIC)
                # veth merges what arrives only if the other end sends no super-packets.
                _inside(lab.underlay, node.name, PLAIN_NIC)
        for node in (one, two):  # one after the other: flannel may lose a race
            wait_ready([lab.start_daemon(node, command)])
            lab.add_pod(node)
        _remind(lab)
        _favour([Path("/proc/self"), *_processes(one), *_processes(two)])
        wait_until(lambda: lab.ping(one.pods[0].netns, _address(two), count=1).received, "the first ping")
        yield lab, one, two


def _remind(lab: Lab) -> None:
    """Put every lease once more: flannel may have missed one, and then waits for ever."""
    lines = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/").splitlines()
    for key, value in zip(lines[::2], lines[1::2], strict=True):
        lab.etcdctl("put", key, value)


def _inside(netns: str, device: str, features: dict[str, bool]) -> None:
    """Set features in a process that is inside: this one stays where it is."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with (NETNS / netns).open("rb") as namespace:
                os_setns(namespace.fileno())
            set_features(device, features)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"cannot set the offloads of {device}")


def os_setns(descriptor: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _address(node: Node) -> str:
    assert node.pods[0].address is not None
    return str(node.pods[0].address.ip)


def _measure(lab: Lab, one: Node, two: Node, seconds: int) -> Figures:
    figures: Figures = {}
    for streams in (1, 4):
        before = _cpu(one) + _cpu(two)
        answer = _iperf(lab, one, two, ["-C", "cubic", "-P", str(streams), "-t", str(seconds)])
        gbit = answer["end"]["sum_received"]["bytes"] * 8 / 1e9
        figures[f"TCP {streams}, Gbit/s"] = gbit / answer["end"]["sum_received"]["seconds"]
        figures[f"TCP {streams}, CPU s/Gbit"] = (_cpu(one) + _cpu(two) - before) / gbit
    sent, lost = _flood(lab, one, two, 0, seconds)
    figures["flood, kpps"] = (sent - lost) / seconds / 1000
    figures["kpps at < 1 % loss"] = _without_loss(lab, one, two)
    words = ["ping", "-n", "-i", "0.005", "-c", "400", _address(two)]
    done = subprocess.run(inside(one.pods[0].netns, *words), capture_output=True, text=True, check=True)
    times = sorted(float(found) * 1000 for found in re.findall(r"time=([\d.]+)", done.stdout))
    figures["ping p50, us"] = times[len(times) // 2]
    figures["ping p99, us"] = times[len(times) * 99 // 100]
    return figures


def _iperf(lab: Lab, one: Node, two: Node, words: Sequence[str]) -> Any:
    """iperf3's own report. Under a flood its control connection may be lost: then once more."""
    answer: Any = {}
    for _attempt in range(3):
        server = lab.start("iperf", two.pods[0].netns, ["iperf3", "-s", "-1"])
        listening = Path(f"/proc/{server.popen.pid}/net/tcp6")
        wait_until(lambda listening=listening: ":1451 " in listening.read_text(), "iperf3")  # type: ignore[misc]
        _favour([Path(f"/proc/{server.popen.pid}")])
        client = inside(one.pods[0].netns, "iperf3", "-J", "-c", _address(two), *words)
        done = subprocess.run(client, capture_output=True, text=True, check=False)
        server.popen.terminate()
        server.popen.wait()
        answer = json.loads(done.stdout)
        if "error" not in answer and ("sum" in answer["end"] or "sum_received" in answer["end"]):
            return answer
    raise SystemExit(f"iperf3 failed: {answer.get('error')}")


def _flood(lab: Lab, one: Node, two: Node, kpps: float, seconds: int) -> tuple[int, int]:
    """(packets sent, lost) of 100-byte UDP payloads at a rate; 0 = as fast as it goes."""
    rate = ["-b", f"{kpps * 800_000:.0f}"] if kpps else ["-b", "0"]
    words = ["-u", "-l", "100", "-t", str(seconds), "-w", "4M", *rate]
    total = _iperf(lab, one, two, words)["end"]["sum"]
    return total["packets"], total["lost_packets"]


def _without_loss(lab: Lab, one: Node, two: Node) -> float:
    """The highest rate of a bisection with less than 1 % lost, in kpps."""
    low, high = 0.0, 320.0
    for _step in range(5):
        middle = (low + high) / 2
        sent, lost = _flood(lab, one, two, middle, 1)
        reached = sent / 1000 > 0.9 * middle
        low, high = (middle, high) if lost < _LOSS * sent and reached else (low, middle)
    return low


def _cpu(node: Node) -> float:
    """CPU seconds of the daemon and the forwarder."""
    total = 0
    for process in _processes(node):
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def _processes(node: Node) -> list[Path]:
    """What runs in the node's own namespace."""
    identity = (NETNS / node.netns).stat().st_ino
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "ns/net").stat().st_ino == identity:
                found.append(entry)
    return found


def _favour(processes: Sequence[Path]) -> None:
    """Let what is measured go before the machine's other work, all of it alike."""
    for process in processes:
        with contextlib.suppress(OSError):
            (process / "autogroup").write_text("-20\n")
            os.setpriority(os.PRIO_PROCESS, int(process.resolve().name), -20)


def _table(results: dict[str, dict[str, list[Figures]]]) -> str:
    lines = []
    for wire, modes in results.items():
        lines.append(f"\n{wire} wire: min / median / max of {len(next(iter(modes.values())))} rounds")
        names = list(next(iter(modes.values()))[0])
        rows = [["", *modes]] + [[name, *(_cell(runs, name) for runs in modes.values())] for name in names]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _cell(runs: Sequence[Figures], name: str) -> str:
    values = sorted(run[name] for run in runs)
    return f"{values[0]:.3g} / {statistics.median(values):.3g} / {values[-1]:.3g}"


if __name__ == "__main__":
    sys.exit(main())
