"""Labs for the tests: nodes in network namespaces, and what they looked like when a test failed."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import Lab, leftovers, remove

PREFIX = "fpt"
_LABS = pytest.StashKey[list[Lab]]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what every node looked like."""
    report = yield
    if report.failed and call.when != "teardown":
        for lab in item.stash.get(_LABS, []):
            for node in lab.nodes:
                report.sections.append((f"{node.name} ({node.netns})", lab.look(node)))
    return report


@pytest.fixture(scope="session")
def _no_leftovers() -> None:
    """Remove the namespaces of test runs that were killed: their names hold the process id."""
    for name in leftovers(PREFIX):
        pid = name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            remove([name])


@pytest.fixture
def make_lab(request: pytest.FixtureRequest, _no_leftovers: None) -> Iterator[Callable[..., Lab]]:
    """Make labs (arguments as for Lab, without the first two) that end with the test."""
    labs = request.node.stash.setdefault(_LABS, [])

    def make(*, ipv6: bool = False) -> Lab:
        # Not tmp_path: the paths of UNIX sockets must be short.
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lab = Lab(f"{PREFIX}{os.getpid()}-{len(labs)}-", folder, ipv6=ipv6)
        labs.append(lab)
        return lab.__enter__()

    yield make
    for lab in labs:
        lab.close()
        shutil.rmtree(lab.folder, ignore_errors=True)


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A lab with etcd, still without nodes and without a network configuration."""
    made = make_lab()
    made.start_etcd()
    return made
