"""`flannelpy status`: how the daemon on this host is. Without one it tells what an earlier one left."""

import shutil
import sys
import time
from argparse import Namespace
from typing import Any

from flannelpy import control
from flannelpy.cli.admin import Parser, add_output_flag, dump, shown, table, wants_json
from flannelpy.errors import FlannelpyError
from flannelpy.flags import FLAGS

DEGRADED, NOT_READY, NO_DAEMON = 10, 11, 12
"""Exit codes; 0 is ready."""

_CODES = {"ready": 0, "degraded": DEGRADED, "not ready": NOT_READY}
_MARKS = {"faults": "X", "flaws": "!"}
_WATCH_SECONDS = 2.0
_CLEAR = "\x1b[H\x1b[2J"


def main(argv: list[str]) -> int:
    """Show it once, or again and again with --watch; the exit code says how the node is."""
    parser = Parser(
        prog="flannelpy status",
        allow_abbrev=False,
        description="How the daemon on this host is: what is wrong comes first. Exit code 0: ready, "
        f"{DEGRADED}: ready, but something is wrong, {NOT_READY}: not ready, {NO_DAEMON}: no daemon answers.",
    )
    parser.add_argument("--watch", action="store_true", help="show it again every two seconds, until Ctrl-C")
    parser.add_argument("--peers", action="store_true", help="every peer, not only those with a trouble")
    parser.add_argument(
        "--subnet-file",
        default=FLAGS["subnet-file"].default,
        help="the daemon's, its socket lies beside it (default: %(default)s)",
    )
    add_output_flag(parser)
    options = parser.parse_args(argv)
    while True:
        text, code = _look(options)
        clear = _CLEAR if options.watch and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if not options.watch:
            return code
        time.sleep(_WATCH_SECONDS)


def _look(options: Namespace) -> tuple[str, int]:
    path = control.path_for(options.subnet_file)
    try:
        found = control.ask(path, "status")
        peers = control.ask(path, "peers") if options.peers else None
    except FlannelpyError as error:
        return _without_daemon(options, str(error))
    if wants_json(options):
        return dump({**found, **({} if peers is None else {"all_peers": peers})}), _CODES[found["state"]]
    return "\n".join(lines(found, peers, time.time())), _CODES[found["state"]]


def _without_daemon(options: Namespace, reason: str) -> tuple[str, int]:
    """What is in the kernel and in subnet.env; a host that never had a daemon has nothing."""
    from flannelpy.daemon import clean_up

    objects = clean_up(options.subnet_file, remove=False).objects
    if wants_json(options):
        return dump({"state": "no daemon", "faults": [reason], "objects": objects}), NO_DAEMON
    left = f"{len(objects)} objects of an earlier one are still here, packets may flow:" if objects else (
        "nothing of flannelpy's is on this host"
    )  # fmt: skip
    width = _width()
    return "\n".join(
        [
            "flannelpy: no daemon",
            f"  X {reason}",
            left,
            *(f"    {shown(one, width - 4)}" for one in objects[:20]),
            *([f"    and {len(objects) - 20} more; `flannelpy cleanup` lists them"] if objects[20:] else []),
        ]
    ), NO_DAEMON


# --- text ---


def lines(found: dict[str, Any], peers: list[dict[str, Any]] | None, now: float) -> list[str]:
    """The document of `status` for a terminal; `now` in seconds since 1970."""
    width = _width()
    rows = [f"flannelpy {found['version']}: {found['state']}, started {ago(now - found['started'])}"]
    if found["lease"] is None:
        rows.append(f"  {shown(found['summary'], width - 2)}")
    for kind, mark in _MARKS.items():
        rows += [f"  {mark} {shown(one)}" for one in found[kind]]
    rows.append("")
    rows += [f"{name:10}{shown(text, width - 10)}" for name, text in _facts(found, now)]
    listed = peers if peers is not None else (found["peers"] or {}).get("troubled", [])
    if listed:
        rows += ["", *_peer_table(listed)]
    return rows


def _facts(found: dict[str, Any], now: float) -> list[tuple[str, str]]:
    facts = []
    uplink, network, lease = found["uplink"], found["network"], found["lease"]
    if uplink:
        facts.append(("uplink", f"{uplink['name']} ({', '.join(uplink['addresses'])}), MTU {uplink['mtu']}"))
    if network:
        on = f" on {', '.join(network['devices'])}" if network["devices"] else ""
        sizes = " and ".join(map(str, network["pool"]))
        what = f"{network['backend']}{on}, MTU {network['mtu']}, {sizes} subnets"
        facts.append(("network", f"{', '.join(network['networks'])}: {what}"))
    if lease:
        left = f", expires in {span(lease['expires'] - now)} unless renewed" if lease["expires"] else ""
        facts.append(("lease", f"{', '.join(lease['subnets'])}{left}"))
    silent = f"does not answer for {span(now - found['store']['since'])}" if found["store"]["trouble"] else ""
    facts.append(("store", silent or "answers"))
    if found["peers"]:
        facts.append(("peers", _peer_counts(found["peers"])))
    facts.append(("repairs", _repairs(found["repairs"], now)))
    if found["strangers"]:
        most = sorted(found["strangers"].items(), key=lambda one: -one[1])[:3]
        facts.append(("strangers", ", ".join(f"{ip} sent {count} packet(s)" for ip, count in most)))
    return facts


def _peer_counts(peers: dict[str, Any]) -> str:
    words = [f"{peers['programmed']} programmed of {peers['leases']}"]
    kinds = ("missing", "unreached", "refused", "held", "unreadable")
    words += [f"{peers[kind]} {kind}" for kind in kinds if peers[kind]]
    return ", ".join(words)


def _repairs(repairs: dict[str, Any], now: float) -> str:
    last = repairs["last"]
    if not last:
        return "none since the start"
    return (
        f"{repairs['count']} since the start; the last one {ago(now - last['at'])}, in"
        f" {last['seconds'] * 1000:.0f} ms: {last['what']} ({last['cause']})"
    )


def _peer_table(peers: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            shown(", ".join(one["subnets"]) or one["key"], 44),
            ", ".join(one["public_ips"]) or "-",
            one["state"],
            _milliseconds(one["rtt"]),
            _milliseconds(one["underlay_rtt"]),
            shown(one["reason"] or "", 80),
        )
        for one in peers
    ]
    return table(("PEER", "PUBLIC IP", "STATE", "RTT", "UNDERLAY", "WHY"), rows)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def ago(seconds: float) -> str:
    """In words, as `3 min ago`."""
    return f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """In words, as `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days"


def _width() -> int:
    return max(60, shutil.get_terminal_size((110, 0)).columns) if sys.stdout.isatty() else 10_000
