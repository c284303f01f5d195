"""A test run that is killed leaves no process, mount or namespace behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.etcd_process import wait_until
from tests.system.conftest import need
from tests.system.page import ROOT

pytestmark = [pytest.mark.root]

RUN = """
import os, subprocess, sys
from pathlib import Path
from tests.system.wire import Wire
wire = Wire(Path(sys.argv[1]))
wire.run("setsid sleep 900 >/dev/null 2>&1 &")
print("ready", flush=True)
sys.stdin.read()
"""


def of_the_wire(folder: Path) -> list[str]:
    """The processes that see its mount, with their network namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (entry / "mounts").read_text():
                found.append(str((entry / "ns/net").readlink()))
        except OSError:
            continue  # it has just ended
    return found


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    need("nsenter", "unshare", "setpriv", "ip")
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout
        assert run.stdout.readline() == b"ready\n"
        # The first process, the outside world, and one that has left its session.
        namespaces = of_the_wire(tmp_path)
        assert len(namespaces) >= 3
        assert str(Path("/proc/self/ns/net").readlink()) not in namespaces
        run.kill()
    wait_until(lambda: not of_the_wire(tmp_path), "its processes have ended, and with them the namespaces")
