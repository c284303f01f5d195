"""The systemd units, judged by systemd itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flannelpy.backends.udp import protocol
from flannelpy.flags import FLAGS

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT_FILES = (
    "flannelpy.service",
    "flannelpy-udp.socket",
    "flannelpy-udp.service",
    "flannelpy.service.d/iptables-legacy.conf",
    "flannelpy.service.d/udp-fast-path.conf",
    "docker.service.d/flannelpy.conf",
)
DOCKER = "[Unit]\nDescription=Docker\n[Service]\nType=notify\nExecStart=/usr/bin/dockerd -H fd://\n"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be installed, with programs that exist in place of those that may not."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    folder = tmp_path / "units"
    for name in ("docker.service.d", "flannelpy.service.d"):
        (folder / name).mkdir(parents=True)
    for name in UNIT_FILES:
        text = (UNITS / name).read_text()
        for command in ("/usr/local/bin/flannelpy", "dockerd", "/usr/bin/python3"):
            text = text.replace(f"{command} ", f"{program} ").replace(f"{command}\n", f"{program}\n")
        (folder / name).write_text(text)
    (folder / "docker.service").write_text(DOCKER.replace("/usr/bin/dockerd", str(program)))
    return folder


def analyze(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    assert tool, "systemd-analyze is missing: install the package systemd"
    # The colon at the end adds systemd's own units behind ours.
    return subprocess.run(
        [tool, *argv],
        env=dict(os.environ) | {"SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_COLORS": "0", "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def verify(folder: Path, unit: str) -> tuple[int, str]:
    done = analyze(folder, "verify", "--man=no", "--recursive-errors=one", str(folder / unit))
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "unit", ["flannelpy.service", "flannelpy-udp.socket", "flannelpy-udp.service", "docker.service"]
)
def test_systemd_accepts_the_unit_without_a_word(units: Path, unit: str) -> None:
    assert verify(units, unit) == (0, "")


@pytest.mark.parametrize(
    ("unit", "old", "new", "complaint"),
    [
        ("flannelpy.service", "KillMode=process", "KillMode=proces", "kill mode"),
        ("flannelpy.service", "TimeoutStopSec=", "TimeoutStopSecs=", "Unknown key"),
        ("flannelpy.service", "AF_NETLINK", "AF_NETLINKS", "AF_NETLINKS"),
        ("flannelpy.service", "@system-service", "@system-servce", "system-servce"),
        ("docker.service.d/flannelpy.conf", "ExecStart=\n", "", "more than one ExecStart"),
    ],
)
def test_the_check_finds_mistakes(units: Path, unit: str, old: str, new: str, complaint: str) -> None:
    path = units / unit
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    _, said = verify(units, unit.partition(".d/")[0])
    assert complaint in said


@pytest.mark.parametrize(("unit", "limit"), [("flannelpy.service", 20), ("flannelpy-udp.service", 10)])
def test_the_service_is_confined(units: Path, unit: str, limit: int) -> None:
    """systemd's own exposure score, 0 (tight) to 100 (a plain unit: 96). Above it, something was opened."""
    (units / "flannelpy.service.d" / "udp-fast-path.conf").unlink()  # opens bpf(2), where it is wanted
    done = analyze(units, "security", "--offline=yes", f"--threshold={limit}", str(units / unit))
    assert done.returncode == 0, done.stdout


def test_the_forwarders_socket_is_where_the_daemon_looks_for_it() -> None:
    name = protocol.address_of("flannel0").replace("\0", "@")
    assert f"ListenSequentialPacket={name}\n" in (UNITS / "flannelpy-udp.socket").read_text()


def test_the_options_file_sets_variables_that_exist() -> None:
    known = {flag.env for flag in FLAGS.values()}
    lines = (UNITS / "flannelpy.env").read_text().splitlines()
    names = [
        line.lstrip("#").partition("=")[0]
        for line in lines
        if line.lstrip("#").startswith("FLANNELD_") and "=" in line
    ]
    assert names
    assert set(names) <= known
