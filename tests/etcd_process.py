"""A real etcd in a process of its own: started on free loopback ports, killed, paused, restarted by pid."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ETCD = shutil.which("etcd")
ETCDCTL = shutil.which("etcdctl")
RESTORER = shutil.which("etcdutl") or ETCDCTL
"""What makes data of a snapshot: from 3.6 on etcdctl does not."""

_READY = (b"serving client traffic", b"enabled capabilities")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Return as soon as `condition` holds; AssertionError with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s: {what}"
        time.sleep(0.01)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EtcdProcess:
    """One single-member etcd; its port stays the same over restarts.

    `flags` are added to the command line, `scheme` is https if they make it speak TLS.
    """

    def __init__(self, directory: Path, *, flags: Sequence[str] = (), scheme: str = "http") -> None:
        assert ETCD is not None, "no etcd in PATH"
        self.directory = directory
        self.port = free_port()
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        self.log = directory / "etcd.log"
        self.ctl_flags: tuple[str, ...] = ()
        """For `ctl`: user, certificates."""
        peer = f"http://127.0.0.1:{free_port()}"
        # A single member need not wait long for its own vote, and nothing here must survive a power cut.
        self._command = [
            ETCD, "--name=test", f"--data-dir={directory / 'data'}", "--logger=zap", "--log-level=info",
            f"--listen-client-urls={self.endpoint}", f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=test={peer}", "--heartbeat-interval=10", "--election-timeout=100",
            "--bcrypt-cost=4", *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def flag(self, name: str) -> str:
        """The value of a flag on etcd's command line."""
        return next(word.partition("=")[2] for word in self._command if word.startswith(f"{name}="))

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "etcd does not run"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it serves."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            start = log.tell()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        try:
            wait_until(lambda: self._serves(start), f"etcd serves, see {self.log}")
        except BaseException:
            self.kill()
            raise

    def _serves(self, start: int) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"etcd ended: {self.log.read_text()[-2000:]}"
        logged = self.log.read_bytes()[start:]
        return all(text in logged for text in _READY)

    def kill(self) -> None:
        """SIGKILL: no goodbye to the clients."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay up, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal is on its way when kill() returns: until it has arrived, a thread may still answer.
        tasks = Path(f"/proc/{self.pid}/task")
        wait_until(lambda: all(_state(task) in "TZX" for task in tasks.iterdir()), "etcd is stopped")

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, forget: bool = False) -> None:
        """Kill and start again; `forget` starts with empty data."""
        self.kill()
        if forget:
            shutil.rmtree(self.directory / "data")
        self.start()

    def ctl(self, *arguments: str) -> str:
        """What etcdctl prints."""
        assert ETCDCTL is not None, "no etcdctl in PATH"
        command = [ETCDCTL, f"--endpoints={self.endpoint}", *self.ctl_flags, *arguments]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    def ctl_json(self, *arguments: str) -> Any:
        """The same, decoded: byte strings are in base64."""
        return json.loads(self.ctl(*arguments, "--write-out=json"))


def _state(task: Path) -> str:
    """The scheduler's letter for a thread; Z if it has ended meanwhile."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
