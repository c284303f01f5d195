"""Every fault of etcd, with packets flowing through it: whole daemons, etcds of one and of three members.

The labs go through their faults at the same time, each in a thread. FLANNELPY_TABLE=1 shows the table.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab
from flannelpy.cli.processes import LabError, tail, wait_ready, wait_until
from tests.etcd.outages import faults
from tests.etcd.outages.cluster import EtcdCluster
from tests.etcd.outages.faults import Fault
from tests.etcd.outages.witness import Flow, Routes, Usage, Watched
from tests.netns.nodes import V4, peer, reach, routes

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(300)]

CPU_LIMIT = 5.0
"""Percent of a processor."""
RECOVERY_LIMIT = 10.0
"""Seconds from the first write that etcd accepts to the last kernel that has it."""
NOTICE_LIMIT = 20.0
"""Seconds until the log says that etcd cannot be used."""
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""etcd syncs each write to disk."""
QUOTA = "--quota-backend-bytes=16000000"


class Course(NamedTuple):
    """A lab, and what its etcd goes through."""

    members: int
    secure: bool
    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        return f"{self.members} member{'s' * (self.members > 1)}{', TLS and passwords' * self.secure}"


COURSES = (
    Course(1, False, (faults.STOPPED, faults.KILLED, faults.BLACK_HOLE, faults.SLOW)),
    Course(1, True, (faults.KILLED, faults.BLACK_HOLE, faults.SLOW, faults.NO_SPACE)),
    Course(3, False, (faults.FOLLOWER_LOST, faults.LEADER_LOST, faults.QUORUM_LOST, faults.IN_TURN)),
    Course(3, True, (faults.LEADER_CUT_OFF, faults.LEADER_LOST, faults.QUORUM_LOST, faults.IN_TURN)),
)


CASES = [(course, fault) for course in COURSES for fault in course.faults]


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
    """One lab on its course."""

    def __init__(self, course: Course, lab: Lab) -> None:
        self._lab = lab
        flags = [QUOTA] if faults.NO_SPACE in course.faults else []
        self.cluster = EtcdCluster(lab, course.members, secure=course.secure, flags=flags)
        self.cluster.set_up(V4)
        self._nodes = [lab.add_node() for _ in range(2)]
        self.cluster.fix_neighbours([*self.cluster.hosts, *self._nodes])
        wait_ready([lab.start_daemon(node, flags=self.cluster.daemon_flags) for node in self._nodes])
        for node in self._nodes:
            lab.add_pod(node)
        wait_until(lambda: self._everywhere(1), "the routes between the nodes")
        reach(lab, self._nodes[0], str(self._nodes[1].pods[0].address).partition("/")[0])

    def through(self, fault: Fault) -> Outcome:
        """One fault, from its begin to the recovery."""
        own = self.cluster.records()
        flow, monitors = Flow(self._lab, *self._nodes), [Routes(self._lab, node) for node in self._nodes]
        daemons = [Watched(node.daemon) for node in self._nodes if node.daemon]
        written: list[str] = []
        began = time.time()
        with fault.happens(self.cluster):
            served = self._try_to_add_a_peer(written, began + fault.seconds)
            while time.time() < began + fault.seconds:
                time.sleep(0.1)
            usages = [daemon.usage() for daemon in daemons]
            lasted = time.time() - began
        ended = time.time()
        wait_until(lambda: self._add_peer(written), "etcd to accept a write", 30)
        accepted = time.time()
        wait_until(lambda: self._everywhere(1 + len(written)), f"{fault.name}: the new peer's route", 30)
        recovered = time.time() - accepted
        answers, lost = flow.end()
        announced = [monitor.end() for monitor in monitors]
        after = {name: record for name, record in self.cluster.records().items() if name in own}
        self.cluster.ctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/10.5.5")
        wait_until(lambda: self._everywhere(1), f"{fault.name}: the peers' routes to go")
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
            wait_until(lambda: self._add_peer(written), "etcd to accept a write", 10)
            wait_until(lambda: self._everywhere(1 + len(written)), "the peer's route", deadline - start)
            return time.time() - start
        return None

    def _add_peer(self, written: list[str]) -> bool:
        subnet = f"10.5.{50 + len(written)}.0/24"
        key = f"{ETCD_PREFIX}/subnets/{subnet.replace('/', '-')}"
        try:
            self.cluster.ctl("put", key, json.dumps(peer(100 + len(written))), patience=4)
        except LabError:
            return False
        written.append(subnet)
        return True

    def _everywhere(self, number: int) -> bool:
        return all(routes(self._lab, node) == number for node in self._nodes)


