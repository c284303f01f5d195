"""An etcd of one or three members, each on a host of its own in a lab, and what can be done to it.

    underlay (a bridge)
      |          |              |
    node1 ...   node2, node3   node4 ...
    etcd        etcd           daemon, pod

So a member can be cut off without touching anybody else, and its processes can be killed one by one.
"""

import json
import os
import re
import shutil
import signal
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import LabError, Process, run, wait_until
from tests.certificates import Authority, Issued
from tests.etcd_process import RESTORER

PASSWORD = "correct horse"  # noqa: S105
_AUTH = (
    "user add root:root",
    "role add nodes",
    f"role grant-permission nodes readwrite --prefix=true {ETCD_PREFIX}/",
    "user grant-role root root",
    f"user add node:{PASSWORD.replace(' ', '+')}",
    "user grant-role node nodes",
    "auth enable",
)


class EtcdCluster:
    """Members on hosts of `lab`. `secure`: TLS, client certificates, passwords, tokens that live for 5 s."""

    def __init__(self, lab: Lab, size: int, *, secure: bool = False, flags: Sequence[str] = ()) -> None:
        self.lab = lab
        self.hosts = [lab.add_node() for _ in range(size)]
        self.secure = secure
        self._flags = tuple(flags)
        self._scheme = "https" if secure else "http"
        self._authority = Authority(lab.folder / "pki", "ca") if secure else None
        self._client = self._authority.issue("client") if self._authority else None
        self._processes: dict[int, Process] = {}
        self._data: dict[int, Path] = {number: lab.folder / f"data{number}" for number in range(size)}
        self._token = "one"  # noqa: S105
        """What tells this cluster from another one of the same members."""
        self._user: tuple[str, ...] = ()
        self._cut: set[int] = set()
        self.user: Node | None = None
        """A node whose member is to be hit."""

    # --- where and how ---

    @property
    def endpoints(self) -> str:
        """For --etcd-endpoints."""
        return ",".join(self._url(host, 2379) for host in self.hosts)

    def _url(self, host: Node, port: int) -> str:
        return f"{self._scheme}://{host.address}:{port}"

    @property
    def daemon_flags(self) -> list[str]:
        """What a daemon needs to use it."""
        flags = [f"--etcd-endpoints={self.endpoints}"]
        if self._authority and self._client:
            flags += [
                f"--etcd-cafile={self._authority.file}",
                f"--etcd-certfile={self._client.certificate}",
                f"--etcd-keyfile={self._client.key}",
                "--etcd-username=node",
                f"--etcd-password={PASSWORD.replace(' ', '+')}",
            ]
        return flags

    def ctl(self, *arguments: str, member: int | None = None, stdin: str = "", patience: float = 5) -> str:
        """What etcdctl prints. It runs on a member's host: if all are cut off, it can still ask one."""
        reachable = [host for number, host in enumerate(self.hosts) if number not in self._cut] or self.hosts
        hosts = reachable if member is None else [self.hosts[member]]
        command = ["env", "ETCDCTL_API=3", "etcdctl", f"--command-timeout={patience:g}s", "--dial-timeout=3s",
                   "--endpoints=" + ",".join(self._url(host, 2379) for host in hosts)]  # fmt: skip
        if self._authority and self._client:
            command += [f"--cacert={self._authority.file}", f"--cert={self._client.certificate}",
                        f"--key={self._client.key}", *self._user]  # fmt: skip
        return run(*command, *arguments, netns=hosts[0].netns, stdin=stdin)

    # --- processes ---

    def start(self, *numbers: int) -> None:
        """Start members that do not run; all without an argument. Does not wait."""
        for number in numbers or range(len(self.hosts)):
            host = self.hosts[number]
            self._processes[number] = self.lab.start(f"etcd{number}", host.netns, self._command(number))

    def _command(self, number: int) -> list[str]:
        host = self.hosts[number]
        client, peer = self._url(host, 2379), f"http://{host.address}:2380"
        command = [
            "etcd", f"--name=m{number}", f"--data-dir={self._data[number]}", "--logger=zap",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self._members()}", f"--initial-cluster-token={self._token}",
            "--bcrypt-cost=4", "--auth-token-ttl=5", *self._flags,
        ]  # fmt: skip
        if self._authority:
            server = self._server(number)
            command += [f"--cert-file={server.certificate}", f"--key-file={server.key}",
                        "--client-cert-auth", f"--trusted-ca-file={self._authority.file}"]  # fmt: skip
        return command

    def _members(self) -> str:
        return ",".join(f"m{number}=http://{host.address}:2380" for number, host in enumerate(self.hosts))

    def _server(self, number: int) -> Issued:
        assert self._authority is not None
        return self._authority.issue(f"server{number}", address=str(self.hosts[number].address))

    def stop(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        """End a member, with SIGTERM in an orderly way."""
        process = self._processes.pop(number)
        process.popen.send_signal(signal.SIGCONT)
        process.popen.send_signal(how)
        process.popen.wait(10)

    def pause(self, number: int) -> None:
        """It stays connected and answers nothing."""
        os.kill(self._processes[number].popen.pid, signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """It goes on."""
        os.kill(self._processes[number].popen.pid, signal.SIGCONT)

    def cut_off(self, number: int, *, off: bool = True) -> None:
        """Drop every packet from and to a member's host; addresses and connections stay."""
        port = self.hosts[number].name
        self._cut = self._cut | {number} if off else self._cut - {number}
        run("bridge", "link", "set", "dev", port, "state", "0" if off else "3", netns=self.lab.underlay)

    def fix_neighbours(self, hosts: Sequence[Node]) -> None:
        """Tell hosts the members' MAC addresses for good: ARP gets through where packets are dropped."""
        for host in self.hosts:
            mac = self.lab.ip_json(host.netns, "link show eth0")[0]["address"]
            for other in hosts:
                self.lab.ip(other.netns, f"neigh replace {host.address} lladdr {mac} dev eth0 nud permanent")

    # --- contents ---

    def wait(self, seconds: float = 20) -> None:
        """Until it answers a linearizable read."""

        def answers() -> bool:
            with suppress(LabError):
                self.ctl("get", "x", patience=1)
                return True
            return False

        wait_until(answers, "etcd", seconds)

    def set_up(self, config: dict[str, Any]) -> None:
        """Start all members, store the config, switch the passwords on."""
        self.start()
        self.wait()
        self.ctl("put", f"{ETCD_PREFIX}/config", json.dumps(config))
        if self.secure:
            for command in _AUTH:
                self.ctl(*command.split())
            self._user = ("--user=root:root",)

    def records(self) -> dict[str, tuple[str, int, int]]:
        """Name of a lease -> (value, etcd lease, revision of its last change)."""
        self.wait()
        reply = json.loads(self.ctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/", "--write-out=json"))
        found = {}
        for kv in reply.get("kvs", []):
            name = _text(kv["key"]).rpartition("/")[2]
            found[name] = (_text(kv["value"]), int(kv.get("lease", 0)), int(kv["mod_revision"]))
        return found

    def leader(self) -> int:
        """The member that leads."""
        for number in self._processes:
            with suppress(LabError):
                status = json.loads(self.ctl("endpoint", "status", "--write-out=json", member=number))[0]
                header = status["Status"]
                if header["leader"] == header["header"]["member_id"]:
                    return number
        raise LabError("etcd has no leader")

    def member_of(self, node: Node) -> int:
        """The member that a node's daemon talks to."""
        text = run("ss", "-Htn", "state", "established", "dport", "=", ":2379", netns=node.netns)
        found = re.findall(r"([\d.]+)\]?:2379", text)
        if not found:
            raise LabError(f"{node.name} is not connected to etcd")
        return [str(host.address) for host in self.hosts].index(found[0])

    def let_lead(self, number: int) -> None:
        """Make a member the leader."""
        if (leader := self.leader()) != number:
            status = json.loads(self.ctl("endpoint", "status", "--write-out=json", member=number))[0]
            self.ctl("move-leader", f"{status['Status']['header']['member_id']:x}", member=leader)

    # --- a full disk ---

    def fill(self) -> None:
        """Write until etcd refuses: needs a small --quota-backend-bytes."""
        rubbish = "x" * 1_000_000
        for _ in range(1000):
            try:
                self.ctl("put", "rubbish", stdin=rubbish)
            except LabError as error:
                if "space exceeded" in str(error):
                    return
                raise
        raise LabError("etcd has no end")

    def make_room(self) -> None:
        """What an operator does then."""
        self.ctl("del", "rubbish")
        self.compact()
        self.ctl("defrag", patience=20)
        self.ctl("alarm", "disarm")

    def compact(self) -> None:
        """Forget all that is not the present state."""
        revision = json.loads(self.ctl("get", "x", "--write-out=json"))["header"]["revision"]
        self.ctl("compact", str(revision), "--physical")

    # --- other histories ---

    def save(self) -> Path:
        """A backup."""
        path = self.lab.folder / "backup.db"
        self.ctl("snapshot", "save", str(path), member=0)
        return path

    def restore(self, backup: Path) -> None:
        """What an operator does after a disaster: every member begins anew with the data of a backup."""
        for number in list(self._processes):
            self.stop(number)
        for number, host in enumerate(self.hosts):
            shutil.rmtree(self._data[number])
            assert RESTORER is not None
            run("env", "ETCDCTL_API=3", RESTORER, "snapshot", "restore", str(backup),
                f"--name=m{number}", f"--data-dir={self._data[number]}",
                f"--initial-cluster={self._members()}", f"--initial-cluster-token={self._token}",
                f"--initial-advertise-peer-urls=http://{host.address}:2380", netns=host.netns)  # fmt: skip
        self.start()

    def replace_by_an_empty_one(self) -> None:
        """Another cluster in the same place, without any data."""
        for number in list(self._processes):
            self.stop(number)
            shutil.rmtree(self._data[number])
        self._token, self._user = "two", ()
        self.start()


def _text(encoded: str) -> str:
    return b64decode(encoded).decode()
