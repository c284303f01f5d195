"""What happens to an etcd, each as a context: it begins on entering, and is over on leaving."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from tests.etcd.outages.cluster import EtcdCluster


class Fault(NamedTuple):
    """A fault, how long it is to last, and what a daemon can know of it."""

    name: str
    happens: Callable[[EtcdCluster], AbstractContextManager[None]]
    seconds: float = 12
    unreachable: bool = False
    """Nobody can use etcd: the daemons say so."""
    served: bool = False
    """Enough of it is left: what is written meanwhile reaches the kernels meanwhile."""


@contextmanager
def _stopped(cluster: EtcdCluster) -> Iterator[None]:
    cluster.stop(0, signal.SIGTERM)
    yield
    cluster.start(0)


@contextmanager
def _killed(cluster: EtcdCluster) -> Iterator[None]:
    cluster.stop(0)
    yield
    cluster.start(0)


@contextmanager
def _black_hole(cluster: EtcdCluster) -> Iterator[None]:
    for number in range(len(cluster.hosts)):
        cluster.cut_off(number)
    yield
    for number in range(len(cluster.hosts)):
        cluster.cut_off(number, off=False)


@contextmanager
def _slow(cluster: EtcdCluster) -> Iterator[None]:
    """It works for 0.2 s, then not for 1.5 s, and all connections have to be made anew."""
    cluster.stop(0)
    cluster.start(0)
    over = threading.Event()

    def hamper() -> None:
        while not over.wait(0.2):
            cluster.pause(0)
            over.wait(1.5)
            cluster.resume(0)

    thread = threading.Thread(target=hamper)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _no_space(cluster: EtcdCluster) -> Iterator[None]:
    cluster.fill()
    yield
    cluster.make_room()


@contextmanager
def _follower_lost(cluster: EtcdCluster) -> Iterator[None]:
    number = (cluster.leader() + 1) % len(cluster.hosts)
    cluster.stop(number)
    yield
    cluster.start(number)


def _used_leader(cluster: EtcdCluster) -> int:
    """The leader, and a daemon is connected to it: no member is missed more."""
    assert cluster.user is not None
    number = cluster.member_of(cluster.user)
    cluster.let_lead(number)
    return number


@contextmanager
def _leader_lost(cluster: EtcdCluster) -> Iterator[None]:
    number = _used_leader(cluster)
    cluster.stop(number)
    yield
    cluster.start(number)


@contextmanager
def _leader_cut_off(cluster: EtcdCluster) -> Iterator[None]:
    number = _used_leader(cluster)
    cluster.cut_off(number)
    yield
    cluster.cut_off(number, off=False)


@contextmanager
def _quorum_lost(cluster: EtcdCluster) -> Iterator[None]:
    number = cluster.leader()
    lost = [number, (number + 1) % len(cluster.hosts)]
    for one in lost:
        cluster.stop(one)
    yield
    cluster.start(*lost)


@contextmanager
def _in_turn(cluster: EtcdCluster) -> Iterator[None]:
    for number in range(len(cluster.hosts)):
        cluster.stop(number, signal.SIGTERM)
        cluster.start(number)
        cluster.wait()
    yield


STOPPED = Fault("stopped", _stopped, unreachable=True)
KILLED = Fault("killed", _killed, unreachable=True)
BLACK_HOLE = Fault("packets dropped both ways", _black_hole, 25, unreachable=True)
SLOW = Fault("restarted, and slow", _slow, 24, served=True)
NO_SPACE = Fault("out of space", _no_space)
FOLLOWER_LOST = Fault("a follower lost", _follower_lost, served=True)
LEADER_LOST = Fault("the leader lost", _leader_lost, served=True)
LEADER_CUT_OFF = Fault("packets of the leader dropped", _leader_cut_off, 25, served=True)
QUORUM_LOST = Fault("quorum lost", _quorum_lost, 15, unreachable=True)
IN_TURN = Fault("all restarted one after another", _in_turn, 8, served=True)
