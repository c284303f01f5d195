"""A small overlay on this one machine: nodes and pods are network namespaces, and etcd stands between them.

    underlay     etcd on 127.0.0.1 and on 192.168.77.254, the address of the bridge `lan`
                   |                  |
    node1        eth0 .1            eth0 .2        node2: the daemon runs here
                 flannel.1          flannel.1      (made by the daemon)
                 pods0              pods0          a bridge with FLANNEL_SUBNET, as Docker's or CNI's
                   |                  |
    node1-pod1   eth0               eth0           node2-pod1

`flannelpy demo` shows this to newcomers, and the tests in tests/netns are built on it. Links and
addresses are made with the `ip` program, so that every step can be repeated by hand. Needs root.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from flannelpy.cli import processes
from flannelpy.cli.processes import NETNS, LabError, Process, inside, missing, run, stop, tail, wait_until

UNDERLAY = IPv4Network("192.168.77.0/24")
UNDERLAY6 = IPv6Network("fd77::/64")
GATEWAY = UNDERLAY[254]
GATEWAY6 = UNDERLAY6[254]
ETCD_PREFIX = "/coreos.com/network"
PROGRAMS = ("etcd", "etcdctl", "ip", "ping", "sysctl", "nsenter", "setpriv")
LOOK = ("ip -d link", "ip address", "ip route", "ip -6 route", "ip nexthop", "ip neigh", "bridge fdb")
"""What tells the whole story of a node when something does not work."""


class Ping(NamedTuple):
    """What ping says: packets sent and answered, and the shortest round trip in milliseconds."""

    sent: int
    received: int
    rtt: float | None
    text: str


@dataclass(slots=True, eq=False)
class Pod:
    """A namespace behind the bridge of a node."""

    netns: str
    address: IPv4Interface | None
    address6: IPv6Interface | None


@dataclass(slots=True, eq=False)
class Node:
    """A host of the overlay: a namespace with an uplink `eth0` into the underlay."""

    name: str
    number: int
    netns: str
    address: IPv4Address
    folder: Path
    daemon: Process | None = None
    pods: list[Pod] = field(default_factory=list)

    @property
    def subnet_file(self) -> Path:
        """Where the daemon of this node writes subnet.env."""
        return self.folder / "subnet.env"

    def subnet_env(self) -> dict[str, str]:
        """The variables of subnet.env; empty as long as there is none."""
        try:
            text = self.subnet_file.read_text()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def remove(namespaces: Sequence[str]) -> None:
    """Remove namespaces, and kill whatever still runs in them."""
    present = [name for name in namespaces if (NETNS / name).exists()]
    identities = {_identity(NETNS / name) for name in present} - {_identity(Path("/proc/self/ns/net"))}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if _identity(entry / "ns/net") in identities:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # it has just ended, or is not for us to look at
    if present:
        run("ip", "-force", "-batch", "-", stdin="".join(f"netns del {name}\n" for name in present))


def leftovers(prefix: str) -> list[str]:
    """The namespaces that an earlier lab of this prefix has left behind because it was killed."""
    return sorted(path.name for path in NETNS.glob(f"{prefix}*")) if NETNS.exists() else []


class Lab:
    """The underlay, and the nodes that were added to it. A context manager: leaving it removes everything.

    `prefix` begins the name of every namespace. `folder` is made, holds etcd's data, the logs and one folder
    per node, and goes too; its path is short, for those of UNIX sockets end at 107 bytes. `logs` keeps the
    logs elsewhere. A program that is not installed is a LabError.
    """

    def __init__(self, prefix: str, folder: Path, *, ipv6: bool = False, logs: Path | None = None) -> None:
        self.prefix = prefix
        self.folder = folder
        self.ipv6 = ipv6
        self.logs = logs or folder / "logs"
        self.nodes: list[Node] = []
        self.etcd: Process | None = None
        self.underlay = f"{prefix}underlay"
        self.etcd_url = f"http://{GATEWAY}:2379"
        self.patience = 5.0
        """Seconds that a process gets to end by itself."""
        self._namespaces: list[str] = []
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        for program in PROGRAMS:
            if shutil.which(program) is None:
                raise LabError(missing(program))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            self._make_underlay()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop every process, the daemons before etcd, and remove every namespace and the folder."""
        stop((process for process in self._processes if process is not self.etcd), self.patience)
        stop(self._processes, self.patience)
        for process in self._processes:
            process.notify.close()
        remove(self._namespaces)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._processes.clear()
        self._namespaces.clear()
        self.nodes.clear()

    def add_node(self) -> Node:
        """Add a host with an uplink, a default route and forwarding switched on."""
        number = len(self.nodes) + 1
        name = f"node{number}"
        node = Node(name, number, self._add_namespace(name), UNDERLAY[number], self.folder / name)
        node.folder.mkdir(exist_ok=True)
        self.ip(self.underlay, f"link add {name} type veth peer name eth0 netns {node.netns}")
        self.ip(self.underlay, f"link set {name} master lan up")
        self.ip(
            node.netns,
            "link set eth0 up",
            f"address add {node.address}/{UNDERLAY.prefixlen} dev eth0",
            f"route add default via {GATEWAY}",
        )
        settings = ["net.ipv4.ip_forward=1"]
        if self.ipv6:
            self.ip(
                node.netns,
                f"address add {UNDERLAY6[number]}/{UNDERLAY6.prefixlen} dev eth0 nodad",
                f"-6 route add default via {GATEWAY6}",
            )
            settings.append("net.ipv6.conf.all.forwarding=1")
        run("sysctl", "-qw", *settings, netns=node.netns)
        self.nodes.append(node)
        return node

    def add_pod(self, node: Node) -> Pod:
        """Add a pod behind the node's bridge, as subnet.env says: addresses from its subnet, and its MTU."""
        env = node.subnet_env()
        if "FLANNEL_MTU" not in env:
            raise LabError(f"{node.name}: no subnet.env yet, so no subnet for a pod")
        number = len(node.pods) + 1
        gateways = [ip_interface(env[key]) for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if key in env]
        netns = self._add_namespace(f"{node.name}-pod{number}")
        mtu = env["FLANNEL_MTU"]
        if number == 1:
            self.ip(node.netns, f"link add pods0 mtu {mtu} type bridge", "link set pods0 up")
            self.ip(
                node.netns, *(f"address add {gateway} dev pods0{_nodad(gateway)}" for gateway in gateways)
            )
        self.ip(
            node.netns, f"link add pod{number} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {netns}"
        )
        self.ip(node.netns, f"link set pod{number} master pods0 up")
        self.ip(netns, "link set eth0 up")
        pod = Pod(netns, None, None)
        for gateway in gateways:
            address = ip_interface(f"{gateway.ip + number}/{gateway.network.prefixlen}")
            self.ip(
                netns,
                f"address add {address} dev eth0{_nodad(address)}",
                f"-{address.version} route add default via {gateway.ip}",
            )
            if isinstance(address, IPv4Interface):
                pod.address = address
            else:
                pod.address6 = address
        node.pods.append(pod)
        return pod

    def start_etcd(self, *flags: str) -> Process:
        """Start etcd in the underlay, again with the data that it has, and wait until it answers."""
        own, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        self.etcd = self.start(
            "etcd",
            self.underlay,
            ["etcd", "--name=lab", f"--data-dir={self.folder / 'etcd'}", f"--listen-peer-urls={peer}",
             f"--listen-client-urls={own},{self.etcd_url}", f"--advertise-client-urls={self.etcd_url}",
             f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=lab={peer}", *flags],
        )  # fmt: skip
        etcd = self.etcd
        # A socket of state 0A (listening) in the namespace of that process.
        listens = f"{int.from_bytes(GATEWAY.packed, sys.byteorder):08X}:{2379:04X} 00000000:0000 0A"
        sockets = Path(f"/proc/{etcd.popen.pid}/net/tcp")
        try:
            wait_until(lambda: etcd.popen.poll() is not None or listens in sockets.read_text(), "etcd")
            self.etcdctl("get", ETCD_PREFIX)
        except (LabError, OSError) as error:
            raise LabError(f"etcd does not answer: {error}", etcd.log) from None
        return etcd

    def etcdctl(self, *arguments: str, stdin: str = "") -> str:
        """Ask etcd something with etcdctl."""
        return run("env", "ETCDCTL_API=3", "etcdctl", "--endpoints=http://127.0.0.1:2379", *arguments,
                   netns=self.underlay, stdin=stdin)  # fmt: skip

    def put_config(self, config: Mapping[str, Any], prefix: str = ETCD_PREFIX) -> None:
        """Store the network's configuration."""
        self.etcdctl("put", f"{prefix}/config", json.dumps(config))

    def start_daemon(self, node: Node, command: Sequence[str] = (), *, flags: Sequence[str] = ()) -> Process:
        """Start the daemon of a node: ours, or another that takes flannel's flags (`command`)."""
        node.daemon = self.start(
            node.name,
            node.netns,
            ["env", f"FLANNELD_STATE_DIR={node.folder / 'state'}",
             *(command or (sys.executable, "-m", "flannelpy")), f"--etcd-endpoints={self.etcd_url}",
             f"--subnet-file={node.subnet_file}", "--iptables-forward-rules=false", *flags],
        )  # fmt: skip
        return node.daemon

    def start(self, name: str, netns: str, command: Sequence[str]) -> Process:
        """Start a process in a namespace; it is stopped with the lab."""
        process = processes.start(name, netns, command, self.folder, self.logs / f"{name}.log")
        self._processes.append(process)
        return process

    def ip(self, netns: str, *lines: str) -> None:
        """Run commands of `ip` in a namespace; each line is one, without the word `ip`."""
        for line in lines:
            run("ip", "-n", netns, *line.split())

    def ip_json(self, netns: str, line: str) -> list[dict[str, Any]]:
        """What `ip -json` answers in a namespace."""
        found: list[dict[str, Any]] = json.loads(run("ip", "-json", "-n", netns, *line.split()) or "[]")
        return found

    def ping(self, netns: str, target: str, *, size: int = 84, count: int = 3, timeout: float = 1) -> Ping:
        """Ping from a namespace, with IP packets of `size` bytes that must not be fragmented."""
        headers = 48 if ":" in target else 28
        command = inside(netns, "env", "LC_ALL=C", "ping", "-n", "-M", "do", "-s", str(size - headers),
                         "-c", str(count), "-i", "0.02", "-W", str(timeout), target)  # fmt: skip
        limit = count + timeout + 10
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        counts = re.search(r"(\d+) packets transmitted, (\d+) received", done.stdout)
        trip = re.search(r"= ([\d.]+)/", done.stdout)
        sent, received = (int(counts[1]), int(counts[2])) if counts else (count, 0)
        return Ping(sent, received, float(trip[1]) if trip else None, done.stdout + done.stderr)

    def look(self, node: Node) -> str:
        """What helps to see why a node does not work: the kernel's tables and the daemon's log."""
        parts = []
        for command in LOOK:
            try:
                parts.append(f"$ {command}\n{run(*command.split(), netns=node.netns)}")
            except LabError as error:
                parts.append(f"$ {command}\n{error}\n")
        parts.append(f"$ cat {node.subnet_file.name}\n{node.subnet_env()}\n")
        if node.daemon:
            parts.append(f"$ log of {node.daemon.name}\n{tail(node.daemon.log, 200)}")
        return "\n".join(parts)

    def _make_underlay(self) -> None:
        self._add_namespace("underlay")
        self.ip(
            self.underlay,
            "link add lan type bridge",
            "link set lan up",
            f"address add {GATEWAY}/{UNDERLAY.prefixlen} dev lan",
        )
        if self.ipv6:
            self.ip(self.underlay, f"address add {GATEWAY6}/{UNDERLAY6.prefixlen} dev lan nodad")

    def _add_namespace(self, name: str) -> str:
        full = self.prefix + name
        self._namespaces.append(full)  # before it exists, so that no interruption leaves it behind
        run("ip", "netns", "add", full)
        self.ip(full, "link set lo up")
        return full


def _identity(namespace: Path) -> tuple[int, int]:
    found = namespace.stat()
    return found.st_dev, found.st_ino


def _nodad(address: IPv4Interface | IPv6Interface) -> str:
    """Nobody else has our addresses: without this an IPv6 address is of no use for its first second."""
    return " nodad" if address.version == 6 else ""
