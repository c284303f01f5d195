"""What puts the CNI plugin onto a host."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from flannelpy.cni import install
from flannelpy.cni.install import InstallError
from tests.unit.cni.calls import Host

CONFLIST = '{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}\n'


def flannelpy(*argv: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "flannelpy", "cni", *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_installed_file_works_and_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text(CONFLIST)
    done = flannelpy("install", f"--bin-dir={tmp_path}/bin", f"--python={sys.executable}",
                     f"--config={tmp_path}/conf", f"--config-dir={tmp_path}/net.d")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net.d" / "10-flannel.conflist").read_text() == CONFLIST
    for name in ("flannel", "flannelpy-cni"):
        host = Host(tmp_path, command=(f"{tmp_path}/bin/{name}",))
        for command in ("ADD", "CHECK", "DEL"):
            assert host.call(command).code == 0
    text = (tmp_path / "bin" / "flannel").read_text()
    broken = tmp_path / "bin" / "broken"
    broken.write_text(
        text.replace("if MAGIC_NUMBER.hex() ==", "raise SystemExit(9) if MAGIC_NUMBER.hex() !=")
    )
    broken.chmod(0o755)
    # The text in it is what runs when the interpreter is another one.
    other = tmp_path / "bin" / "other"
    other.write_text(text.replace('MAGIC_NUMBER.hex() == "', 'MAGIC_NUMBER.hex() == "00'))
    other.chmod(0o755)
    assert Host(tmp_path, command=(str(other),)).call("ADD").code == 0
    done = flannelpy("remove", f"--bin-dir={tmp_path}/bin")
    assert not (tmp_path / "bin" / "flannel").exists()
    assert done.stdout.count("removed") == 2


def test_only_ours_is_removed(tmp_path: Path) -> None:
    (tmp_path / "flannel").write_bytes(b"\x7fELF another's")
    assert install.remove(tmp_path) == []
    assert (tmp_path / "flannel").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"plugins":5}', '{"plugins":[{"type":"bridge"}]}', "[" * 9000]
)
def test_a_bad_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "conf").write_text(text)
    with pytest.raises(InstallError, match="conf"):
        install.install_config(tmp_path / "conf", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("python", ["/nowhere/python3", "/bin/false", "/a b/python3", "/" + "x" * 130])
def test_a_bad_interpreter_is_one_line(tmp_path: Path, python: str) -> None:
    done = flannelpy("install", f"--bin-dir={tmp_path}", f"--python={python}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = flannelpy("install", f"--bin-dir={tmp_path}/file", f"--python={sys.executable}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def elf() -> bytes:
    return Path(os.path.realpath(shutil.which("sh") or "/bin/sh")).read_bytes()


def test_the_loader_of_a_program_can_be_another_one(tmp_path: Path) -> None:
    """The new path must fit into the room of the old one; the kernel then looks for it."""
    program = tmp_path / "program"
    program.write_bytes(install.with_loader(elf(), "/no/ld.so"))
    program.chmod(0o755)
    with pytest.raises(FileNotFoundError):
        subprocess.run([program, "-c", "true"], check=False)
    with pytest.raises(InstallError, match="no room"):
        install.with_loader(elf(), "/" + "x" * 200)


@pytest.mark.parametrize(
    "program", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x02" + b"\0" * 100, b"\x7fELF\x02\x01" + b"\0" * 100]
)
def test_what_is_no_program_has_no_loader(program: bytes) -> None:
    with pytest.raises(InstallError):
        install.with_loader(program, "/x")


def elf_with_room(room: int) -> bytes:
    """The headers of a 64-bit program whose loader has a path of up to `room` bytes."""
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 32, 64)
    struct.pack_into("<HH", head, 54, 56, 1)
    return bytes(head) + struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, room, room, 1) + b"/".ljust(room, b"\0")


def test_a_runtime_is_copied_once_and_old_ones_go(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    (runtime / "python3").write_bytes(elf_with_room(500))
    folder = tmp_path / "bin"
    folder.mkdir()
    made = []
    for version in range(3):
        (runtime / "os.py").write_text(f"# {version}")
        made.append(Path(install.install_runtime(folder, runtime)))
        assert f"{made[-1].parent}/ld.so\0".encode() in made[-1].read_bytes()
        os.utime(made[-1].parent, (version, version))
        assert Path(install.install_runtime(folder, runtime)) == made[-1]
        os.utime(made[-1].parent, (version, version))
    assert [path.exists() for path in made] == [False, True, True]
    assert {path.parent for path in made[1:]} == set(folder.iterdir())
