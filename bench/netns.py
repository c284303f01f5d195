"""Network namespaces of one run, by iproute2; and the clearing away of runs that were killed."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_NAMED = Path("/run/netns")
PREFIX = "fpbench"
SCRATCH = Path("/dev/shm")
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A named network namespace, made on construction; `close()` takes it away with all that is in it."""

    def __init__(self, role: str) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{role}"
        _ip("netns", "add", self.name)
        self._fd = os.open(_NAMED / self.name, os.O_RDONLY | os.O_CLOEXEC)
        self.ip("link", "set", "lo", "up")

    def ip(self, *words: str) -> None:
        """Run `ip` inside."""
        _ip("-n", self.name, *words)

    def command(self, words: list[str]) -> list[str]:
        """`words` as a command line that runs inside; the process keeps its id across `ip netns exec`."""
        return ["ip", "netns", "exec", self.name, *words]

    def exec_ms(self) -> float:
        """How long it takes to run a program that does nothing, inside."""
        begun = time.monotonic()
        subprocess.run(self.command(["true"]), check=True)
        return (time.monotonic() - begun) * 1000

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is inside for the duration; sockets opened then stay inside."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._fd)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def close(self) -> None:
        os.close(self._fd)
        _remove(self.name)


def sweep() -> None:
    """Take away what runs that were killed outright (their process is gone) left behind."""
    for path in _NAMED.glob(f"{PREFIX}*-*"):
        if _orphaned(path):
            _remove(path.name)
    for path in SCRATCH.glob(f"{PREFIX}*-*"):
        if _orphaned(path):
            shutil.rmtree(path, ignore_errors=True)


def _remove(name: str) -> None:
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in inside.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", name)


def _orphaned(path: Path) -> bool:
    match = re.fullmatch(rf"{PREFIX}(\d+)-\w+", path.name)
    return match is not None and not Path(f"/proc/{match[1]}").exists()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"ip {' '.join(words)} failed: {done.stderr.strip()}; root and iproute2 are needed")


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
