"""sd_notify against a real datagram socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannelpy.notify import Notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@flannelpy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind("\0" + name[1:] if name[0] == "@" else name)
        bound.settimeout(5)
        yield bound, name


def test_messages(manager: tuple[socket.socket, str]) -> None:
    bound, name = manager
    notify = Notify({"NOTIFY_SOCKET": name})
    assert notify.ready()
    assert notify.status("3 peers\nREADY=0 \udcff")
    assert notify.stopping()
    assert [bound.recv(4096) for _ in range(3)] == [b"READY=1", b"STATUS=3 peers READY=0 ?", b"STOPPING=1"]


@pytest.mark.parametrize(
    "name", [None, "", "vsock:2:1", "/nowhere/notify", "@nobody-listens", "/x\0y", "/" + "x" * 200]
)
def test_nobody_there_is_no_error(name: str | None) -> None:
    notify = Notify({} if name is None else {"NOTIFY_SOCKET": name})
    assert [notify.ready(), notify.status("x"), notify.stopping()] == [False, False, False]


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "\u0663"}, None),
        ({}, None),
    ],
)
def test_whether_systemd_watches(environ: dict[str, str], seconds: float | None) -> None:
    assert Notify({"NOTIFY_SOCKET": "/run/x", **environ}).watchdog_seconds == seconds
    assert Notify(environ).watchdog_seconds is None, "nobody to tell"
