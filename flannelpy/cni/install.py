"""Puts the CNI plugin and its configuration onto a host, each file in one step."""

import json
import os
import shutil
import struct
import subprocess
from hashlib import sha256
from pathlib import Path

from flannelpy import __version__
from flannelpy.errors import FlannelpyError
from flannelpy.files import read_regular, replace

SOURCE = Path(__file__).with_name("plugin.py")
RUNTIME = ".flannelpy-"
"""Folders of interpreters below the folder of CNI plugins begin with this."""

NAMES = ("flannelpy-cni", "flannel")
"""A conflist names the type flannel; the other name is for those who want both on one host."""

_MARK = b"# The CNI plugin of flannelpy "
_LARGEST_CONFIG = 1 << 20
_LONGEST_SHEBANG = 127
_COMPILE = """
import marshal, sys
from _frozen_importlib_external import MAGIC_NUMBER
from binascii import b2a_base64
code = compile(sys.stdin.read(), "plugin.py", "exec", dont_inherit=True, optimize=2)
print(MAGIC_NUMBER.hex(), b2a_base64(marshal.dumps(code), newline=False).decode())
"""
_BUNDLE = """\
#!{python} -IS
# The CNI plugin of flannelpy {version}, written by `flannelpy cni install`: its text, and the same compiled.
from _frozen_importlib_external import MAGIC_NUMBER
SOURCE = r'''
{source}'''
COMPILED = "{compiled}"
if MAGIC_NUMBER.hex() == "{magic}":
    from binascii import a2b_base64
    from marshal import loads
    code = loads(a2b_base64(COMPILED))
else:  # this is another Python now
    code = compile(SOURCE, "plugin.py", "exec", dont_inherit=True)
exec(code)
"""


class InstallError(FlannelpyError):
    """The plugin cannot be installed."""


def bundle(python: str, compiler: str = "") -> str:
    """The plugin as one file for this interpreter, compiled by it or, if it cannot run here, by `compiler`.

    InstallError: it cannot be run, is older than 3.9, or its path is too long for the first line of a script.
    """
    if len(python) + 6 > _LONGEST_SHEBANG or " " in python:
        raise InstallError(
            f"{python!r} cannot begin a script: use a path without spaces, shorter than 120 bytes"
        )
    source = SOURCE.read_text(encoding="utf-8")
    command = [compiler or python, "-IS", "-c", _COMPILE]
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or error
        last = str(reason).strip().splitlines()[-1]
        raise InstallError(f"{command[0]} cannot compile the plugin (3.9 or newer can): {last}") from None
    magic, compiled = done.stdout.split()
    return _BUNDLE.format(python=python, version=__version__, source=source, compiled=compiled, magic=magic)


def install_config(source: Path, target: Path) -> None:
    """Copy a network configuration (a conflist) unchanged. InstallError: it is not a JSON object."""
    try:
        text = read_regular(source, _LARGEST_CONFIG).decode()
        plugins = json.loads(text)["plugins"]
        types = [plugin["type"] for plugin in plugins]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InstallError(f"{source} is no CNI configuration list: {error!r}") from None
    if "flannel" not in types and "flannelpy-cni" not in types:
        raise InstallError(
            f"{source} names no plugin of type flannel, only {', '.join(map(str, types))[:200]}"
        )
    replace(target, text, 0o644)


def remove(folder: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Take away what `install_plugin` and `install_runtime` wrote here -> the paths. Other programs stay."""
    gone = []
    for path in (folder / name for name in names):
        if path.is_file() and _MARK in path.read_bytes()[:4096]:
            path.unlink()
            gone.append(path)
    for path in folder.glob(f"{RUNTIME}*"):
        shutil.rmtree(path)
        gone.append(path)
    return gone


def install_plugin(folder: Path, python: str, names: tuple[str, ...] = NAMES) -> None:
    """Write the plugin under these names; a runtime that calls it meanwhile gets the old or the new one."""
    text = bundle(python)
    for name in names:
        replace(folder / name, text, 0o755)


def install_runtime(folder: Path, runtime: Path) -> str:
    """Copy an interpreter beside the plugins -> its path. It needs nothing of the host.

    The folder's name holds a hash of what is in it: a new one never changes what runs. The one before stays,
    for a call that has just begun.
    """
    digest = sha256()
    for path in sorted(runtime.rglob("*")):
        digest.update(str(path.relative_to(runtime)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    target = folder / f"{RUNTIME}{digest.hexdigest()[:12]}"
    if not target.exists():
        temporary = folder / f"{RUNTIME}new"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(runtime, temporary)
        python = temporary / "python3"
        python.write_bytes(with_loader(python.read_bytes(), f"{target}/ld.so"))
        temporary.rename(target)
    others = [path for path in folder.glob(f"{RUNTIME}*") if path != target]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(path, ignore_errors=True)
    os.utime(target)
    return f"{target}/python3"


def with_loader(program: bytes, path: str) -> bytes:
    """An ELF program that is started by the loader at `path` (segment PT_INTERP, elf(5)).

    InstallError if it is none, or has less room for the path: whoever made the runtime leaves some.
    """
    if program[:4] != b"\x7fELF" or program[4] not in (1, 2) or program[5] != 1:
        raise InstallError("the interpreter to install is no program of a little-endian machine")
    wide = program[4] == 2
    table = struct.unpack_from("<Q" if wide else "<I", program, 32 if wide else 28)[0]
    size, count = struct.unpack_from("<HH", program, 54 if wide else 42)
    for number in range(count):
        at = table + number * size
        if struct.unpack_from("<I", program, at)[0] != 3:
            continue
        start = struct.unpack_from("<Q" if wide else "<I", program, at + (8 if wide else 4))[0]
        room = struct.unpack_from("<Q" if wide else "<I", program, at + (32 if wide else 16))[0]
        new = path.encode() + b"\0"
        if len(new) > room:
            raise InstallError(
                f"no room for {path}: the folder of CNI plugins has a path of {len(path)} bytes"
            )
        return program[:start] + new.ljust(room, b"\0") + program[start + room :]
    raise InstallError("the interpreter to install is linked statically: name it with --python instead")
