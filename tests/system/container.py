"""A machine as a container: systemd, started by systemd-nspawn, on the kernel of this host.

The root is an overlay in memory over the cached Debian, the network a link to the wire's bridge.
"""

import contextlib
import os
import subprocess
import time
from pathlib import Path

from tests.system.machine import Machine, MachineError
from tests.system.wire import GATEWAY, NETWORK, Wire, children

PROGRAMS = ("systemd-nspawn", "nsenter", "unshare", "setpriv", "ip")
LAYER = """
mkdir -p "$1/system" "$1/upper" "$1/work" "$1/docker" "$1/containerd"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/system"
"""
NETWORK_FILE = f"""
cat >"$1/system/etc/systemd/network/10-lan.network" <<END
[Match]
Name=host0
[Network]
Address=$3/{NETWORK.prefixlen}
Gateway={GATEWAY}
IPv6AcceptRA=no
END
"""
# Each container in a control group of its own, else two would share one.
START = """
for folder in $1; do mkdir -p "$folder"; echo 0 >"$folder/cgroup.procs"; done
shift
exec "$@"
"""
ENVIRONMENT = {
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1",  # dockerd writes below /proc/sys
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",  # whatever this host has
}
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
INSIDE = (
    "env",
    "-i",
    "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LC_ALL=C.UTF-8",
    "sh",
    "-c",
)


def prepare(wire: Wire, root: Path) -> Path:
    """A folder with `system`, the cached Debian with a layer to install in, and `upper`, that layer."""
    _remove_old_groups()
    folder = wire.folder / "program"
    wire.run(LAYER, str(folder), str(root))
    return folder


class Container(Machine):
    """`lower` are the layers below its own, as overlay has them. It boots at once."""

    def __init__(self, name: str, address: str, wire: Wire, lower: str) -> None:
        super().__init__(name, address)
        self._wire = wire
        self._folder = wire.folder / name
        self._log = wire.folder.with_name(f"{name}.log")
        self._groups = [folder / f"flannelpy-{os.getpid()}-{name}" for folder in _own_groups()]
        wire.run(LAYER + NETWORK_FILE, str(self._folder), lower, address)
        self.boot()

    def boot(self) -> None:
        folder = self._folder
        argv = [
            "systemd-nspawn", f"--directory={folder / 'system'}", f"--machine={self.name}",
            f"--hostname={self.name}", "--boot",
            "--register=no", "--keep-unit", "--network-bridge=lan", "--console=pipe", "--capability=all",
            "--system-call-filter=@keyring bpf",  # runc's session keyring, device rules
            "--bind=/dev/net/tun", "--resolv-conf=off",
            # Docker's layers are overlays themselves, which need another place than an overlay.
            f"--bind={folder / 'docker'}:/var/lib/docker",
            f"--bind={folder / 'containerd'}:/var/lib/containerd",
        ]  # fmt: skip
        groups = " ".join(str(group) for group in self._groups)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._wire.command("sh", "-ec", START, "sh", groups, *argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
            )
        self._leader = 0

    def execute(self, command: str, timeout: float) -> tuple[int, str]:
        self._leader = self._leader or _leader(self._process.pid)
        if not self._leader:
            raise MachineError(
                f"{self.name}: no first process, exit code {self._process.poll()}\n{self.log()}"
            )
        target = ["nsenter", f"--target={self._leader}", *NAMESPACES, "--wdns=/", "--", *INSIDE, command]
        try:
            done = subprocess.run(
                target,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name}: no end after {timeout:g} s: {command}") from None
        return done.returncode, done.stdout.decode(errors="replace")

    def begin_reboot(self) -> None:
        # Off and on: a reboot by nspawn itself would do the same.
        self.run("systemctl --no-block poweroff")
        self._process.wait(60)
        self.boot()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        self._process.wait(10)  # the wire was closed, and has ended it
        for group in self._groups:
            _remove_group(group)


def _remove_group(group: Path) -> None:
    """A control group whose processes have ended, or are about to."""
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:
        for folder in [*sorted(group.rglob("*/"), reverse=True), group]:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _remove_old_groups() -> None:
    """Those of a test run that was killed: their names hold its process id."""
    for folder in _own_groups():
        for group in folder.glob("flannelpy-*-*"):
            if not Path("/proc", group.name.split("-")[1]).exists():
                _remove_group(group)


def _leader(pid: int) -> int:
    """The first process of the container that a process of ours has started; 0 if it does not run yet."""
    try:
        for child in children(pid):
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                return child
            if found := _leader(child):
                return found
    except OSError:
        pass
    return 0


def _own_groups() -> list[Path]:
    """Our own control group in each hierarchy that systemd-nspawn uses."""
    paths = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path.lstrip("/")
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.append(Path(place, paths[""]))
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            found.append(Path(place, paths["name=systemd"]))
    return found
