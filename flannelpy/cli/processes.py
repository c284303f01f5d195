"""Processes in network namespaces: run to their end, or started with a log and a line to us (sd_notify)."""

import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flannelpy.errors import FlannelpyError

T = TypeVar("T")
NETNS = Path("/run/netns")


class LabError(FlannelpyError):
    """Something in the lab does not come up; `log` is the file where the process that failed says why."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(slots=True, eq=False)
class Process:
    """A process in a namespace, with its log and its line to us (sd_notify)."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    notify: socket.socket
    started: float
    ready_after: float | None = None
    """Seconds from the start to READY=1."""
    status: str = ""

    def listen(self) -> None:
        """Take in what the process has told so far."""
        while select.select([self.notify], [], [], 0)[0]:
            for line in self.notify.recv(65536).decode(errors="replace").splitlines():
                if line == "READY=1" and self.ready_after is None:
                    self.ready_after = time.monotonic() - self.started
                elif line.startswith("STATUS="):
                    self.status = line.removeprefix("STATUS=")


def inside(netns: str, *command: str) -> list[str]:
    """The command line that runs a program in a namespace.

    `ip netns exec` would mount another /sys, without the control groups; nsenter leaves all else alone.
    """
    return ["nsenter", f"--net={NETNS / netns}", "--", *command]


def run(*command: str, netns: str = "", stdin: str = "", timeout: float = 20) -> str:
    """Run a program to its end and return its output. Raises LabError with what it complains about."""
    whole = inside(netns, *command) if netns else list(command)
    try:
        done = subprocess.run(
            whole, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError as error:
        raise LabError(missing(error.filename)) from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)} has not ended after {timeout:g} s") from None
    if done.returncode:
        complaint = " ".join((done.stderr or done.stdout).split())
        raise LabError(f"{' '.join(command)}{': ' + netns if netns else ''}: {complaint or done.returncode}")
    return done.stdout


def missing(program: str) -> str:
    """One line for a program that is not installed."""
    packages = {
        "etcd": "etcd-server",
        "etcdctl": "etcd-client",
        "ip": "iproute2",
        "nsenter": "util-linux",
        "ping": "iputils-ping",
        "setpriv": "util-linux",
        "sysctl": "procps",
    }
    remedy = f": apt-get install {packages[program]}" if program in packages else ""
    return f"{program} is not installed{remedy}"


def wait_until(condition: Callable[[], T], what: str, timeout: float = 10) -> T:
    """Call `condition` until it returns something true and return that. Raises LabError naming `what`."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.02)
    return found


def start(name: str, netns: str, command: Sequence[str], folder: Path, log: Path) -> Process:
    """Start a process; its output goes to the end of its log, its socket for sd_notify into the folder.

    It gets SIGKILL when the thread ends that calls this, so that nothing survives a lab that was killed.
    """
    if shutil.which(command[0]) is None:
        raise LabError(missing(command[0]))
    path = folder / f"{name}.notify"
    path.unlink(missing_ok=True)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(path))
    with log.open("ab") as output:
        popen = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *inside(netns, *command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": str(path)},
            start_new_session=True,  # Ctrl-C is for us: we end the processes in order
        )
    return Process(name, popen, log, notify, time.monotonic())


def wait_ready(processes: Iterable[Process], timeout: float = 20) -> None:
    """Wait until each has sent READY=1. Raises LabError for the first that ends or takes too long."""
    waiting = list(processes)
    deadline = time.monotonic() + timeout
    while waiting:
        # Messages wake us at once; only the end of a process is looked for every 50 ms.
        select.select([process.notify for process in waiting], [], [], 0.05)
        for process in waiting:
            process.listen()
            code = process.popen.poll()
            if process.ready_after is None and code is not None:
                raise LabError(f"{process.name}: exit code {code} before it was ready", process.log)
        waiting = [process for process in waiting if process.ready_after is None]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(process.name for process in waiting)
            raise LabError(f"{names}: not ready after {timeout:g} s", waiting[0].log)


def stop(processes: Iterable[Process], timeout: float = 5) -> None:
    """End processes: ask all of them, then kill the ones that have not gone in time."""
    running = [process for process in processes if process.popen.poll() is None]
    for process in running:
        process.popen.terminate()
    deadline = time.monotonic() + timeout
    for process in running:
        try:
            process.popen.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
