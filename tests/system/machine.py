"""One Debian host with systemd, whatever carries it: what the tests do with it."""

import sys
import time
from abc import ABC, abstractmethod

BEGUN = time.monotonic()


def say(text: str) -> None:
    """Progress, for those who watch (pytest -s)."""
    print(f"{time.monotonic() - BEGUN:7.1f} s  {text}", file=sys.stderr, flush=True)


class MachineError(AssertionError):
    """A command failed, or what was waited for did not happen."""


class Machine(ABC):
    """A host: `run` a command on it, `wait` for something to hold on it, `reboot` it."""

    patience = 1
    """How much slower than a container on this host it may be: all limits of time grow with it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    @abstractmethod
    def boot(self) -> None:
        """Switch it on; `up` waits for it."""

    @abstractmethod
    def execute(self, command: str, timeout: float) -> tuple[int, str]:
        """Run a shell command as root: its exit code and all that it says. MachineError: no answer."""

    @abstractmethod
    def log(self) -> str:
        """The last lines of its console."""

    @abstractmethod
    def close(self) -> None:
        """Free what is left of it, after the wire was closed."""

    @abstractmethod
    def begin_reboot(self) -> None:
        """Ask it to boot again and wait until the old system is gone."""

    def up(self, timeout: float) -> None:
        """Wait until units can be looked at and started."""
        deadline = time.monotonic() + timeout * self.patience
        while True:
            try:
                code, said = self.execute("systemctl is-active basic.target dbus.socket", 5 * self.patience)
            except MachineError as error:
                code, said = -1, str(error)
            if code == 0:
                return
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name} has not booted after {timeout:g} s: {said}")
            time.sleep(0.1)

    def run(self, command: str, timeout: float = 60) -> str:
        """What a command says. MachineError when it fails or takes too long."""
        code, output = self.execute(command, timeout * self.patience)
        if code:
            raise MachineError(f"{self.name}: {command}: exit code {code}\n{output}")
        return output.strip()

    def wait(self, command: str, timeout: float = 60) -> str:
        """Run a command until it succeeds; what it says then."""
        deadline = time.monotonic() + timeout * self.patience
        while True:
            code, output = self.execute(command, timeout * self.patience)
            if code == 0:
                return output.strip()
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name}: after {timeout:g} s still: {command}: {code}\n{output}")
            time.sleep(0.1)

    def look(self) -> str:
        """What helps to see why a test failed."""
        parts = []
        for command in (
            "systemctl --failed --no-legend",
            "systemctl status --no-pager --lines=0 flannelpy docker etcd",
            "journalctl --no-pager --lines=60 -u flannelpy",
            "journalctl --no-pager --lines=20 -u docker",
            "ip -br address; ip route; cat /run/flannel/subnet.env; ls -la /run/flannel",
            "iptables-save; nft list tables",
            "docker ps -a",
        ):
            try:
                parts.append(f"$ {command}\n{self.execute(command, 30 * self.patience)[1]}")
            except MachineError as error:
                parts.append(f"$ {command}\n{error}\n")
        return "\n".join([*parts, f"console:\n{self.log()}"])


def reboot(*machines: Machine, timeout: float = 60) -> None:
    """All of them at once."""
    for machine in machines:
        say(f"{machine.name}: reboot")
        machine.begin_reboot()
    for machine in machines:
        machine.up(timeout)
        say(f"{machine.name}: booted")
