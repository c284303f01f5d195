"""The programs iptables and ip6tables: read what they have, and change it in one go.

Never through a shell, never rule by rule: `iptables-save` once, `iptables-restore --noflush` only when
something differs.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flannelpy.errors import KernelError
from flannelpy.model.iptables import difference
from flannelpy.model.traffic import FamilyRules

_FAMILY_PREFIX = {32: "ip", 128: "ip6"}
_SECONDS = 20.0
"""A program that takes longer hangs."""
_WAIT = (1, 6, 2)
"""The first version whose iptables-restore waits for the lock, and that knows --random-fully."""
_LOADED = {32: Path("/proc/net/ip_tables_names"), 128: Path("/proc/net/ip6_tables_names")}


class RulesError(KernelError):
    """The rules could not be read or set this time; trying again may help."""


class Program(NamedTuple):
    """One kind of iptables that is installed: paths of iptables-save and iptables-restore."""

    save: str
    restore: str
    legacy: bool
    version: tuple[int, ...]

    @property
    def random_fully(self) -> bool:
        """Whether it can masquerade with ports at random."""
        return self.version >= _WAIT

    async def set(
        self, wanted: FamilyRules, *, random_fully: bool, only: str = "", only_show: bool = False
    ) -> tuple[tuple[str, ...], str]:
        """Make our chains and jumps as wanted; what was done in words, and the tables as they were before.

        `only` names a table: no other one is looked at.
        """
        saved = await _run([self.save, "-t", only] if only else [self.save])
        todo = difference(saved, wanted, random_fully=random_fully and self.random_fully, only=only)
        if todo.text and not only_show:
            wait = ["--wait=5"] if self.version >= _WAIT else []
            await _run([self.restore, "--noflush", *wait], todo.text)
        name = Path(self.save).name.removesuffix("-save")
        return tuple(f"{words} ({name})" for words in todo.words), saved


async def find(bits: int) -> Program:
    """The iptables (32) or ip6tables (128) of this host; KernelError with the remedy if there is none."""
    name = f"{_FAMILY_PREFIX[bits]}tables"
    path = _which(name)
    save, restore = _which(f"{name}-save"), _which(f"{name}-restore")
    if path is None or save is None or restore is None:
        raise KernelError(
            f"{name} is not installed, and the rules of --ip-masq and --iptables-forward-rules need it:"
            ' install the package iptables, or set "EnableNFTables":true in the network config'
        )
    version, legacy = read_version(await _run([path, "--version"]))
    return Program(save, restore, legacy, version)


def find_legacy(bits: int) -> Program | None:
    """The legacy variant beside another one; None if it is not installed."""
    name = f"{_FAMILY_PREFIX[bits]}tables-legacy"
    save, restore = _which(f"{name}-save"), _which(f"{name}-restore")
    return Program(save, restore, legacy=True, version=_WAIT) if save and restore else None


def read_version(text: str) -> tuple[tuple[int, ...], bool]:
    """`iptables v1.8.9 (nf_tables)` -> ((1, 8, 9), False); what names no kind (before 1.8) is legacy."""
    found = re.search(r"v(\d+)\.(\d+)(?:\.(\d+))?", text)
    version = tuple(int(part or 0) for part in found.groups()) if found else (0,)
    return version, "(nf_tables)" not in text


def legacy_tables(bits: int) -> frozenset[str]:
    """The tables of legacy iptables that are loaded in this network namespace; costs no process."""
    try:
        return frozenset(_LOADED[bits].read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return frozenset()


def _which(name: str) -> str | None:
    folders = [*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def _environment() -> dict[str, str]:
    """Ours, in English, without our secrets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
    return {**kept, "LC_ALL": "C"}


async def _run(command: Sequence[str], text: str = "") -> str:
    """What a program prints; RulesError with its own words if it fails."""
    name = Path(command[0]).name
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
        )
    except OSError as error:
        raise RulesError(f"cannot start {command[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(_SECONDS):
            out, err = await process.communicate(text.encode("utf-8", "surrogateescape"))
    except TimeoutError:
        raise RulesError(f"{name} did not end within {_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        words = " ".join(err.decode("utf-8", "replace").split())[:300]
        raise RulesError(f"{name} failed with code {process.returncode}: {words or 'it says nothing'}")
    return out.decode("utf-8", "surrogateescape")
