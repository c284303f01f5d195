"""The machinery of one run: a node's network namespace, an etcd in another, and the daemon under test."""

import contextlib
import ctypes
import http.client
import json
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from bench.netns import PREFIX, SCRATCH, Namespace
from bench.observer import Observer
from bench.peers import ETCD_ADDRESS, KEYS, NODE_ADDRESS, UNDERLAY_LENGTH, Peer, base64_text, network_config

UPLINK = "uplink0"
_TRANSACTION = 100  # operations; etcd refuses more than 128
_IN_MOVED_TO, _IN_CLOSE_WRITE = 0x80, 0x8
_INOTIFY_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Etcd:
    """An etcd of our own, spoken to through its JSON gateway over one keep-alive connection."""

    def __init__(self, netns: Namespace, scratch: Path, backend: str) -> None:
        url = f"http://{ETCD_ADDRESS}:2379"
        words = ["etcd", f"--data-dir={scratch / 'etcd'}", f"--listen-client-urls={url}"]
        words += [f"--advertise-client-urls={url}", "--listen-peer-urls=http://127.0.0.1:2380"]
        words += ["--log-level=error", "--logger=zap"]
        self._log = (scratch / "etcd.log").open("wb")
        self._process = subprocess.Popen(
            netns.command(words), stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._connection = _InsideConnection(netns)
        self._backend = backend
        try:
            self._lease = self._first_answer(time.monotonic() + 20)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def fileno(self) -> int:
        """The connection's file descriptor, to wait for an answer."""
        return self._connection.sock.fileno()

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the gateway and its answer."""
        self.send(path, body)
        return self.answer()

    def send(self, path: str, body: dict[str, Any]) -> None:
        self._connection.request("POST", f"/v3/{path}", json.dumps(body).encode())

    def answer(self) -> dict[str, Any]:
        response = self._connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"etcd answered {response.status}: {answer}")
        return answer

    def put_request(self, peer: Peer) -> dict[str, Any]:
        """The body of a put of the peer's lease; all peers share one etcd lease."""
        return {"key": peer.key(), "value": peer.value(self._backend), "lease": self._lease}

    def put_in_transactions(self, peers: Sequence[Peer]) -> None:
        for start in range(0, len(peers), _TRANSACTION):
            some = peers[start : start + _TRANSACTION]
            self.call("kv/txn", {"success": [{"request_put": self.put_request(peer)} for peer in some]})

    def requests(self) -> dict[str, int]:
        """Calls that etcd has counted so far, by gRPC method; as `messages` what clients sent in all, so that
        traffic on a long-lived stream counts too."""
        self._connection.request("GET", "/metrics")
        text = self._connection.getresponse().read().decode()
        pattern = r'^grpc_server_(started|msg_received)_total\{grpc_method="(\w+)".*\} ([\d.e+]+)$'
        counts: dict[str, int] = {}
        for what, method, number in re.findall(pattern, text, re.MULTILINE):
            name = method if what == "started" else "messages"
            counts[name] = counts.get(name, 0) + int(float(number))
        return counts

    def _first_answer(self, deadline: float) -> str:
        while True:
            try:
                return str(self.call("lease/grant", {"TTL": 86400})["ID"])
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                self._connection.close()
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise SystemExit(
                        f"etcd does not answer ({error}): {_tail(Path(self._log.name))}"
                    ) from error
                time.sleep(0.02)


class _InsideConnection(http.client.HTTPConnection):
    def __init__(self, netns: Namespace) -> None:
        super().__init__(ETCD_ADDRESS, 2379, timeout=30)
        self._netns = netns

    def connect(self) -> None:
        with self._netns.entered():
            super().connect()


class SubnetFile:
    """A place for subnet.env, and when a file last came to stand there (by inotify)."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "subnet.env"
        self._fd = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if _libc.inotify_add_watch(self._fd, bytes(directory), _IN_MOVED_TO | _IN_CLOSE_WRITE) < 0:
            raise OSError(ctypes.get_errno(), f"inotify_add_watch {directory}")

    def fileno(self) -> int:
        return self._fd

    def written(self) -> bool:
        """True when it was renamed into place, or closed after writing, since the last call; never blocks."""
        seen = False
        while True:
            try:
                events = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return seen
            offset = 0
            while offset < len(events):
                *_, length = _INOTIFY_EVENT.unpack_from(events, offset)
                offset += _INOTIFY_EVENT.size + length
                seen |= events[offset - length : offset].rstrip(b"\0") == self.path.name.encode()

    def close(self) -> None:
        os.close(self._fd)


class Daemon:
    """The process under test, from exec to exit. `started` is the time (monotonic ns) just before exec."""

    def __init__(self, rig: "Rig", command: str) -> None:
        words = shlex.split(command.replace("{dir}", str(rig.directory)))
        words += [f"--etcd-endpoints=http://{ETCD_ADDRESS}:2379", f"--iface={UPLINK}"]
        words.append(f"--subnet-file={rig.subnet_file.path}")
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
        self._log = (rig.scratch / "daemon.log").open("wb")
        self.started = time.monotonic_ns()
        self._process = subprocess.Popen(
            rig.node.command(words), stdout=self._log, stderr=self._log, env=environ, start_new_session=True
        )
        self._pidfd = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    def ended(self) -> str:
        """Why it cannot go on, for the report; empty while it runs."""
        code = self._process.poll()
        return "" if code is None else f"exited with {code}: {_tail(Path(self._log.name))}"

    def age_ms(self, now: int) -> float:
        """A time (monotonic ns) as ms since exec."""
        return (now - self.started) / 1e6

    def cpu_s(self) -> float:
        """User and system time of the process and its children, gone or alive, in seconds."""
        pid = self._process.pid
        total = sum(_cpu_clock(one) for one in (pid, *_descendants(pid)))
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return total + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> tuple[float, float]:
        """Resident memory now and at its peak, children that are alive included."""
        now = peak = 0
        for pid in (self._process.pid, *_descendants(self._process.pid)):
            with contextlib.suppress(FileNotFoundError):
                status = dict(
                    re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                )
                now += int(status["VmRSS"])
                peak += int(status["VmHWM"])
        return now / 1024, peak / 1024

    def stop(self, seconds: float = 20) -> tuple[float, int | None]:
        """SIGTERM; (ms until it was gone, exit code), code None when it had to be killed."""
        begun = time.monotonic_ns()
        self._process.send_signal(signal.SIGTERM)
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        gone = bool(waiting.poll(seconds * 1000))
        took = (time.monotonic_ns() - begun) / 1e6
        self.close()
        return took, self._process.returncode if gone else None

    def close(self) -> None:
        """Make sure that it is gone."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)
        self._log.close()


class Rig:
    """Everything that one run needs, made afresh for it; leave it through `with`, whatever happens."""

    def __init__(self, backend: str) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=SCRATCH))
        self._undo = contextlib.ExitStack()
        self._undo.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        try:
            self._build(backend)
        except BaseException:
            self.__exit__()
            raise

    def _build(self, backend: str) -> None:
        self.directory = self.scratch / "node"
        self.directory.mkdir()
        self.node = Namespace("node")
        self._undo.callback(self.node.close)
        store = Namespace("etcd")
        self._undo.callback(store.close)
        self.node.ip("link", "add", UPLINK, "type", "veth", "peer", "name", "etcd0", "netns", store.name)
        for netns, device, address in ((self.node, UPLINK, NODE_ADDRESS), (store, "etcd0", ETCD_ADDRESS)):
            netns.ip("address", "add", f"{address}/{UNDERLAY_LENGTH}", "dev", device)
            netns.ip("link", "set", device, "up")
        self.etcd = Etcd(store, self.scratch, backend)
        self._undo.callback(self.etcd.close)
        config = {"key": base64_text(f"{KEYS}/config"), "value": base64_text(network_config(backend))}
        self.etcd.call("kv/put", config)
        self.observer = Observer(self.node)
        self._undo.callback(self.observer.close)
        self.subnet_file = SubnetFile(self.directory)
        self._undo.callback(self.subnet_file.close)

    def start(self, command: str) -> Daemon:
        """Run a daemon's command line on the node."""
        daemon = Daemon(self, command)
        self._undo.callback(daemon.close)
        return daemon

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            self._undo.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C or SIGTERM does not interrupt the clearing away."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cpu_clock(pid: int) -> float:
    """A process's CPU clock; see clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = list(parents.get(root, ()))
    for pid in found:
        found.extend(parents.get(pid, ()))
    return found


def _tail(path: Path) -> str:
    """The last lines of a log, on one line."""
    lines = path.read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-3:]) or "(no output)"
