"""`flannelpy doctor`: what is wrong with this host, and with the ways to its peers; and what mends it."""

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Self

from flannelpy import inspection
from flannelpy.beside import settings_beside
from flannelpy.cli.admin import Parser, add_output_flag, dump, shown, wants_json
from flannelpy.doctor.checks import examine
from flannelpy.doctor.facts import Facts, Path
from flannelpy.doctor.finding import Finding, as_json
from flannelpy.model.address import format_address, format_mac

WARNINGS_FOUND, ERRORS_FOUND = 10, 11
"""Exit codes, as those of `flannelpy lease check`; 0 is nothing."""
_MOST_PEERS = 32
_MARKS = {"error": "X", "warning": "!", "note": "-"}
_EPILOG = """\
Flags of the daemon may follow (--etcd-endpoints=..., --iface=..., --subnet-file=...). Beside a running daemon
none is needed: its own flags and variables are read.

It changes nothing on this host, but for a scratch network namespace of its own. With --peers it sends a few
small packets to each peer; there the kernel answers, nothing has to be installed."""


def main(argv: list[str]) -> int:
    """Look, judge, tell; the exit code is that of the worst finding."""
    parser = Parser(
        prog="flannelpy doctor",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look for what is wrong with the overlay on this host, and say what mends it.\n"
        f"Exit code 0: nothing is wrong, {WARNINGS_FOUND}: warnings, {ERRORS_FOUND}: errors.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--peers",
        type=int,
        nargs="?",
        const=_MOST_PEERS,
        default=0,
        metavar="N",
        help="probe the ways to peers, too, to N of them at most (without a number: %(const)s)",
    )
    add_output_flag(parser)
    options, rest = parser.parse_known_args(argv)
    known = settings_beside(rest, os.environ)
    began = time.monotonic()
    with Progress() as progress:
        facts = inspection.inspect(known, most_peers=max(0, options.peers), tell=progress.tell)
    found = examine(facts)
    if wants_json(options):
        print(dump(document(facts, found, time.monotonic() - began)))
    else:
        print("\n".join(lines(facts, found, time.monotonic() - began)))
    worst = {one.severity for one in found}
    return ERRORS_FOUND if "error" in worst else WARNINGS_FOUND if "warning" in worst else 0


class Progress:
    """One line on stderr that says what is looked at; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._write("")

    def tell(self, text: str) -> None:
        """Replace the line."""
        self._write(f"looking at {text} ...")

    def _write(self, text: str) -> None:
        if self._shows:
            print(
                f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}",
                end="",
                file=sys.stderr,
                flush=True,
            )


def document(facts: Facts, found: Sequence[Finding], seconds: float) -> dict[str, object]:
    """For programs."""
    overlay = facts.overlay
    return {
        "findings": [as_json(one) for one in found],
        "looked_at": {
            "daemon": facts.daemon.pid,
            "store": facts.store and facts.store.place,
            "from_memory": facts.from_memory,
            "backend": overlay and overlay.config.backend_type,
            "lease": overlay and overlay.own and overlay.own.key,
            "peers": overlay and max(0, len(overlay.leases) - 1),
            "features": dict(facts.host.features),
        },
        "paths": None if facts.paths is None else [_path_json(one) for one in facts.paths],
        "seconds": round(seconds, 3),
    }


def _path_json(path: Path) -> dict[str, object]:
    fields: dict[str, object] = path._asdict()
    fields["remote"] = format_address(path.remote)
    for name, mac in (("mac", path.mac), ("tunnel_by_broadcast", path.tunnel_by_broadcast)):
        fields[name] = format_mac(mac) if mac else None
    return fields


def lines(facts: Facts, found: Sequence[Finding], seconds: float) -> list[str]:
    """For a terminal: findings, then what was looked at."""
    width = max(60, min(110, shutil.get_terminal_size((110, 0)).columns))
    rows: list[str] = []
    for one in found:
        rows += _wrapped(f"{_MARKS[one.severity]} {one.check}: ", one.what, width)
        rows += _wrapped("    why: ", one.why, width)
        rows += _wrapped("    mend: ", one.remedy, width)
        rows.append("")
    errors = sum(one.severity == "error" for one in found)
    warnings = sum(one.severity == "warning" for one in found)
    verdict = f"{errors} errors, {warnings} warnings" if found else "nothing is wrong"
    rows.append(f"{verdict}; looked at {', '.join(_seen(facts))} in {seconds:.1f} s")
    return rows


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        shown(text),
        width,
        initial_indent=head,
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _seen(facts: Facts) -> list[str]:
    """What was looked at, in words."""
    words = ["this host"]
    if facts.store is not None and facts.store.census is not None:
        words.append(f"{len(facts.store.census.entries)} records in etcd")
    elif facts.from_memory:
        words.append("the saved leases")
    if facts.overlay is not None and facts.overlay.observed is not None:
        words.append(f"{len(facts.overlay.observed)} objects in the kernel")
    if facts.paths is not None:
        words.append(f"{len(facts.paths)} ways to peers")
    else:
        words.append("no way to a peer (--peers does)")
    return words
