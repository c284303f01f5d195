"""`flannelpy demo`: an overlay on this one machine, from nothing to pods that ping each other, in seconds."""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Network, ip_interface
from itertools import permutations
from pathlib import Path
from statistics import median
from types import FrameType

from flannelpy.cli.lab import ETCD_PREFIX, GATEWAY, UNDERLAY, Lab, Node, Ping, Pod, leftovers, remove
from flannelpy.cli.processes import LabError, tail, wait_ready
from flannelpy.errors import FlannelpyError, SettingsError

PREFIX = "fpdemo-"
FOLDER = Path("/run/flannelpy-demo")
_AT_A_TIME = 8
_LOGS_SHOWN = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(FlannelpyError):
    """The demo cannot run on this machine, or what it shows does not work."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the demo tells about one node. `reached` of its `peers` answered; times in milliseconds."""

    node: str
    public_ip: str
    subnet: str
    device: str
    mtu: int
    reached: int
    peers: int
    rtt_ms: float | None
    ready_after_ms: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A pod that did not get an answer from another one, and what ping said at the end."""

    source: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """The whole demo."""

    network: str
    rows: list[Row]
    lost: list[Lost]
    elapsed: float

    @property
    def pairs(self) -> int:
        """How many ordered pairs of pods there are."""
        return sum(row.peers for row in self.rows)


class Clock:
    """Progress on stderr, each line with the seconds since the start."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"{self.elapsed():5.1f} s  {text}", file=sys.stderr, flush=True)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began


def main(argv: list[str]) -> int:
    """0: every pod reached every other one. 1: not so. FlannelpyError if the demo cannot run here."""
    options = _options(argv)
    _check_options(options)
    if os.geteuid() != 0:
        raise DemoError("the demo makes network namespaces and needs root: run it with sudo")
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # a non-login shell of root may lack them
    clock = Clock()
    with _alone(), _signals() as ignore_signals:
        _remove_leftovers(clock)
        with Lab(PREFIX, FOLDER, logs=options.keep_logs) as lab:
            try:
                return _show(lab, options, clock)
            except LabError as error:
                _show_log(error.log)
                raise
            finally:
                ignore_signals()  # what was made is removed, however often Ctrl-C is pressed


def _show(lab: Lab, options: argparse.Namespace, clock: Clock) -> int:
    if options.backend == "vxlan":
        _check_vxlan(lab)
    _start(lab, options, clock)
    result = _measure(lab, options, clock)
    print(_as_json(result) if options.output == "json" else _as_text(result), flush=True)
    failing = {lost.source for lost in result.lost}
    for node in [node for node in lab.nodes if node.name in failing][:_LOGS_SHOWN]:
        _show_log(node.daemon.log if node.daemon else None)
    if options.keep_logs:
        clock.say(f"the logs are in {options.keep_logs}")
    if options.hold:
        _hold(lab, clock)
    return 1 if result.lost else 0


def _start(lab: Lab, options: argparse.Namespace, clock: Clock) -> None:
    """Bring up everything up to the pods."""
    clock.say(f"making {options.nodes} nodes: a network namespace each, on one bridge ({UNDERLAY})")
    for _ in range(options.nodes):
        lab.add_node()
    clock.say("starting etcd and storing the network's configuration in it")
    lab.start_etcd()
    lab.put_config({"Network": str(options.network), "Backend": {"Type": options.backend}})
    clock.say("starting the daemon on every node")
    started = [lab.start_daemon(node, options.daemon.get(node.number, ())) for node in lab.nodes]
    wait_ready(started, _left(options, clock))
    clock.say("every daemon has its subnet and is ready; putting a pod on every node")
    for node in lab.nodes:
        lab.add_pod(node)


