"""For the tests of rules: the three ways to keep them, what stands, and which source address a packet has."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import LabError, Process, inside, run, wait_ready, wait_until

MODES = ("nftables", "iptables-nft", "iptables-legacy")
NETWORK: dict[str, Any] = {
    "Network": "10.5.0.0/16",
    "SubnetMin": "10.5.100.0",
    "SubnetMax": "10.5.190.0",
    "IPv6Network": "fd00:5::/48",
    "EnableIPv6": True,
    "Backend": {"Type": "vxlan"},
}
ALL = ("--ip-masq", "--iptables-forward-rules", "--iptables-resync=1")
_ADDRESS = re.compile(r"10\.5\.(?!0\.0/)\d+\.0/24|fd00:5:0:\w+::/64")

HIDDEN = """
import flannelpy.kernel.iptables, sys
flannelpy.kernel.iptables._which = lambda name: None
from flannelpy.__main__ import main
sys.exit(main())
"""
"""A daemon on a host without iptables."""


def config(mode: str) -> dict[str, Any]:
    return {**NETWORK, "EnableNFTables": mode == "nftables"}


def programs(folder: Path, mode: str) -> Path:
    """A folder for PATH in which iptables is of that kind; each start of one is a line in its file `log`."""
    found = folder / f"bin-{mode}"
    if found.exists():
        return found
    found.mkdir()
    kind = "legacy" if mode == "iptables-legacy" else "nft"
    for name in ("iptables", "ip6tables"):
        for tail in ("", "-save", "-restore"):
            real = shutil.which(f"{name}-{kind}{tail}", path="/usr/sbin:/sbin")
            wrapper = found / f"{name}{tail}"
            wrapper.write_text(f'#!/bin/sh\necho "${{0##*/}}" >>{found}/log\nexec {real} "$@"\n')
            wrapper.chmod(0o755)
    return found


def started(folder: Path, mode: str) -> list[str]:
    """The programs that were started so far."""
    log = programs(folder, mode) / "log"
    return log.read_text().split() if log.exists() else []


def start(lab: Lab, node: Node, mode: str, *flags: str) -> Process:
    path = f"{programs(lab.folder, mode)}:/usr/sbin:/usr/bin:/bin:/sbin"
    command = ("env", f"PATH={path}", sys.executable, "-m", "flannelpy")
    return lab.start_daemon(node, command, flags=flags or ALL)


def cluster(lab: Lab, mode: str, nodes: int, *flags: str) -> list[Node]:
    """Nodes with rules of that kind, a pod on each; every pod reaches every other one."""
    lab.start_etcd()
    lab.put_config(config(mode))
    for _number in range(nodes):
        lab.add_node()
    wait_ready([start(lab, node, mode, *flags) for node in lab.nodes])
    for node in lab.nodes:
        lab.add_pod(node)
    return lab.nodes


def tool(mode: str, bits: int) -> str:
    return f"ip{'6' if bits == 128 else ''}tables{'-legacy' if mode == 'iptables-legacy' else '-nft'}"


def listing(node: Node, mode: str) -> str:
    """Our rules as they stand, in the words of the program that people use to look."""
    if mode == "nftables":
        text = run("nft", "-s", "list", "ruleset", netns=node.netns)
        tables = re.findall(r"^table ip6? flannel-ipv.*?^}\n", text, re.MULTILINE | re.DOTALL)
        return "".join(sorted(tables))
    parts = []
    for bits in (32, 128):
        for table in ("nat", "filter"):
            lines = run(tool(mode, bits), "-t", table, "-S", netns=node.netns).splitlines()
            parts += [f"{bits} {line}" for line in lines if "FLANNEL" in line or "flanneld" in line]
    return "\n".join(parts)


# --- packets ---

_SERVER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.socket(family, socket.SOCK_DGRAM)
server.bind(("::" if family == socket.AF_INET6 else "", int(sys.argv[2])))
if sys.argv[1].startswith("224."):
    join = socket.inet_aton(sys.argv[1]) + socket.inet_aton(sys.argv[3])
    server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, join)
print("listening", flush=True)
while True:
    data, source = server.recvfrom(2000)
    print(data.decode(), source[0], flush=True)
"""

_CLIENT = """
import socket, sys
target, port, word, source, mark = sys.argv[1:]
family = socket.AF_INET6 if ":" in target else socket.AF_INET
client = socket.socket(family, socket.SOCK_DGRAM)
if mark != "0":
    client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(mark, 0))
if source:
    client.bind((source, 0))
if target.startswith("224."):
    client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("192.168.77.2"))
client.sendto(word.encode(), (target, int(port)))
"""


class Listener:
    """Who sent which packet, as a host sees it."""

    def __init__(self, process: Process) -> None:
        self._log = process.log
        wait_until(lambda: "listening" in self._log.read_text(), "the listener")

    def heard(self) -> dict[str, str]:
        """Word -> source address."""
        lines = self._log.read_text().splitlines()[1:]
        return dict(line.split() for line in lines if len(line.split()) == 2)


_PORT = 7000


@contextmanager
def listener(lab: Lab, netns: str, address: str, interface: str = "") -> Iterator[tuple[Listener, int]]:
    """A process in a namespace that tells where packets to its port come from."""
    global _PORT
    _PORT += 1
    command = [sys.executable, "-c", _SERVER, address, str(_PORT), interface]
    process = lab.start(f"listener{_PORT}", netns, command)
    try:
        yield Listener(process), _PORT
    finally:
        process.popen.kill()
        process.popen.wait()


def send(netns: str, target: str, port: int, word: str, source: str = "", mark: int = 0) -> None:
    """One UDP packet from a namespace."""
    run(*inside(netns, sys.executable, "-c", _CLIENT, target, str(port), word, source, str(mark)))


def source_of(lab: Lab, sender: str, receiver: str, target: str, **how: Any) -> str | None:
    """The source address that a packet has when it arrives; None if it does not, within a second."""
    with listener(lab, receiver, target, how.pop("interface", "")) as (heard, port):
        for attempt in range(4):
            send(sender, target, port, f"n{attempt}", **how)
            with suppress(LabError):
                return next(iter(wait_until(heard.heard, "a packet", 0.3).values()))
    return None


def lone(lab: Lab, mode: str, *flags: str) -> Node:
    """One node that is ready."""
    lab.start_etcd()
    lab.put_config(config(mode))
    node = lab.add_node()
    wait_ready([start(lab, node, mode, *flags)])
    return node


def _stat(process: Process) -> list[int]:
    """The fields of /proc/PID/stat from the parent's id on."""
    return [
        int(word) for word in Path(f"/proc/{process.popen.pid}/stat").read_text().split(")")[-1].split()[1:]
    ]


def cpu_seconds(process: Process) -> float:
    """Of the process and of its children that ended."""
    return sum(_stat(process)[10:14]) / os.sysconf("SC_CLK_TCK")


def children_ended(process: Process) -> int:
    """Page faults of children that ended (cminflt): no process can live without one."""
    return _stat(process)[7]
