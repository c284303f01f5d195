"""Every fault of etcd, with packets flowing through it: whole daemons, etcds of one and of three members.

The labs go through their faults at the same time, each in a thread. FLANNELPY_TABLE=1 shows the table.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from flannelpy.cli.lab import ETCD_PREFIX
from flannelpy.cli.processes import run as run_program
from flannelpy.cli.processes import tail, wait_until
from tests.etcd.outages import faults
from tests.etcd.outages.faults import Fault
from tests.etcd.outages.run import Outcome, Run, new_lab
from tests.etcd.outages.witness import Flow, Routes
from tests.netns.nodes import peer

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(300)]

CPU_LIMIT = 5.0
"""Percent of a processor."""
RECOVERY_LIMIT = 10.0
"""Seconds from the first write that etcd accepts to the last kernel that has it."""
NOTICE_LIMIT = 20.0
"""Seconds until the log says that etcd cannot be used."""
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


def _go_through(number: int, course: Course, wanted: list[Fault], found: dict[object, Outcome | str]) -> None:
    """A thread's work."""
    with new_lab(f"o{number}") as lab:
        fault = wanted[0]
        try:
            flags = [QUOTA] if faults.NO_SPACE in course.faults else []
            run = Run(lab, course.members, secure=course.secure, flags=flags)
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


def test_what_was_changed_and_compacted_meanwhile_is_a_difference() -> None:
    """A peer has another MAC address, one has gone and one is new: only that is done, and once."""
    with new_lab("c") as lab:
        run, written = Run(lab, 1, secure=False), list[str]()
        cluster, node = run.cluster, run.nodes[0]
        assert run.add_peer(written)
        assert run.add_peer(written)
        wait_until(lambda: run.everywhere(3), "the peers' routes")
        flow, monitors = Flow(lab, *run.nodes), [Routes(lab, one) for one in run.nodes]
        cluster.cut_off(0)
        cluster.stop(0)
        cluster.start(0)
        cluster.wait()
        data = {"VNI": 1, "VtepMAC": "02:00:00:00:be:ef"}
        cluster.ctl("put", f"{ETCD_PREFIX}/subnets/10.5.50.0-24", json.dumps(peer(100, BackendData=data)))
        cluster.ctl("del", f"{ETCD_PREFIX}/subnets/10.5.51.0-24")
        cluster.ctl("put", f"{ETCD_PREFIX}/subnets/10.5.52.0-24", json.dumps(peer(102)))
        cluster.compact()
        cluster.cut_off(0, off=False)

        def follows(name: str) -> bool:
            neighbours = run_program("ip", "neigh", "show", "dev", "flannel.1", netns=name)
            return "10.5.50.0 lladdr 02:00:00:00:be:ef" in neighbours and "10.5.51.0" not in neighbours

        wait_until(lambda: all(follows(one.netns) for one in run.nodes), "the difference", 30)
        fdb = run_program("bridge", "fdb", "show", "dev", "flannel.1", netns=node.netns)
        assert "02:00:00:00:be:ef dst 192.168.77.100" in fdb
        assert "02:00:00:00:01:64" not in fdb, "the old MAC address"
        wait_until(lambda: run.everywhere(3), "the routes")
        assert flow.end()[1] == []
        for monitor in monitors:
            changes = sorted(line.split(" nhid")[0] for line in monitor.end())
            assert changes == ["10.5.52.0/24", "Deleted 10.5.51.0/24"]
