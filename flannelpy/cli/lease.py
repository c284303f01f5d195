"""`flannelpy lease`: what operators do with the leases in etcd. Each change is shown before, and compared.

A new command is a function here and a few lines in `_parser`.
"""

import argparse
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from flannelpy import control
from flannelpy.cli import lease_text as text
from flannelpy.cli.admin import (
    Admin,
    Parser,
    Plan,
    add_etcd_flags,
    add_output_flag,
    add_yes_flags,
    ask_etcd,
    carry_out,
    check_revision,
    confirmed,
    dump,
    etcd_settings,
    read_config,
    shown,
    wants_json,
)
from flannelpy.errors import ChangedError, FlannelpyError
from flannelpy.flags import FLAGS
from flannelpy.model import identity, reservation
from flannelpy.model.address import Address, Prefix, parse_address, parse_prefix
from flannelpy.model.census import (
    Census,
    Entry,
    Finding,
    PoolUse,
    findings,
    matching,
    pool_use,
    worst,
)
from flannelpy.model.config import NetworkConfig
from flannelpy.model.identity import Identity
from flannelpy.model.subnet import encode_attrs, parse_key

WARNINGS_FOUND = 10
ERRORS_FOUND = 11
"""Exit codes of `lease check`."""

_LEASE = "KEY|IP|SUBNET"
_MOST_SIGNATURES = 20
"""A request each: of so many leases `show` tells who wrote them."""
_TRIES = 5
"""How often a reservation is tried while other nodes write their leases."""


class _Look(NamedTuple):
    """A census, judged."""

    census: Census
    config: NetworkConfig | None
    found: tuple[Finding, ...]
    uses: tuple[PoolUse, ...]


