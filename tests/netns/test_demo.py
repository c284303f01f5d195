"""`flannelpy demo` as people run it, each time in a mount namespace with a /run of its own.

There its fixed names (of the lock, the folder and the namespaces) meet nobody else's.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flannelpy.cli.processes import wait_until

pytestmark = pytest.mark.root


class Machine:
    """A /run of its own, and the demo started in it."""

    def __init__(self) -> None:
        script = "mount -t tmpfs tmpfs /run && echo made && exec sleep 300"
        self.keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.keeper.stdout is not None
        assert self.keeper.stdout.readline() == "made\n"
        self.running: list[subprocess.Popen[str]] = []

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.keeper.pid}", "--mount", "--root", "--wd", "--", *words]

    def start(self, *flags: str) -> subprocess.Popen[str]:
        demo = subprocess.Popen(
            self.command(sys.executable, "-m", "flannelpy", "demo", *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(demo)
        return demo

    def run(self, *flags: str) -> tuple[int, str, str]:
        demo = self.start(*flags)
        out, err = demo.communicate(timeout=60)
        return demo.returncode, out, err

    def hold(self) -> subprocess.Popen[str]:
        """A demo that has shown its result and waits for Ctrl-C."""
        demo = self.start("--nodes=2", "--hold")
        assert demo.stderr is not None
        lines = []
        for line in demo.stderr:
            lines.append(line)
            if "Ctrl-C ends" in line:
                return demo
        raise AssertionError("".join(lines))

    def left(self) -> list[str]:
        """The namespaces that are there, and the folder of the demo."""
        script = "ls /run/netns 2>/dev/null; ls -d /run/flannelpy-demo 2>/dev/null; true"
        done = subprocess.run(self.command("sh", "-c", script), capture_output=True, text=True, check=True)
        return done.stdout.split()

    def runs(self) -> list[str]:
        """The processes in the namespaces."""
        script = "for name in $(ls /run/netns); do ip netns pids $name; done"
        done = subprocess.run(self.command("sh", "-c", script), capture_output=True, text=True, check=True)
        return done.stdout.split()

    def close(self) -> None:
        for demo in self.running:
            demo.kill()
            demo.communicate()
        self.keeper.kill()
        self.keeper.communicate()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("backend", "mtu", "device"), [("vxlan", 1450, "flannel.1"), ("udp", 1472, "flannel0")]
)
def test_every_pod_reaches_every_other_pod_and_nothing_stays(
    machine: Machine, backend: str, mtu: int, device: str
) -> None:
    code, out, err = machine.run("--nodes=3", "--output=json", f"--backend={backend}")
    assert code == 0, err
    result = json.loads(out)
    assert result["ok"]
    assert [row["node"] for row in result["nodes"]] == ["node1", "node2", "node3"]
    assert len({row["subnet"] for row in result["nodes"]}) == 3
    for row in result["nodes"]:
        assert (row["reached"], row["peers"], row["mtu"], row["device"]) == (2, 2, mtu, device)
    assert machine.left() == []


def test_ctrl_c_ends_a_held_demo_and_a_second_one_keeps_away(machine: Machine) -> None:
    held = machine.hold()
    code, _, err = machine.run("--nodes=2")
    assert (code, err) == (1, "flannelpy: another demo is running on this machine: end it first (Ctrl-C)\n")
    held.send_signal(signal.SIGINT)
    out, _ = held.communicate(timeout=20)
    assert held.returncode == 0
    assert "2 of 2 pairs" in out
    assert machine.left() == []


def test_what_a_killed_demo_leaves_behind_is_removed_by_the_next(machine: Machine) -> None:
    held = machine.hold()
    assert len(machine.runs()) >= 3
    held.kill()
    held.communicate()
    assert len(machine.left()) == 6
    wait_until(lambda: not machine.runs(), "etcd and the daemons to die with the demo")
    code, _, err = machine.run("--nodes=2")
    assert code == 0, err
    assert "earlier demo has left behind: 5 namespaces" in err
    assert machine.left() == []


def test_sigterm_in_the_middle_cleans_up(machine: Machine) -> None:
    silent = "sh -c 'exec sleep 60'"
    demo = machine.start("--nodes=2", f"--daemon=1={silent}")
    assert demo.stderr is not None
    for line in demo.stderr:
        if "starting the daemon" in line:
            break
    demo.terminate()
    demo.communicate(timeout=20)
    assert demo.returncode == 128 + signal.SIGTERM
    assert machine.left() == []


def test_a_daemon_that_fails_is_named_with_the_end_of_its_log(machine: Machine) -> None:
    failing = shlex.join(["sh", "-c", "echo the reason; exit 7"])
    code, out, err = machine.run("--nodes=2", f"--daemon=2={failing}")
    assert (code, out) == (1, "")
    assert "the end of node2.log:\n  the reason\n" in err
    assert err.endswith("flannelpy: node2: exit code 7 before it was ready\n")
    assert machine.left() == []


def test_pods_that_do_not_reach_each_other_fail_the_demo(machine: Machine) -> None:
    # A daemon that writes subnet.env and programs nothing.
    idle = """
import os, signal, socket, sys
path = next(word.partition("=")[2] for word in sys.argv if word.startswith("--subnet-file="))
number = "node1" not in path
open(path, "w").write(f"FLANNEL_SUBNET=10.5.{9 + number}.1/24\\nFLANNEL_MTU=1450\\n")
socket.socket(1, 2).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
print("idle"); sys.stdout.flush()
signal.pause()
"""
    command = shlex.join([sys.executable, "-c", idle])
    code, out, err = machine.run("--nodes=2", "--timeout=3", f"--daemon=1={command}", f"--daemon=2={command}")
    assert code == 1
    assert "2 of 2 pairs of pods do not reach each other; node1 to node2: " in out
    assert "no route" in out
    assert "the end of node1.log:\n  idle" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes=1"], "'1' is not a number from 2 to 20"),
        (["--nodes=21"], "'21' is not a number from 2 to 20"),
        (["--network=10.5.0.0/22"], "--network 10.5.0.0/22 has no room for 3 subnets of /24: give a /16"),
        (["--network=192.168.0.0/16"], "--network 192.168.0.0/16 overlaps 192.168.77.0/24"),
        (["--daemon=flanneld"], "'flanneld' is not N=COMMAND"),
        (["--daemon=9=flanneld"], "--daemon 9=flanneld: there are nodes 1 to 3"),
    ],
)
def test_options_that_cannot_be(machine: Machine, flags: list[str], message: str) -> None:
    code, out, err = machine.run(*flags)
    assert (code, out) == (2, "")
    assert message in err
