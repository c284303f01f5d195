"""A machine as a virtual one: QEMU emulates the processor (tcg), commands go through the QEMU guest agent.

The disk is made once for all machines, and each writes to a copy of its own that ends with QEMU.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

from tests.system.machine import Machine, MachineError
from tests.system.wire import GATEWAY, NETWORK, Wire

QEMU = "qemu-system-x86_64"
PROGRAMS = (QEMU, "mkfs.ext4", "nsenter", "unshare", "setpriv", "ip")
MEMORY = 768
# The root and the kernel's layer below, what is put in above. The disk has no partitions.
DISK = """
mkdir -p "$1/disk" && cd "$1/disk"
mkdir -p upper work system
mount -t overlay overlay -o "lowerdir=$3/layer:$2,upperdir=upper,workdir=work" system
"""
MAKE = """
mkfs.ext4 -q -m 0 -d "$1/disk/system" "$1/disk/ext4" 3G
umount "$1/disk/system"
rm -rf "$1/disk/upper" "$1/disk/work"
"""
INTERFACE = (
    "[Match]\nMACAddress={mac}\n[Network]\nAddress={address}/{length}\nGateway={gateway}\nIPv6AcceptRA=no\n"
)


def prepare_disk(wire: Wire, root: Path, kernel: Path) -> Path:
    """The file system that the disk will hold, mounted in the wire's namespaces."""
    wire.run(DISK, str(wire.folder), str(root), str(kernel))
    return wire.folder / "disk" / "system"


def make_disk(wire: Wire, addresses: list[str]) -> None:
    """Write it to a file. The machine that gets the address n has the MAC address n."""
    for number, address in enumerate(addresses, 1):
        text = INTERFACE.format(mac=_mac(number), address=address, length=NETWORK.prefixlen, gateway=GATEWAY)
        wire.run(
            'printf %s "$2" >"$1"',
            f"{wire.folder}/disk/system/etc/systemd/network/10-lan{number}.network",
            text,
        )
    wire.run(MAKE, str(wire.folder), timeout=120)


def _mac(number: int) -> str:
    return f"52:54:00:78:00:{number:02x}"


class VirtualMachine(Machine):
    """It boots at once. It gets the address of this `number` in `make_disk`."""

    patience = 10

    def __init__(self, name: str, address: str, number: int, wire: Wire, kernel: Path) -> None:
        super().__init__(name, address)
        self._wire = wire
        self._number = number
        self._kernel = kernel
        self._console = wire.folder.with_name(f"{name}.console")
        self._agent = wire.folder.with_name(f"{name}.agent")
        self._ids = count(1)
        tap = f"tap{number}"
        wire.run('ip tuntap add "$1" mode tap; ip link set "$1" master lan up', tap)
        self.boot()

    def boot(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._agent))
        listener.listen(1)
        options = {
            "-machine": "q35,accel=tcg,graphics=off",
            "-cpu": "max",
            "-m": str(MEMORY),
            "-kernel": str(self._kernel / "vmlinuz"),
            "-initrd": str(self._kernel / "initrd"),
            "-append": "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off apparmor=0"
            f" net.ifnames=0 systemd.hostname={self.name} systemd.show_status=1",
            "-display": "none",
            "-serial": f"file:{self._console}",
            "-drive": f"file={self._wire.folder}/disk/ext4,format=raw,if=virtio,snapshot=on",
            "-netdev": f"tap,id=lan,ifname=tap{self._number},script=no,downscript=no",
            "-chardev": f"socket,id=agent,path={self._agent}",
        }
        devices = [
            f"virtio-net-pci,netdev=lan,mac={_mac(self._number)},romfile=",
            "virtio-serial-pci",
            "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "virtio-rng-pci",
        ]
        argv = [QEMU, "-nodefaults", *(word for pair in options.items() for word in pair)]
        argv += [word for device in devices for word in ("-device", device)]
        self._process = subprocess.Popen(
            self._wire.command(*argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Where the copy of the disk goes, as a file without a name.
            env={**os.environ, "TMPDIR": str(self._wire.folder.parent)},
        )
        listener.settimeout(20)
        try:
            self._line, _ = listener.accept()
        except TimeoutError:
            self._process.kill()
            _, said = self._process.communicate()
            raise MachineError(f"{QEMU} does not start: {said.decode(errors='replace')}") from None
        finally:
            listener.close()
        self._line.settimeout(30)  # Docker's start keeps an emulated processor busy for seconds
        self._rest = b""

    def execute(self, command: str, timeout: float) -> tuple[int, str]:
        deadline = time.monotonic() + timeout
        arguments = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1\n{command}"], "capture-output": True}
        environment = ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
        pid = self._ask("guest-exec", {**arguments, "env": environment})["pid"]
        while True:
            state = self._ask("guest-exec-status", {"pid": pid})
            if state["exited"]:
                output = base64.b64decode(state.get("out-data", "")).decode(errors="replace")
                return state.get("exitcode", 128 + state.get("signal", 0)), output
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name}: no end after {timeout:g} s: {command}")
            time.sleep(0.05)

    def begin_reboot(self) -> None:
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        self.run("systemctl --no-block reboot")
        deadline = time.monotonic() + 20 * self.patience
        while True:
            try:
                if self.execute("cat /proc/sys/kernel/random/boot_id", 5)[1].strip() != before:
                    return
            except MachineError:
                pass
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name} has not gone down\n{self.log()}")
            time.sleep(0.2)

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return self._console.read_text(errors="replace")[-4000:]
        return ""

    def close(self) -> None:
        """Nothing outlives the wire but the line to the agent."""
        self._line.close()
        self._process.kill()
        self._process.communicate(timeout=10)

    def _ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """One question to the guest agent. Answers to older questions, before a reboot, are passed over."""
        try:
            sync = next(self._ids)
            self._send("guest-sync", {"id": sync})
            while self._receive().get("return") != sync:
                pass
            self._send(command, arguments)
            answer = self._receive()
        except (OSError, ValueError) as error:
            raise MachineError(f"{self.name}: the guest agent does not answer: {error}") from None
        if "error" in answer:
            raise MachineError(f"{self.name}: {command}: {answer['error']}")
        return answer["return"]

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        self._line.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            data = self._line.recv(65536)
            if not data:
                raise ConnectionError("closed")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def missing() -> list[str]:
    """The programs that are needed and not there."""
    return [program for program in PROGRAMS if shutil.which(program) is None]
