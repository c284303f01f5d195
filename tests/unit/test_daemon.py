"""What the daemon says before it touches anything."""

import asyncio
import logging
import subprocess
import sys

import pytest

from flannelpy import daemon
from flannelpy.errors import KernelError
from flannelpy.notify import Notify
from flannelpy.settings import Settings, parse


def test_stray_words_are_counted_in_the_log_and_not_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse(["--etcd-username=u", "--etcd-password", "x", "hunter2", "hunter3"], {})
    assert isinstance(settings, Settings)

    def refuse() -> None:
        raise KernelError("the end of this test")

    monkeypatch.setattr(daemon, "require_privileges", refuse)
    with caplog.at_level(logging.INFO, "flannelpy"), pytest.raises(KernelError):
        asyncio.run(daemon._serve(settings, Notify({})))
    assert "ignored after the flags: 2 word(s)" in caplog.messages
    assert "hunter" not in caplog.text


def test_a_start_does_not_import_the_commands_of_operators() -> None:
    code = (
        "import sys, flannelpy.daemon, flannelpy.store.etcd; "
        "ours = {m for m in sys.modules if m.startswith('flannelpy.')}; "
        "print(sorted(m for m in ours if '.cli' in m or 'admin' in m or m.rpartition('.')[2] in "
        "('census', 'reservation', 'config_keys', 'usage'))); print('argparse' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\nFalse\n"


def test_a_start_in_kubernetes_imports_no_grpc_and_no_yaml() -> None:
    """And one with etcd imports nothing of Kubernetes."""
    code = (
        "import sys, flannelpy.daemon; print([m for m in sys.modules if m == 'h11' or '.kube' in m]); "
        "import flannelpy.store.kube, flannelpy.store.kube_config; "
        "print([m for m in ('grpc', 'google.protobuf', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\n[]\n"
