"""`flannelpy report`: one archive with what a maintainer asks for. Secrets are taken out."""

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from flannelpy import __version__, control, inspection
from flannelpy.beside import settings_beside
from flannelpy.cli import doctor
from flannelpy.cli.admin import Parser, dump
from flannelpy.doctor.checks import examine
from flannelpy.doctor.facts import Facts
from flannelpy.doctor.scrub import scrub
from flannelpy.errors import FlannelpyError
from flannelpy.settings import Settings, describe

_SECONDS = 15.0
_LARGEST = 4 << 20
"""Of one part; of a log the end is kept, of anything else the beginning."""
_PEERS = 8
_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("ip", "-d", "-s", "link"),
    ("ip", "address"),
    ("ip", "rule"),
    ("ip", "route", "show", "table", "all"),
    ("ip", "-6", "route", "show", "table", "all"),
    ("ip", "nexthop"),
    ("ip", "neigh"),
    ("bridge", "fdb"),
    ("nft", "list", "ruleset"),
    ("iptables-save",),
    ("ip6tables-save",),
    ("nstat", "-az"),
    ("sysctl", "-a", "--pattern", r"^net\.(ipv4|ipv6|bridge|core|netfilter)\."),
    ("ethtool", "-k", "flannel.1"),
    ("lsmod",),
    ("dmesg",),
    ("systemctl", "cat", "flannelpy", "flannelpy-udp"),
    ("systemctl", "status", "--no-pager", "flannelpy", "flannelpy-udp", "docker"),
    ("journalctl", "--no-pager", "-u", "flannelpy", "-u", "flannelpy-udp", "-n", "5000"),
)
_LIBRARIES = ("grpcio", "protobuf", "pyroute2", "prometheus-client", "scapy")
_EPILOG = """\
Flags of the daemon may follow; beside a running daemon none is needed. Passwords, tokens, private keys and
the environment are left out; addresses and host names are in it: look at it before you hand it on.
"""


def main(argv: list[str]) -> int:
    """Gather, scrub, pack."""
    parser = Parser(
        prog="flannelpy report",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pack what helps to find a fault into one archive (tar.gz), without secrets.",
        epilog=_EPILOG,
    )
    name = f"flannelpy-report-{platform.node() or 'host'}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    parser.add_argument("--file", default=f"{name}.tar.gz", help="the archive (default: %(default)s)")
    parser.add_argument(
        "--log", action="append", default=[], metavar="FILE", help="a log of the daemon, too; repeatable"
    )
    options, rest = parser.parse_known_args(argv)
    if not options.file:
        raise FlannelpyError("--file must be the path of a file, not empty")
    known = settings_beside(rest, os.environ)
    hide = secrets_of(known)
    with doctor.Progress() as progress:
        count = _pack(options.file, _parts(known, options.log, progress.tell), hide)
    print(f"{options.file}: {count} parts, addresses and host names among them; look before you hand it on")
    return 0


def secrets_of(known: Settings) -> list[str]:
    """What must not be in it, as far as the settings lead to it."""
    found = [known.etcd_password]
    for path in (known.etcd_password_file, known.etcd_keyfile):
        with suppress(OSError):
            if path:
                text = Path(path).read_text(encoding="utf-8", errors="replace")[:65536]
                found += [line.strip() for line in text.splitlines() if "-----" not in line]
    return [one for one in found if one]


def _pack(path: str, parts: Iterator[tuple[str, str]], hide: Sequence[str]) -> int:
    """Write the archive, readable for its owner alone; how many parts it has. Replaces nothing."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FlannelpyError(f"cannot write {path}: {error.strerror}; --file chooses another") from None
    folder = Path(path).name.removesuffix(".gz").removesuffix(".tar")
    count = 0
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in parts:
                data = scrub(text, hide).encode("utf-8", "surrogateescape")
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
                archive.addfile(info, io.BytesIO(data))
                count += 1
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return count


# --- what is in it ---


def _parts(known: Settings, logs: Sequence[str], tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """(name, text) of each."""
    yield "about.json", json.dumps(_about(), indent=1)
    yield "settings.txt", f"{describe(known)}\n"
    began = time.monotonic()
    facts = inspection.inspect(known, most_peers=_PEERS, tell=tell)
    found, seconds = examine(facts), time.monotonic() - began
    yield "doctor.txt", "\n".join([*doctor.lines(facts, found, seconds), ""])
    yield "doctor.json", dump(doctor.document(facts, found, seconds))
    yield from _of_daemon(known)
    yield from _of_store(facts)
    for name, path in (("subnet.env", known.subnet_file), *((f"logs/{Path(one).name}", one) for one in logs)):
        yield name, _file(path)
    if known.state_dir:
        for saved in sorted(Path(known.state_dir).glob("*.json"))[:20]:
            yield f"state/{saved.name}", _file(str(saved))
    for command in _COMMANDS:
        tell(" ".join(command))
        yield f"commands/{re.sub(r'[^a-z0-9.-]+', '_', '_'.join(command))[:40]}.txt", _output(command)


def _about() -> dict[str, object]:
    from importlib.metadata import PackageNotFoundError, version

    libraries = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    system = ""
    with suppress(OSError):
        system = Path("/etc/os-release").read_text(encoding="utf-8", errors="replace")
    return {
        "flannelpy": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": sys.version,
        "libraries": libraries,
        "system": system.splitlines(),
    }


def _of_daemon(known: Settings) -> Iterator[tuple[str, str]]:
    for command in ("status", "peers"):
        try:
            yield f"{command}.json", dump(control.ask(control.path_for(known.subnet_file), command))
        except FlannelpyError as error:
            yield f"{command}.json", dump({"error": str(error)})
    if known.healthz_port > 0:
        import urllib.request

        host = known.healthz_ip if known.healthz_ip not in ("", "0.0.0.0", "::") else "127.0.0.1"
        for page in ("readyz", "metrics"):
            url = f"http://{host}:{known.healthz_port}/{page}"
            with suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=3) as reply:
                yield f"{page}.txt", reply.read(_LARGEST).decode("utf-8", "replace")


def _of_store(facts: Facts) -> Iterator[tuple[str, str]]:
    census = facts.store.census if facts.store else None
    if census is None:
        yield "etcd.txt", f"{facts.store.trouble if facts.store else 'not asked'}\n"
        return
    rows = [f"config (revision {census.config_revision}): {census.config_text}"]
    rows += [
        f"{one.key} (created {one.created}, revision {one.revision}, etcd lease {one.etcd_lease_id:x}):"
        f" {one.value.decode('utf-8', 'backslashreplace')}"
        for one in census.entries
    ]
    yield "etcd.txt", "\n".join(rows)[:_LARGEST]


def _file(path: str) -> str:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LARGEST))
            return file.read(_LARGEST).decode("utf-8", "replace")
    except OSError as error:
        return f"{path}: {error.strerror}\n"


def _output(command: Sequence[str]) -> str:
    """What a program prints, without our environment: it may hold secrets, and says nothing here."""
    environment = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"$ {' '.join(command)}\n{error}\n"
    return f"$ {' '.join(command)}\n{done.stdout[:_LARGEST]}{done.stderr[:65536]}"
