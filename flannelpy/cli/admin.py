"""What `flannelpy lease` and `flannelpy config` share: flags, the way to etcd, confirmation, safe output.

Foreign text (keys, values, etcd's errors) reaches the terminal only through `shown` and `dump`.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from flannelpy import settings
from flannelpy.errors import ChangedError, FlannelpyError, SettingsError
from flannelpy.flags import ETCD, TABLE
from flannelpy.log import one_line
from flannelpy.model.census import Census, Entry
from flannelpy.model.config import ConfigError, NetworkConfig, parse_config
from flannelpy.model.lease import Lease
from flannelpy.settings import Settings

T = TypeVar("T")


class Admin(Protocol):
    """A network in etcd, for an operator; every method raises StoreError.

    Those that write return False, and change nothing, when it is not as it was shown any more.
    """

    async def config(self) -> tuple[str | None, int]:
        """(the config's text, the revision of its last change); (None, 0) if there is none."""
        ...

    async def census(self, *, lifetimes: bool) -> Census:
        """Everything; with `lifetimes` also when each record expires."""
        ...

    async def signature(self, entry: Entry) -> str | None:
        """What the daemon that wrote a lease says about itself."""
        ...

    async def remove(self, entry: Entry) -> bool:
        """Delete a record."""
        ...

    async def reserve(self, lease: Lease, revision: int) -> bool:
        """Make a reservation, if no record was written since the census of `revision`."""
        ...

    async def keep(self, entry: Entry) -> bool:
        """Turn a lease into a reservation."""
        ...

    async def let_expire(self, entry: Entry) -> bool:
        """Turn a reservation into a lease."""
        ...

    async def set_config(self, text: str, revision: int) -> bool:
        """Write the config, if its last change is that of `revision`."""
        ...


# --- the command line ---


class Parser(argparse.ArgumentParser):
    """To be made with `allow_abbrev=False`. Errors are one line, without the words at fault.

    One of them may be a password that slipped.
    """

    def error(self, message: str) -> NoReturn:
        """SettingsError instead of usage and exit."""
        if message.startswith("unrecognized arguments"):
            message = "there are words or flags that it does not know"
        elif "invalid choice" in message:
            head, _, choices = message.partition("invalid choice")
            message = f"{head}it must be one of {choices.partition('choose from ')[2].rstrip(')')}"
        elif ": invalid " in message:
            message = f"{message.partition(': invalid ')[0]}: it must be a whole number"
        name = self.prog.removeprefix("flannelpy ")
        raise SettingsError(f"{name}: {message}; see {self.prog} --help")


def add_etcd_flags(parser: argparse.ArgumentParser) -> None:
    """The daemon's flags for etcd; what is not given is read from the daemon's variables."""
    group = parser.add_argument_group(
        "etcd", "the daemon's flags; without them its FLANNELD_ variables count"
    )
    for flag in TABLE:
        if flag.group == ETCD:
            # Without defaults: what is not given is read from the environment.
            group.add_argument(
                f"--{flag.name}",
                dest=flag.field,
                metavar=flag.word,
                default=argparse.SUPPRESS,
                help=flag.help.replace("%", "%%") + f" [{flag.env}]",
            )
            group.add_argument(
                f"-{flag.name}", dest=flag.field, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    """`--output text|json`."""
    parser.add_argument("--output", choices=("text", "json"), default=argparse.SUPPRESS, help="default: text")


def add_yes_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """`--yes` and `--revision N`."""
    parser.add_argument("--yes", action="store_true", help="do it without asking")
    parser.add_argument(
        "--revision",
        type=int,
        metavar="N",
        help=f"do it only if the last change of {what} is this one (as shown before)",
    )


def wants_json(options: argparse.Namespace) -> bool:
    """Whether the output is for a program."""
    return getattr(options, "output", "text") == "json"


def etcd_settings(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of the daemon as far as etcd goes; SettingsError."""
    flags = [flag for flag in TABLE if flag.group == ETCD]
    argv = [f"--{flag.name}={getattr(options, flag.field)}" for flag in flags if hasattr(options, flag.field)]
    parsed = settings.parse(argv, {flag.env: environ.get(flag.env, "") for flag in flags})
    if not isinstance(parsed, Settings):  # pragma: no cover
        raise SettingsError("these flags are not for this command")
    return parsed


def ask_etcd(options: argparse.Namespace, action: Callable[[Admin], Awaitable[T]]) -> T:
    """Do something with the network that the flags name, over a connection of its own. Raises StoreError.

    One call to show, one to change: nothing is open while somebody thinks.
    """
    from flannelpy.daemon import administration  # slow, and not needed to refuse a wrong command line

    known = etcd_settings(options)

    async def ask() -> T:
        async with administration(known) as admin:
            return await action(admin)

    return asyncio.run(ask())


def read_config(text: str | None) -> tuple[NetworkConfig | None, str]:
    """(the config or None, why there is none)."""
    if text is None:
        return None, "there is no network config yet"
    try:
        return parse_config(text), ""
    except ConfigError as error:
        return None, str(error)


# --- changing something ---


class Plan(NamedTuple):
    """A change that is about to be made."""

    preview: Sequence[str]
    """What will be, in lines."""
    document: dict[str, Any]
    """The same for programs; gets "done": null if the answer got lost."""
    question: str
    what: str
    """What would have been changed by somebody else."""
    write: Callable[[Admin], Awaitable[bool]]
    success: str


def carry_out(options: argparse.Namespace, plan: Plan) -> int:
    """Show, ask, do, tell; 0. FlannelpyError if it is not wanted, ChangedError if somebody was faster."""
    json_wanted = wants_json(options)
    if not json_wanted or (sys.stdin.isatty() and not options.yes):
        print("\n".join(plan.preview), file=sys.stderr if json_wanted else sys.stdout, flush=True)
    done: bool | None = False
    try:
        confirmed(plan.question, yes=options.yes)
        done = None  # not known, should the answer get lost
        done = ask_etcd(options, plan.write)
    finally:
        if json_wanted:
            print(dump({**plan.document, "done": done}), flush=True)
    if not done:
        raise ChangedError(
            f"{plan.what} was changed by somebody else in the meantime: nothing is done, look again"
        )
    if not json_wanted:
        print(plan.success)
    return 0


def confirmed(question: str, *, yes: bool) -> None:
    """Return if the operator wants it; FlannelpyError otherwise. Asks only at a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise FlannelpyError("nothing is changed: confirm with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise FlannelpyError("nothing is changed")


def check_revision(wanted: int | None, found: int, what: str) -> None:
    """ChangedError unless the last change is the wanted one."""
    if wanted is not None and wanted != found:
        raise ChangedError(
            f"{what} is not as it was shown: its last change is revision {found}, not {wanted}; look again"
        )


# --- output ---


def shown(text: str, limit: int = 0) -> str:
    """Foreign text on one line, printable; cut to `limit` characters if that is given."""
    line = one_line(text)
    return line if not limit or len(line) <= limit else f"{line[: limit - 3]}..."


def dump(value: Any) -> str:
    """JSON on one line of printable ASCII."""
    text = json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")
    if "Infinity" in text:  # of a foreign 1e999; it is no JSON
        text = json.dumps(json.loads(text, parse_constant=str))
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two blanks apart; no blanks at the ends of lines."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