def _measure(lab: Lab, options: argparse.Namespace, clock: Clock) -> Result:
    """Let every pod ping every other one, a few pairs at a time."""
    pairs = list(permutations(lab.nodes, 2))
    clock.say(f"pinging: {len(pairs)} pairs of pods, packets as large as the overlay carries")
    given_up = threading.Event()

    def reach(pair: tuple[Node, Node]) -> Ping:
        source, target = (node.pods[0] for node in pair)
        size = int(pair[0].subnet_env()["FLANNEL_MTU"])
        while True:
            ping = lab.ping(source.netns, str(_address(target)), size=size)
            if ping.received == ping.sent or given_up.is_set() or _left(options, clock) <= 0:
                return ping

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            pings = dict(zip(pairs, pool.map(reach, pairs), strict=True))
        finally:
            given_up.set()
            pool.shutdown(cancel_futures=True)
    lost = [
        Lost(source.name, target.name, ping.text.strip().splitlines()[-1])
        for (source, target), ping in pings.items()
        if ping.received < ping.sent
    ]
    rows = [
        _row(lab, node, [ping for (source, _), ping in pings.items() if source is node]) for node in lab.nodes
    ]
    return Result(str(options.network), rows, lost, clock.elapsed())


def _row(lab: Lab, node: Node, pings: Sequence[Ping]) -> Row:
    env = node.subnet_env()
    peer = next(other for other in lab.nodes if other is not node)
    try:
        # Asked of the kernel, so that it is right for every backend and every daemon.
        route = lab.ip_json(node.netns, f"route get {_address(peer.pods[0])}")[0]
    except LabError:
        route = {}
    lost = not route or route.get("gateway") == str(GATEWAY)  # the default route leads nowhere
    trips = [ping.rtt for ping in pings if ping.rtt is not None]
    return Row(
        node=node.name,
        public_ip=str(node.address),
        subnet=str(ip_interface(env["FLANNEL_SUBNET"]).network),
        device="no route" if lost else route["dev"],
        mtu=int(env["FLANNEL_MTU"]),
        reached=sum(ping.received == ping.sent for ping in pings),
        peers=len(pings),
        rtt_ms=round(median(trips), 3) if trips else None,
        ready_after_ms=round(1000 * (node.daemon.ready_after or 0)) if node.daemon else 0,
    )


def _address(pod: Pod) -> IPv4Address:
    if pod.address is None:
        raise LabError(f"{pod.netns} has no IPv4 address: subnet.env of its node holds no FLANNEL_SUBNET")
    return pod.address.ip