def _first_notice(usage: Usage) -> float:
    """When a daemon said that it goes on alone, as a UNIX time; 0 = it did not."""
    for line in usage.lines:
        if "the network goes on with what was known" in line:
            return datetime.fromisoformat(line.split()[0]).timestamp()
    return 0.0


def _go_through(number: int, course: Course, wanted: list[Fault], found: dict[object, Outcome | str]) -> None:
    """A thread's work. Processes end with the thread that started them: the lab lives and dies in here."""
    memory = tempfile.TemporaryDirectory(prefix="fpt", dir=MEMORY, ignore_cleanup_errors=True)
    with memory as folder, Lab(f"fpt{os.getpid()}-o{number}-", Path(folder) / "lab") as lab:
        fault = wanted[0]
        try:
            run = Run(course, lab)
            for fault in wanted:
                found[course, fault] = run.through(fault)
        except Exception as error:  # noqa: BLE001  # of whatever kind: the test of this fault tells it
            logs = [f"--- {node.name}\n{tail(node.daemon.log, 50)}" for node in lab.nodes if node.daemon]
            found[course, fault] = "\n".join([repr(error), *logs])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Mapping[object, Outcome | str]:
    """(course, fault) -> what was seen; a text if the lab could not go on."""
    found: dict[object, Outcome | str] = {}
    selected = [
        item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")
    ]
    threads = []
    for number, course in enumerate(COURSES):
        wanted = [fault for fault in course.faults if (course, fault) in selected]
        if wanted:
            threads.append(threading.Thread(target=_go_through, args=(number, course, wanted, found)))
            threads[-1].start()
    for thread in threads:
        thread.join()
    if os.environ.get("FLANNELPY_TABLE"):
        sys.stderr.write(_table(found))
    return found


def _table(found: Mapping[object, Outcome | str]) -> str:
    heads = ("etcd", "fault", "lasted", "noticed", "served", "recovered", "pings lost", "CPU %", "log lines")
    rows = [heads, ("---",) * len(heads)]
    for course, fault in CASES:
        outcome = found.get((course, fault))
        if isinstance(outcome, Outcome):
            rows.append((
                course.name, fault.name, f"{outcome.lasted:.0f} s", _seconds(outcome.noticed),
                _seconds(outcome.served), _seconds(outcome.recovered),
                f"{len(outcome.lost)} of {outcome.pings}",
                f"{max(usage.cpu for usage in outcome.usages):.1f}",
                str(max(len(usage.lines) for usage in outcome.usages)),
            ))  # fmt: skip
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}: {case[1].name}")
def test_a_fault_of_etcd_is_not_one_of_the_network(
    outcomes: Mapping[object, Outcome | str], case: tuple[Course, Fault]
) -> None:
    fault = case[1]
    outcome = outcomes.get(case, "a fault before this one was too much")
    assert isinstance(outcome, Outcome), outcome
    logs = "\n".join(line for usage in outcome.usages for line in ("---", *usage.lines))
    assert outcome.pings > 10 * outcome.lasted
    assert outcome.lost == []
    for usage in outcome.usages:
        assert usage.cpu < CPU_LIMIT, logs
        assert len(usage.lines) < outcome.lasted, logs
    if fault.unreachable:
        assert outcome.noticed is not None, logs
        assert outcome.noticed < NOTICE_LIMIT, logs
        assert "with what was known at " in logs
    if fault.served:
        assert outcome.served is not None, logs
        assert outcome.served < NOTICE_LIMIT, logs
    assert outcome.recovered < RECOVERY_LIMIT, logs
    for lines in outcome.announced:
        assert sorted(line.split()[0] for line in lines) == outcome.written, "each once, and nothing else"
    assert outcome.own[0] == outcome.own[1]