def main(argv: list[str]) -> int:
    """Run one of the commands; its exit code."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    parser = Parser(
        prog="flannelpy lease",
        description="The leases of a network in etcd. Every command takes the etcd flags and --output.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        name = command.__name__.removeprefix("_")
        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(command=command)
        add_output_flag(added)
        add_etcd_flags(added)
        return added

    add(_list, "All leases, what is wrong first, and how full the pool is.")
    add(_show, "Everything about a lease.").add_argument("lease", metavar=_LEASE)
    codes = f"0 (nothing), {WARNINGS_FOUND} (warnings) or {ERRORS_FOUND} (errors)"
    add(_check, f"Look for what is wrong. Ends with {codes}.")
    release = add(_release, "Delete a lease, a reservation or an unreadable key.")
    release.add_argument("lease", metavar=_LEASE)
    add_yes_flags(release, "the lease")
    reserve = add(
        _reserve,
        "Keep a subnet for the node with a public IP, or, without one, free of everybody. "
        "A subnet that is leased is kept for the node that has it.",
    )
    reserve.add_argument("subnets", metavar="SUBNET", nargs="+", help="one; in dual stack one of each family")
    reserve.add_argument("--public-ip", metavar="IP", action="append", default=[], help="repeatable")
    add_yes_flags(reserve, "the lease that is kept")
    unreserve = add(
        _unreserve,
        "End a reservation. One that its node has taken becomes a lease of 24 hours: traffic is not touched.",
    )
    unreserve.add_argument("lease", metavar=_LEASE)
    add_yes_flags(unreserve, "the reservation")
    what = (
        "After etcd was restored or replaced: let those peers go that have not written a lease since. "
        "Talks to the daemon on this host; each node decides for itself."
    )
    confirm = commands.add_parser("confirm", help=what, description=what, allow_abbrev=False)
    confirm.set_defaults(command=_confirm)
    add_output_flag(confirm)
    confirm.add_argument("--yes", action="store_true", help="do it without asking")
    flag = FLAGS["subnet-file"]
    confirm.add_argument(
        "--subnet-file", default=flag.default, metavar="FILE", help="the daemon's (default: %(default)s)"
    )
    return parser


# --- looking ---


def _look(options: argparse.Namespace) -> _Look:
    return _judged(ask_etcd(options, lambda admin: admin.census(lifetimes=True)))


def _judged(census: Census) -> _Look:
    config, reason = read_config(census.config_text)
    found = findings(config, census)
    if reason:
        found = (Finding("error", "config", (), f"{reason}; no node can start"), *found)
    return _Look(census, config, found, () if config is None else pool_use(config, census.entries))


def _list(options: argparse.Namespace) -> int:
    look = _look(options)
    about = text.by_key(look.found)
    entries = look.census.entries
    if wants_json(options):
        records = [text.as_json(entry, about.get(entry.key, ())) for entry in entries]
        pools = [text.pool_json(use) for use in look.uses]
        print(dump({"revision": look.census.revision, "leases": records, "pools": pools}))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if entries:
        print("\n".join([*text.listing(entries, about, width), ""]))
    print("\n".join(text.summary(look.census, look.uses, look.found)))
    return 0


def _show(options: argparse.Namespace) -> int:
    async def read(admin: Admin) -> tuple[Census, list[Entry], list[Identity | None]]:
        census = await admin.census(lifetimes=True)
        entries = _matching(census, options.lease)
        signed = [await admin.signature(entry) for entry in entries[:_MOST_SIGNATURES]]
        signed += [None] * (len(entries) - len(signed))
        return census, entries, [identity.parse(one or "") for one in signed]

    census, entries, writers = ask_etcd(options, read)
    look = _judged(census)
    about = text.by_key(look.found)
    place = f"{etcd_settings(options).etcd_prefix}/subnets/"
    if wants_json(options):
        documents = [
            {
                **text.as_json(entry, about.get(entry.key, ())),
                "etcd_key": place + entry.key,
                "value": entry.value.decode("utf-8", "backslashreplace"),
                "written_by": None if writer is None else writer._asdict(),
                "texts": [finding.text for finding in about.get(entry.key, ())],
            }
            for entry, writer in zip(entries, writers, strict=True)
        ]
        print(dump({"revision": look.census.revision, "leases": documents}))
    else:
        parts = [
            "\n".join(text.details(entry, about.get(entry.key, ()), place, writer))
            for entry, writer in zip(entries, writers, strict=True)
        ]
        print("\n\n".join(parts))
    return 0


def _check(options: argparse.Namespace) -> int:
    look = _look(options)
    severity = worst(look.found)
    code = {"error": ERRORS_FOUND, "warning": WARNINGS_FOUND}.get(severity or "", 0)
    if wants_json(options):
        document = {
            "revision": look.census.revision,
            "worst": severity,
            "findings": [finding._asdict() for finding in look.found],
            "records": len(look.census.entries),
            "pools": [text.pool_json(use) for use in look.uses],
        }
        print(dump(document))
        return code
    lines = text.finding_lines(look.found)
    if code == 0:
        lines.append("nothing is wrong")
    print("\n".join([*lines, *text.summary(look.census, look.uses, ())]))
    return code


def _matching(census: Census, wanted: str) -> list[Entry]:
    """The records that a user means; FlannelpyError if there are none."""
    found = matching(census.entries, wanted)
    if not found:
        for read in (_subnet, parse_address, _subnet_of_key):
            try:
                found = matching(census.entries, read(wanted))
                break
            except ValueError:
                continue
    if not found:
        raise FlannelpyError(
            f"there is no lease {shown(wanted, 64)!r}: give a key such as 10.5.52.0-24, a subnet, or the "
            "public IP of a node; flannelpy lease list shows all"
        )
    return found


def _subnet(given: str) -> Prefix:
    return parse_prefix(given).network()


def _subnet_of_key(given: str) -> Prefix:
    """A key that is not there as it stands, but perhaps spelled another way."""
    subnet, subnet6 = parse_key(given)
    found = subnet or subnet6
    if found is None:
        raise ValueError(given)
    return found


# --- changing ---


def _chosen(options: argparse.Namespace) -> tuple[_Look, Entry]:
    """The one record that is meant, as it is now; errors if it is not one, or not as it was shown."""
    look = _look(options)
    found = _matching(look.census, options.lease)
    if len(found) > 1:
        keys = ", ".join(shown(entry.key) for entry in found[:5])
        raise FlannelpyError(f"{len(found)} leases match, name one by its key: {keys}")
    check_revision(options.revision, found[0].revision, shown(found[0].key))
    return look, found[0]


def _plan(
    options: argparse.Namespace,
    look: _Look,
    entry: Entry,
    effects: Sequence[str],
    write: Callable[[Admin], Awaitable[bool]],
    words: tuple[str, str],
) -> Plan:
    """A change of a record; `words` are "release", "released"."""
    about = text.by_key(look.found).get(entry.key, ())
    place = f"{etcd_settings(options).etcd_prefix}/subnets/"
    preview = [*text.details(entry, about, place), "", *(f"- {line}" for line in effects)]
    return Plan(
        preview,
        {"action": words[0], "lease": text.as_json(entry, about), "effects": list(effects)},
        f"{words[0]} {shown(entry.key)}?",
        shown(entry.key),
        write,
        f"{words[1]} {shown(entry.key)}",
    )


def _release(options: argparse.Namespace) -> int:
    look, entry = _chosen(options)
    effects = text.after_release(entry)
    plan = _plan(options, look, entry, effects, lambda admin: admin.remove(entry), ("release", "released"))
    return carry_out(options, plan)


def _unreserve(options: argparse.Namespace) -> int:
    look, entry = _chosen(options)
    if not entry.is_reservation:
        raise FlannelpyError(
            f"{shown(entry.key)} is no reservation: it is a lease that ends in {text.lifetime(entry)} unless "
            "its node renews it; flannelpy lease release ends it now"
        )
    in_use = reservation.is_in_use(look.config, entry)

    async def write(admin: Admin) -> bool:
        return await (admin.let_expire(entry) if in_use else admin.remove(entry))

    effects = text.after_unreserve(in_use=in_use)
    return carry_out(options, _plan(options, look, entry, effects, write, ("unreserve", "unreserved")))


def _reserve(options: argparse.Namespace) -> int:
    try:
        subnets = reservation.pair([parse_prefix(given) for given in options.subnets])
        addresses = [parse_address(given) for given in options.public_ip]
    except ValueError as error:
        raise FlannelpyError(f"cannot reserve: {error}") from None
    look = _look(options)
    if look.config is None:
        raise FlannelpyError(f"cannot reserve: {read_config(look.census.config_text)[1]}")
    decide = partial(_decide, subnets=subnets, addresses=addresses)
    decision = decide(look.census)
    if isinstance(decision, reservation.Keep):
        entry = decision.entry
        check_revision(options.revision, entry.revision, shown(entry.key))
        effects = text.after_keep(entry)
        words = ("reserve", "reserved")
        return carry_out(
            options, _plan(options, look, entry, effects, lambda admin: admin.keep(entry), words)
        )
    check_revision(options.revision, 0, decision.lease.key)
    return carry_out(options, _reservation_plan(options, look, decision, decide))


def _decide(
    census: Census, *, subnets: tuple[Prefix | None, Prefix | None], addresses: Sequence[Address]
) -> reservation.Reserving:
    config, reason = read_config(census.config_text)
    if config is None:
        raise FlannelpyError(f"cannot reserve: {reason}")
    try:
        return reservation.reserve(config, census.entries, subnets, addresses)
    except ValueError as error:
        raise FlannelpyError(f"cannot reserve: {shown(str(error))}") from None


def _reservation_plan(
    options: argparse.Namespace,
    look: _Look,
    decision: reservation.Make,
    decide: Callable[[Census], reservation.Reserving],
) -> Plan:
    lease = decision.lease
    value = encode_attrs(lease.attrs)
    entry = Entry(lease.key, b"", value.encode(), lease[1:3], lease, "", 0, 0, 0, None)
    effects = text.after_reserve(entry.subnets, reservation.holder(entry))
    key = f"{etcd_settings(options).etcd_prefix}/subnets/{lease.key}"

    async def write(admin: Admin) -> bool:
        """Other records may come meanwhile: as long as none is in the way, that is no reason to give up."""
        revision = look.census.revision
        for _ in range(_TRIES):
            if await admin.reserve(lease, revision):
                return True
            census = await admin.census(lifetimes=False)
            revision = census.revision
            if decide(census) != decision:
                raise ChangedError(
                    f"{lease.key} was leased by somebody else in the meantime: nothing is done"
                )
        return False

    return Plan(
        [f"new: {key}", f"     {value}", "", *(f"- {line}" for line in effects)],
        {"action": "reserve", "lease": text.as_json(entry, ()), "effects": effects},
        f"reserve {lease.key}?",
        "the network",
        write,
        f"reserved {lease.key} for {reservation.holder(entry)}",
    )


# --- the daemon on this host ---


def _confirm(options: argparse.Namespace) -> int:
    """End the hold of peers that the store's new history does not have."""
    daemon = control.path_for(options.subnet_file)
    held: list[str] = control.ask(daemon, "held")
    json_wanted = wants_json(options)
    if held and not json_wanted:
        print(f"{len(held)} peers are held although etcd has no lease of theirs:")
        print("\n".join(f"  {shown(key)}" for key in held))
        print("- this node's routes to them are removed; who is alive comes back with its own lease")
    if held:
        confirmed(f"let {len(held)} peers go?", yes=options.yes)
        control.ask(daemon, "confirm")
    if json_wanted:
        print(dump({"action": "confirm", "peers": held, "done": True}))
    else:
        print(f"let {len(held)} peers go" if held else "no peer is held: nothing to confirm")
    return 0