def _as_text(result: Result) -> str:
    head = ("node", "public IP", "subnet", "device", "MTU", "pods reached", "RTT ms", "ready after")
    lines = [head] + [
        (row.node, row.public_ip, row.subnet, row.device, str(row.mtu), f"{row.reached}/{row.peers}",
         "-" if row.rtt_ms is None else f"{row.rtt_ms:.2f}", f"{row.ready_after_ms} ms")
        for row in result.rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    if result.lost:
        first = result.lost[0]
        closing = (
            f"{len(result.lost)} of {result.pairs} pairs of pods do not reach each other; "
            f"{first.source} to {first.target}: {first.reason}"
        )
    else:
        closing = (
            f"Every pod reaches every other pod through the overlay {result.network}: "
            f"{result.pairs} of {result.pairs} pairs, {result.elapsed:.1f} s from nothing."
        )
    return "\n".join(["", *table, "", closing])


def _as_json(result: Result) -> str:
    return json.dumps(
        {
            "ok": not result.lost,
            "network": result.network,
            "elapsed_s": round(result.elapsed, 3),
            "nodes": [asdict(row) for row in result.rows],
            "lost": [asdict(lost) for lost in result.lost],
        },
        indent=2,
    )


def _hold(lab: Lab, clock: Clock) -> None:
    """Say how to look around and wait for Ctrl-C."""
    first, second = lab.nodes[0], lab.nodes[1]
    print(
        f"""
Look around from another terminal, for example:

  ip netns exec {first.netns} ip route
  ip netns exec {first.netns} ip -d link
  ip netns exec {first.pods[0].netns} ping {_address(second.pods[0])}
  ip netns exec {lab.underlay} etcdctl get --prefix {ETCD_PREFIX}
  tail -f {lab.logs}/{first.name}.log

Ctrl-C ends it all and removes everything.""",
        file=sys.stderr,
        flush=True,
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        running = [node.daemon for node in lab.nodes if node.daemon]
        while signal.sigtimedwait(_SIGNALS, 0.5) is None:
            for process in list(running):
                process.listen()  # a daemon that talks to nobody would wait for us
                if process.popen.poll() is not None:
                    clock.say(f"{process.name}: its daemon has ended, exit code {process.popen.returncode}")
                    running.remove(process)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _show_log(log: Path | None) -> None:
    if log and log.exists():
        end = textwrap.indent(tail(log), "  ")
        print(f"\nthe end of {log.name}:\n{end}\n", file=sys.stderr, flush=True)


def _left(options: argparse.Namespace, clock: Clock) -> float:
    return float(options.timeout) - clock.elapsed()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock that says that the namespaces of our prefix are those of a demo that runs."""
    with Path("/run/flannelpy-demo.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError("another demo is running on this machine: end it first (Ctrl-C)") from None
        yield


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Turn signals into SystemExit, so that everything is cleaned up; yields what makes them be ignored."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def ignore() -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_leftovers(clock: Clock) -> None:
    """A demo that was killed could not clean up. We hold the lock, so nobody uses what is there."""
    if found := leftovers(PREFIX):
        clock.say(f"removing what an earlier demo has left behind: {len(found)} namespaces")
        remove(found)
    shutil.rmtree(FOLDER, ignore_errors=True)


def _check_vxlan(lab: Lab) -> None:
    try:
        lab.ip(lab.underlay, "link add probe type vxlan id 1 dstport 8472", "link delete probe")
    except LabError as error:
        raise DemoError(
            f"this kernel makes no vxlan devices; try `modprobe vxlan`, or --backend udp ({error})"
        ) from None


def _check_options(options: argparse.Namespace) -> None:
    """Each node gets a /24, and the first one of the network stays free, as flannel leaves it."""
    network, nodes = options.network, options.nodes
    if network.prefixlen > 21 or 1 << (24 - network.prefixlen) <= nodes:
        raise SettingsError(f"--network {network} has no room for {nodes} subnets of /24: give a /16")
    if network.overlaps(UNDERLAY):
        raise SettingsError(f"--network {network} overlaps {UNDERLAY}, where the nodes are: give another")
    for number, command in options.daemon.items():
        if not 1 <= number <= nodes:
            raise SettingsError(f"--daemon {number}={shlex.join(command)}: there are nodes 1 to {nodes}")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flannelpy demo",
        description="An overlay on this one machine: nodes in network namespaces, etcd between them, "
        "and on every node a daemon and a pod; every pod pings every other one. "
        "Needs root; removes all that it makes.",
    )
    add = parser.add_argument
    add("--nodes", type=_count, default=3, metavar="N", help="number of nodes, 2 to 20 (3)")
    add("--network", type=IPv4Network, default=IPv4Network("10.5.0.0/16"), metavar="CIDR",
        help="the overlay's network (10.5.0.0/16)")  # fmt: skip
    add("--backend", choices=("vxlan", "host-gw", "udp"), default="vxlan",
        help="how packets travel from node to node (vxlan)")  # fmt: skip
    add("--hold", action="store_true", help="leave everything up until Ctrl-C, to look around")
    add("--output", choices=("text", "json"), default="text", help="a table, or JSON for programs")
    add("--timeout", type=float, default=60, metavar="SECONDS", help="give up after so long (60)")
    add("--keep-logs", type=Path, metavar="DIR", help="write the logs there and leave them")
    add("--daemon", type=_command, action="append", default=[], metavar="N=COMMAND",
        help="what to run on node N in place of flannelpy, such as a flanneld; repeatable")  # fmt: skip
    options = parser.parse_args(argv)
    options.daemon = dict(options.daemon)
    return options


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 2 <= int(text[:4]) <= 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to 20")
    return int(text)


def _command(text: str) -> tuple[int, list[str]]:
    number, _, command = text.partition("=")
    if not number.isdecimal() or not command.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not N=COMMAND, such as 2=/usr/bin/flanneld")
    return int(number), shlex.split(command)
