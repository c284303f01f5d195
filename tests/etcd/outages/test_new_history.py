"""etcd comes back with other contents: peers are held, and each node writes its own lease again.

A peer of ours here has no daemon that could: only what other nodes know of it keeps it alive.
"""

import json
from collections.abc import Callable

import pytest

from flannelpy.cli.lab import ETCD_PREFIX
from flannelpy.cli.processes import wait_ready, wait_until
from tests.etcd.outages.cluster import EtcdCluster
from tests.etcd.outages.run import Run, new_lab
from tests.etcd.outages.witness import Flow, Routes
from tests.netns.nodes import V4, log_of

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def restored(run: Run) -> Callable[[], None]:
    """From a backup with an older record of one node. Its last revisions are missing, too."""
    backup = run.cluster.save()
    for _ in range(20):
        run.cluster.ctl("put", "something-else", "x")
    daemon = run.nodes[0].daemon
    assert daemon is not None
    daemon.popen.kill()
    wait_ready([run.lab.start_daemon(run.nodes[0], flags=run.cluster.daemon_flags)])
    return lambda: run.cluster.restore(backup)


def emptied(run: Run) -> Callable[[], None]:
    """Another cluster, without anything, at the same addresses."""
    return run.cluster.replace_by_an_empty_one


@pytest.mark.parametrize(
    ("prepare", "members", "secure"),
    [(restored, 3, True), (emptied, 1, False)],
    ids=["restored, 3 members, TLS and passwords", "emptied"],
)
def test_another_history_withdraws_nobody(
    prepare: Callable[[Run], Callable[[], None]], members: int, secure: bool
) -> None:
    with new_lab("h") as lab:
        run = Run(lab, members, secure=secure)
        cluster, written = run.cluster, list[str]()
        own = {name: value for name, (value, _, _) in cluster.records().items()}
        assert run.add_peer(written)
        begin_anew = prepare(run)
        daemons = [node.daemon for node in run.nodes if node.daemon]
        assert run.add_peer(written), "the backup does not know this one"
        wait_until(lambda: run.everywhere(3), "the peers' routes")
        flow, monitors = Flow(lab, *run.nodes), [Routes(lab, node) for node in run.nodes]

        begin_anew()
        cluster.wait()
        wait_until(lambda: all("begins a new history" in log_of(one) for one in daemons), "it is said", 20)
        if prepare is emptied:
            waiting = "not written into the store's new history yet: there is no network config"
            wait_until(lambda: all(waiting in log_of(one) for one in daemons), "the daemons to wait")
            assert cluster.records() == {}
            cluster.ctl("put", f"{ETCD_PREFIX}/config", json.dumps(V4))
        wait_until(lambda: _leased(cluster) == own, "the nodes' own leases", 20)
        assert run.add_peer(written)
        wait_until(lambda: run.everywhere(4), "the new peer's route", 20)

        assert flow.end()[1] == []
        for monitor in monitors:
            assert [line.split()[0] for line in monitor.end()] == written[-1:], "nothing else has changed"


def _leased(cluster: EtcdCluster) -> dict[str, str]:
    """The records that nodes have written: name -> value."""
    return {name: value for name, (value, lease, _) in cluster.records().items() if lease}
