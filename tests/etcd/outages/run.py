"""One lab with an etcd and two nodes, pods that ping each other, and what is seen of a fault."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import LabError, wait_ready, wait_until
from tests.etcd.outages.cluster import EtcdCluster
from tests.etcd.outages.faults import Fault
from tests.etcd.outages.witness import Flow, Routes, Usage, Watched
from tests.netns.nodes import V4, log_of, peer, reach, routes

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""etcd syncs each write to disk."""


ALONE, BACK = "the network goes on with what was known", "the store answers again"
"""What a daemon says when it cannot use etcd, and when that is over."""


@contextmanager
def new_lab(name: str) -> Iterator[Lab]:
    """A lab of the thread that enters it: its processes would end with the thread anyway."""
    memory = tempfile.TemporaryDirectory(prefix="fpt", dir=MEMORY, ignore_cleanup_errors=True)
    with memory as folder, Lab(f"fpt{os.getpid()}-{name}-", Path(folder) / "lab") as lab:
        yield lab


class Outcome(NamedTuple):
    """What was seen of one fault; times in seconds."""

    lasted: float
    usages: list[Usage]
    """Of each daemon, while it lasted."""
    noticed: float | None
    """Until the last daemon said that etcd cannot be used."""
    served: float | None
    """From a write while the fault lasted until every kernel had it, if that was before its end."""
    silent: float
    """From the end of the fault until etcd accepted a write,"""
    recovered: float
    """and from then until every kernel had it."""
    pings: int
    lost: list[int]
    written: list[str]
    """The subnets of the peers that were added,"""
    announced: list[list[str]]
    """and of which routes each kernel spoke."""
    own: tuple[object, object]
    """The nodes' own records before and after."""


class Run:
    """The nodes are ready and the pods reach each other."""

    def __init__(self, lab: Lab, members: int, *, secure: bool, flags: Sequence[str] = ()) -> None:
        self.lab = lab
        self.cluster = EtcdCluster(lab, members, secure=secure, flags=flags)
        self.cluster.set_up(V4)
        self.nodes = [lab.add_node() for _ in range(2)]
        self.cluster.fix_neighbours([*self.cluster.hosts, *self.nodes])
        wait_ready([lab.start_daemon(node, flags=self.cluster.daemon_flags) for node in self.nodes])
        for node in self.nodes:
            lab.add_pod(node)
        self.cluster.user = self.nodes[0]
        wait_until(lambda: self.everywhere(1), "the routes between the nodes")
        reach(lab, self.nodes[0], str(self.nodes[1].pods[0].address).partition("/")[0])

    def through(self, fault: Fault) -> Outcome:
        """One fault, from its begin to the recovery."""
        own = self.cluster.records()
        flow, monitors = Flow(self.lab, *self.nodes), [Routes(self.lab, node) for node in self.nodes]
        daemons = [Watched(node.daemon) for node in self.nodes if node.daemon]
        written: list[str] = []
        began = time.time()
        with fault.happens(self.cluster):
            served = self._try_to_add_a_peer(written, began + fault.seconds)
            while time.time() < began + fault.seconds:
                time.sleep(0.1)
            usages = [daemon.usage() for daemon in daemons]
            lasted = time.time() - began
        ended = time.time()
        wait_until(lambda: self.add_peer(written), "etcd to accept a write", 30)
        accepted = time.time()
        wait_until(lambda: self.everywhere(1 + len(written)), f"{fault.name}: the new peer's route", 30)
        recovered = time.time() - accepted
        wait_until(
            lambda: all(map(_is_calm, self.nodes)), f"{fault.name}: the daemons to say that it is over", 20
        )
        with suppress(LabError):  # the judge tells what is missing; `ip monitor` may be a moment late
            wait_until(lambda: all(len(one.seen()) >= len(written) for one in monitors), "the news", 3)
        answers, lost = flow.end()
        announced = [monitor.end() for monitor in monitors]
        after = {name: record for name, record in self.cluster.records().items() if name in own}
        self.cluster.ctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/10.5.5")
        wait_until(lambda: self.everywhere(1), f"{fault.name}: the peers' routes to go")
        notices = [_first_notice(usage) for usage in usages]
        noticed = max(notices) - began if all(notices) else None
        return Outcome(
            lasted, usages, noticed, served, accepted - ended, recovered, answers, lost, written, announced,
            (own, after),
        )  # fmt: skip

    def _try_to_add_a_peer(self, written: list[str], deadline: float) -> float | None:
        """How long every kernel took, if etcd takes it at all and they have it before the deadline."""
        start = time.time()
        with suppress(LabError):
            # A new leader has to be chosen first, perhaps.
            wait_until(lambda: self.add_peer(written), "etcd to accept a write", 12)
            wait_until(lambda: self.everywhere(1 + len(written)), "the peer's route", deadline - start)
            return time.time() - start
        return None

    def add_peer(self, written: list[str]) -> bool:
        """Write one more lease, if etcd takes it."""
        subnet = f"10.5.{50 + len(written)}.0/24"
        key = f"{ETCD_PREFIX}/subnets/{subnet.replace('/', '-')}"
        try:
            self.cluster.ctl("put", key, json.dumps(peer(100 + len(written))), patience=4)
        except LabError:
            return False
        written.append(subnet)
        return True

    def everywhere(self, number: int) -> bool:
        """Whether each kernel has so many routes."""
        return all(routes(self.lab, node) == number for node in self.nodes)


def _is_calm(node: Node) -> bool:
    """Whether a daemon has said that the trouble is over, if it had said that there is some."""
    assert node.daemon is not None
    said = [line for line in log_of(node.daemon).splitlines() if ALONE in line or BACK in line]
    return not said or BACK in said[-1]


def _first_notice(usage: Usage) -> float:
    """When a daemon said that it goes on alone, as a UNIX time; 0 = it did not."""
    for line in usage.lines:
        if ALONE in line:
            return datetime.fromisoformat(line.split()[0]).timestamp()
    return 0.0
