"""`flannelpy config`: the network config in etcd: read, checked, explained, and set with a preview."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flannelpy.backend import has, load
from flannelpy.cli.admin import (
    Parser,
    Plan,
    add_etcd_flags,
    add_output_flag,
    add_yes_flags,
    ask_etcd,
    carry_out,
    check_revision,
    dump,
    etcd_settings,
    read_config,
    shown,
    table,
    wants_json,
)
from flannelpy.errors import FlannelpyError, StoreError
from flannelpy.model.census import Census, Entry
from flannelpy.model.config import EXAMPLE_CONFIG, MAX_CHARACTERS, ConfigError, NetworkConfig, parse_config
from flannelpy.model.config_keys import Change, changes, in_effect, keys_of, remarks, stranded
from flannelpy.model.subnet import pool_size

_SHOWN_LEASES = 5
_WIDTH = 78
_LONGEST_VALUE = 30
_FLANNELS = frozenset(("wireguard", "ipip", "ipsec", "extension", "tencent-vpc"))
"""Backends of flannel's that a config may name although this version may lack them."""


def main(argv: list[str]) -> int:
    """Run one of the commands; its exit code."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    parser = Parser(
        prog="flannelpy config", description="The network config that all nodes share.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], what: str, *, etcd: bool) -> Any:
        name = command.__name__.removeprefix("_")
        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(command=command)
        add_output_flag(added)
        if etcd:
            add_etcd_flags(added)
        return added

    add(_get, "The config as it stands in etcd, and what it means.", etcd=True)
    setting = add(_set, "Check a config, show what it changes, and write it to etcd.", etcd=True)
    setting.add_argument("config", metavar="FILE|-|JSON", help="JSON begins with {; - is the standard input")
    add_yes_flags(setting, "the config (0: there is none)")
    validate = add(_validate, "Check a config without etcd. Ends with 0 (valid) or 1.", etcd=False)
    validate.add_argument("config", metavar="FILE|-|JSON")
    explain = add(_explain, "What each key means, what holds now, what a change of it does.", etcd=True)
    explain.add_argument("keys", metavar="KEY", nargs="*", help="such as SubnetLen; without: all")
    explain.add_argument("--file", metavar="FILE|-|JSON", help="explain this config, not that in etcd")
    return parser


# --- looking ---


def _get(options: argparse.Namespace) -> int:
    text, revision = ask_etcd(options, lambda admin: admin.config())
    place = _place(options)
    if text is None:
        if wants_json(options):
            empty = {"key": place, "revision": 0, "text": None, "in_effect": {}, "error": "there is none"}
            print(dump(empty), flush=True)
        raise FlannelpyError(
            f"{place}: there is no config yet; set one: flannelpy config set '{EXAMPLE_CONFIG}'"
        )
    config, problem = read_config(text)
    meaning = {} if config is None else in_effect(config)
    if wants_json(options):
        document = {"key": place, "revision": revision, "text": text}
        print(dump({**document, "in_effect": meaning, "error": problem or None}))
    else:
        print(f"{place}, last change at revision {revision}:\n")
        print("\n".join(map(shown, text.splitlines())))
        if config is not None:
            print("\n" + "\n".join(_meaning(config) + [f"remark: {line}" for line in _remarks(text, config)]))
    if problem:
        raise FlannelpyError(f"{place} cannot be used: {shown(problem)}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    text = _read(options.config)
    try:
        config = _checked(text)
    except FlannelpyError as error:
        if wants_json(options):
            print(dump({"valid": False, "error": str(error), "remarks": [], "in_effect": {}}), flush=True)
        raise
    found = _remarks(text, config)
    if wants_json(options):
        print(dump({"valid": True, "error": None, "remarks": found, "in_effect": in_effect(config)}))
    else:
        print("\n".join(["valid", *_meaning(config), *(f"remark: {line}" for line in found)]))
    return 0


def _explain(options: argparse.Namespace) -> int:
    config, trouble = None, None
    if options.file is not None:
        config = _checked(_read(options.file))
    else:
        try:
            config, _ = read_config(ask_etcd(options, lambda admin: admin.config())[0])
        except StoreError as error:
            trouble = error
    now = {} if config is None else in_effect(config)
    keys = keys_of("vxlan" if config is None else config.backend_type)
    wanted = {name.casefold() for name in options.keys}
    chosen = [key for key in keys if not wanted or wanted & _names(key.name.casefold())]
    if not chosen:
        raise FlannelpyError(f"there is no such key; there are {', '.join(key.name for key in keys)}")
    if wants_json(options):
        print(dump([{**key._asdict(), "now": now.get(key.name)} for key in chosen]), flush=True)
    else:
        for key in chosen:
            value = f"now {shown(now[key.name])}; " if key.name in now else ""
            when = "while daemons run" if key.effect == "live" else "when daemons restart"
            body = [
                f"{key.meaning}",
                f"{value}default {key.default}",
                f"a change counts {when}: {key.on_change}",
            ]
            print("\n".join([key.name, *(_indented(line) for line in body)]), flush=True)
    if trouble is not None:
        raise trouble
    return 0


def _names(key: str) -> set[str]:
    """`backend.vni` may be called `vni`."""
    return {key, key.removeprefix("backend.")}


def _indented(line: str) -> str:
    return textwrap.fill(
        line, _WIDTH, initial_indent="    ", subsequent_indent="      ", break_long_words=False
    )


def _meaning(config: NetworkConfig) -> list[str]:
    """What holds, key by key, and for how many nodes there is room."""
    rows = [(f"  {name}", shown(value)) for name, value in in_effect(config).items() if value != "off"]
    width = max(len(name) for name, _ in rows)
    return [*(f"{name.ljust(width)}  {value}" for name, value in rows), f"room for {_room(config)} nodes"]


def _room(config: NetworkConfig) -> int:
    return min(size for size in pool_size(config) if size)


def _remarks(text: str, config: NetworkConfig) -> list[str]:
    found = [shown(line) for line in remarks(text, config)]
    if not has(config.backend_type):
        found.append(
            f"this version of flannelpy has no backend {shown(config.backend_type)}, only flannel's nodes can"
            " use it, and its keys are not checked: flannelpy daemons that run go on as they are, others wait"
        )
    return found


# --- setting ---


def _set(options: argparse.Namespace) -> int:
    text = _read(options.config)
    after = _checked(text)
    census = ask_etcd(options, lambda admin: admin.census(lifetimes=False))
    check_revision(options.revision, census.config_revision, "the config")
    if census.config_text == text:
        document = {"action": "set", "changes": [], "stranded": [], "unchanged": True, "done": False}
        print(dump(document) if wants_json(options) else "the config is so already: nothing to do")
        return 0
    before, _ = read_config(census.config_text)
    differences = changes(before, after)
    left = stranded(before, after, census.entries)
    place = _place(options)
    plan = Plan(
        [f"{place}, last change at revision {census.config_revision}:", "",
         *_preview(census, differences, left, after),
         *(f"remark: {line}" for line in _remarks(text, after))],
        {
            "action": "set",
            "changes": [_change_json(change) for change in differences],
            "stranded": [entry.key for entry in left],
            "unchanged": False,
        },
        f"write this to {place}?",
        "the config",
        lambda admin: admin.set_config(text, census.config_revision),
        f"{place} is set",
    )  # fmt: skip
    return carry_out(options, plan)


def _preview(
    census: Census, differences: Sequence[Change], left: Sequence[Entry], after: NetworkConfig
) -> list[str]:
    """The difference, when each part counts, and which leases it leaves behind."""
    if census.config_text is None:
        return ["there is none yet; this is what will hold:", *_meaning(after), *_left(census, left, after)]
    if not differences:
        lines = ["the text is another, but nothing changes in effect"]
    else:
        rows = [
            (
                change.key.name,
                *(shown(value, _LONGEST_VALUE) or "-" for value in change[1:]),
                change.key.effect,
            )
            for change in differences
        ]
        lines = table(("KEY", "NOW", "NEW", "COUNTS"), rows)
    effects = dict.fromkeys((change.key.effect, change.key.on_change) for change in differences)
    lines += ["", *(f"- {effect}: {what}" for effect, what in effects)] if effects else []
    return lines + _left(census, left, after)


def _left(census: Census, left: Sequence[Entry], after: NetworkConfig) -> list[str]:
    """The leases that the new config leaves without a place."""
    lines = []
    if left:
        names = ", ".join(entry.key for entry in left[:_SHOWN_LEASES])
        more = f" and {len(left) - _SHOWN_LEASES} more" if len(left) > _SHOWN_LEASES else ""
        lines.append(
            f"- {len(left)} of {len(census.entries)} leases do not fit any more: {names}{more}; their nodes "
            "get other subnets when their daemons restart, their pods must be restarted then"
        )
    if len(census.entries) > _room(after):
        lines.append(
            f"- there are {len(census.entries)} leases, but room for {_room(after)}: some get no subnet"
        )
    return lines


def _change_json(change: Change) -> dict[str, str]:
    return {
        "key": change.key.name,
        "before": change.before,
        "after": change.after,
        "effect": change.key.effect,
        "on_change": change.key.on_change,
    }


# --- a config from outside ---


def _read(source: str) -> str:
    """The text of FILE, - or JSON; FlannelpyError."""
    if source.lstrip().startswith("{"):
        return source.strip()
    name = "the standard input" if source == "-" else shown(source, 200)
    try:
        if source == "-":
            data = sys.stdin.buffer.read(4 * MAX_CHARACTERS + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(4 * MAX_CHARACTERS + 1)
        return data.decode().strip()
    except OSError as error:
        raise FlannelpyError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise FlannelpyError(f"cannot read {name}: it is no text in UTF-8") from None


def _checked(text: str) -> NetworkConfig:
    """A config that can be served; FlannelpyError with the key, the value and the rule.

    By this version, or, in a cluster of both, by flannel: whoever sets it is told.
    """
    try:
        config = parse_config(text)
        if config.backend_type not in _FLANNELS or has(config.backend_type):
            load(config)
    except (ConfigError, LookupError) as error:
        raise FlannelpyError(f"the config is not valid: {shown(str(error))}") from None
    return config


def _place(options: argparse.Namespace) -> str:
    return f"{etcd_settings(options).etcd_prefix}/config"
