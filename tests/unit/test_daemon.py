"""What the daemon says before it touches anything."""

import asyncio
import logging

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
