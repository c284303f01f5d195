"""One etcd for the tests that only read and write, each under a prefix of its own; others start theirs."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from tests.etcd_process import ETCD, ETCDCTL, EtcdProcess

Start = Callable[..., EtcdProcess]


@pytest.fixture(scope="session")
def etcd_directory() -> Iterator[Path]:
    """In memory where possible: etcd syncs each write to disk."""
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="flannelpy-etcd-", dir=parent) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def start_shared(etcd_directory: Path) -> Iterator[Start]:
    """Start an etcd that lives until the end of the session."""
    yield from _starter(etcd_directory / "shared")


@pytest.fixture
def start_etcd(etcd_directory: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start an etcd that lives as long as the test."""
    yield from _starter(etcd_directory / request.node.name.replace("/", "_"))


def _starter(directory: Path) -> Iterator[Start]:
    if ETCD is None or ETCDCTL is None:
        pytest.skip("needs the programs etcd and etcdctl (Debian: etcd-server, etcd-client)")
    started: list[EtcdProcess] = []
    numbers = count()

    def start(flags: Sequence[str] = (), scheme: str = "http") -> EtcdProcess:
        process = EtcdProcess(directory / str(next(numbers)), flags=flags, scheme=scheme)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def shared_etcd(start_shared: Start) -> EtcdProcess:
    """A plain etcd; do not stop it, and keep to a prefix of your own."""
    return start_shared()


_prefixes = count()


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"/test-{next(_prefixes)}/network"
