"""The network between the machines: a bridge in namespaces of its own, whose gateway is the outside world.

Network, mounts and processes of all machines live in these namespaces. They end with their first process, and
that one ends with the thread that made it: a killed test run leaves nothing behind.
"""

import subprocess
import sys
from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path

NETWORK = IPv4Network("192.168.78.0/24")
GATEWAY = str(NETWORK[254])
ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child",
         "--mount-proc", "--")  # fmt: skip
FIRST = f"""
mount -t tmpfs -o mode=0755 machines "$1"
mount -t tmpfs nspawn /run/systemd
ip link set lo up
ip link add lan type bridge
ip link set lan up
ip address add {GATEWAY}/{NETWORK.prefixlen} dev lan
echo ready
exec sleep infinity
"""
ANSWER = """
import socket, sys
server = socket.create_server(("0.0.0.0", 80))
print("ready", flush=True)
while True:
    client, (address, _) = server.accept()
    with client:
        client.recv(4096)
        client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n" + address.encode())
"""


class Wire:
    """The namespaces. `folder` is an empty tmpfs in them; machines keep their files there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._first = _started([*ALONE, "sh", "-ec", FIRST, "sh", str(folder)])
        (self._pid,) = children(self._first.pid)
        # The outside world: tells each visitor which address it came from.
        self._outside = _started(self.command(sys.executable, "-c", ANSWER))

    def command(self, *argv: str) -> list[str]:
        """The command line that runs a program in these namespaces."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", "--wdns=/", "--", *argv]

    def run(self, script: str, *arguments: str, timeout: float = 60) -> str:
        """Run a shell script to its end; its output. CalledProcessError if it fails."""
        command = self.command("sh", "-ec", script, "sh", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """End every process in the namespaces, and with them all mounts and links."""
        for process in (self._first, self._outside):
            process.kill()
            process.communicate(timeout=10)
        self.folder.rmdir()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _started(command: Sequence[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    assert line == "ready\n", f"{command[0]} said {line!r}"
    return process
