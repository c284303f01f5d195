"""What is watched while a fault goes on: packets, routes, processor time, log lines."""

import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import Process

RATE = 100
"""Pings a second."""


class Flow:
    """Pings from one pod to another, all numbered."""

    def __init__(self, lab: Lab, source: Node, target: Node) -> None:
        address = target.pods[0].address
        assert address is not None
        name = f"ping-{source.name}-{target.name}"
        self._start = _size(lab.logs / f"{name}.log")
        command = ["ping", "-n", f"-i{1 / RATE:g}", str(address.ip)]
        self._process = lab.start(name, source.pods[0].netns, command)

    def end(self) -> tuple[int, list[int]]:
        """(answers, numbers that were not answered though a later one was)."""
        self._process.popen.send_signal(signal.SIGINT)
        self._process.popen.wait(10)
        text = self._process.log.read_bytes()[self._start :].decode()
        seen = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", text)}
        return len(seen), sorted(set(range(1, max(seen, default=1) + 1)) - seen)


class Routes:
    """All that the kernel announces about our routes on a node."""

    def __init__(self, lab: Lab, node: Node) -> None:
        name = f"routes-{node.name}"
        self._start = _size(lab.logs / f"{name}.log")
        self._process = lab.start(name, node.netns, ["ip", "monitor", "route"])

    def seen(self) -> list[str]:
        """The announcements so far, one a line."""
        text = self._process.log.read_bytes()[self._start :].decode()
        return [line.strip() for line in text.splitlines() if "proto 70" in line]

    def end(self) -> list[str]:
        """All of them."""
        self._process.popen.kill()
        self._process.popen.wait(10)
        return self.seen()


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


class Usage(NamedTuple):
    """A daemon between two moments."""

    cpu: float
    """Percent of one processor."""
    lines: list[str]
    """What it logged."""


class Watched:
    """A daemon from now on."""

    def __init__(self, daemon: Process) -> None:
        self._daemon = daemon
        # clock_getcpuclockid(3): user and system time of all its threads.
        self._clock = ~daemon.popen.pid << 3 | 2
        self._cpu = time.clock_gettime(self._clock)
        self._began = time.monotonic()
        self._start = daemon.log.stat().st_size

    def usage(self) -> Usage:
        """Until now."""
        assert self._daemon.popen.poll() is None, f"{self._daemon.name} has ended"
        spent = time.clock_gettime(self._clock) - self._cpu
        text = self._daemon.log.read_bytes()[self._start :].decode()
        return Usage(100 * spent / (time.monotonic() - self._began), text.splitlines())
