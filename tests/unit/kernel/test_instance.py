"""Whose lock counts: that of root, of our own user, and of the user that the systemd unit has."""

import os
import pwd
import sys
from subprocess import PIPE, Popen

import pytest

from flannelpy.errors import ConflictError
from flannelpy.kernel import instance

HOLDER = """
import os, sys
from flannelpy.kernel import instance
os.setuid(int(sys.argv[2]))
held = instance.lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")
@pytest.mark.parametrize("is_service", [True, False])
def test_the_lock_of_another_user_counts_if_the_service_runs_as_that_user(
    is_service: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(instance, "_SERVICE_USER", "nobody" if is_service else "flannelpy")
    what = f"test {os.getpid()}"
    with Popen([sys.executable, "-c", HOLDER, what, str(nobody.pw_uid)], stdin=PIPE, stdout=PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        if is_service:
            with pytest.raises(ConflictError, match=str(holder.pid)):
                instance.lock(what)
        else:
            instance.lock(what).close()
