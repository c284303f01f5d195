"""What `flannelpy lease` prints: tables, single leases, what a change does to traffic. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flannelpy.cli.admin import dump, shown, table
from flannelpy.model.address import Prefix, format_address
from flannelpy.model.census import SEVERITIES, Census, Entry, Finding, PoolUse, worst
from flannelpy.model.identity import Identity
from flannelpy.model.reservation import holder
from flannelpy.store import TTL_SECONDS

ByKey: TypeAlias = Mapping[str, Sequence[Finding]]

_HEAD = ("  SUBNET", "PUBLIC IP", "BACKEND", "EXPIRES IN", "NOTE")
_LONGEST_CELL = 24
_LEAST_NOTE = 12
_LONGEST_VALUE = 2000


def by_key(findings: Iterable[Finding]) -> ByKey:
    """The findings about each record."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        for key in finding.keys:
            found[key].append(finding)
    return found


# --- list ---


def listing(entries: Sequence[Entry], findings: ByKey, width: int | None) -> list[str]:
    """A table: what is wrong first and marked, then in the order of the subnets. `width` clips the note."""
    rows = []
    for entry in sorted(entries, key=lambda entry: _order(entry, findings)):
        rows += _rows(entry, findings.get(entry.key, ()))
    if width is not None:
        used = sum(max(len(row[i]) for row in (_HEAD, *rows)) + 2 for i in range(len(_HEAD) - 1))
        room = max(width - used, _LEAST_NOTE)
        rows = [(*row[:-1], shown(row[-1], room)) for row in rows]
    return table(_HEAD, rows)


def _order(entry: Entry, findings: ByKey) -> tuple[Any, ...]:
    severity = worst(findings.get(entry.key, ()))
    rank = SEVERITIES.index(severity) if severity in ("error", "warning") else len(SEVERITIES)
    first = [(subnet.first, subnet.length) for subnet in entry.subnets if subnet is not None]
    return rank, not first, first, entry.key


def _rows(entry: Entry, found: Sequence[Finding]) -> list[tuple[str, ...]]:
    """One row, or two for a dual-stack lease."""
    mark = "! " if worst(found) in ("error", "warning") else "  "
    note = ", ".join(dict.fromkeys(_short(finding) for finding in found))
    ips = (None, None) if entry.lease is None else entry.lease.attrs[:2]
    backend = "" if entry.lease is None else shown(entry.lease.attrs.backend_type, 12) or "-"
    halves = [
        (str(subnet), "-" if ip is None else format_address(ip))
        for subnet, ip in zip(entry.subnets, ips, strict=True)
        if subnet is not None
    ] or [(shown(entry.key, _LONGEST_CELL), "-")]
    (subnet, ip), *rest = halves
    return [
        (mark + subnet, ip, backend or "?", lifetime(entry), note),
        *(("  " + subnet, ip, "", "", "") for subnet, ip in rest),
    ]


def _short(finding: Finding) -> str:
    return "reserved" if finding.kind == "reservation" else finding.kind.replace("-", " ")


def lifetime(entry: Entry) -> str:
    """`22 h 13 min`, `never`, or `?` if it is not known."""
    if not entry.etcd_lease_id:
        return "never"
    return "?" if entry.seconds_left is None else duration(entry.seconds_left)


def duration(seconds: int) -> str:
    """For people, in two units at most."""
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def summary(census: Census, uses: Sequence[PoolUse], findings: Sequence[Finding]) -> list[str]:
    """How many there are, how full it is, what is wrong."""
    reserved = sum(entry.is_reservation for entry in census.entries)
    unreadable = sum(entry.lease is None for entry in census.entries)
    all_of_them = _count(len(census.entries), "record")
    lines = [f"{all_of_them}, of these {_count(reserved, 'reservation')} and {unreadable} unreadable"]
    lines += [
        f"{use.pool.network}: {use.taken} of {_count(use.pool.size, 'subnet')} taken ({use.percent} %), "
        f"{use.free} free"
        for use in uses
    ]
    errors, warnings = (
        sum(finding.severity == severity for finding in findings) for severity in ("error", "warning")
    )
    if errors or warnings:
        lines.append(
            f"{_count(errors, 'error')} and {_count(warnings, 'warning')}: see flannelpy lease check"
        )
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- show ---


def details(
    entry: Entry, findings: Sequence[Finding], place: str, writer: Identity | None = None
) -> list[str]:
    """Everything about one record; `place` is what stands before its key in etcd."""
    rows: list[tuple[str, str]] = [("subnet", str(subnet)) for subnet in entry.subnets if subnet is not None]
    if entry.lease is not None:
        attrs = entry.lease.attrs
        rows.append(("public IP", holder(entry)))
        rows.append(("backend", shown(attrs.backend_type) or "not named"))
        for name, data in (("data", attrs.backend_data), ("data IPv6", attrs.backend_v6_data)):
            if data is not None:
                rows.append((name, dump(data)))
    if writer is not None:
        rows.append(("written by", shown(str(writer))))
    rows.append(("expires", _expiry(entry)))
    rows.append(("key", shown(place + entry.key)))
    grant = f"etcd lease {entry.etcd_lease_id:x}" if entry.etcd_lease_id else "no etcd lease"
    rows.append(("etcd", f"created at revision {entry.created}, last change {entry.revision}, {grant}"))
    rows.append(("value", shown(entry.value.decode("utf-8", "backslashreplace"), _LONGEST_VALUE)))
    rows += [(finding.severity, shown(finding.text)) for finding in findings]
    return [shown(entry.key), *(f"  {name:10} {text}" for name, text in rows)]


def _expiry(entry: Entry) -> str:
    if not entry.etcd_lease_id:
        return "never: it is a reservation" if entry.is_reservation else "never"
    if entry.seconds_left is None:
        return "not known"
    text = f"in {lifetime(entry)}"
    if 0 < entry.seconds_left <= TTL_SECONDS:
        text += f"; renewed {duration(TTL_SECONDS - entry.seconds_left)} ago if its term is 24 hours"
    return text


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """One line each, with the records that it is about."""
    return [
        f"{finding.severity}: {finding.kind}: {', '.join(map(shown, finding.keys[:4]))}"
        f"{'...' if len(finding.keys) > 4 else ''}{': ' if finding.keys else ''}{shown(finding.text)}"
        for finding in findings
    ]


# --- what a change does ---


def after_release(entry: Entry) -> list[str]:
    """What happens to traffic when a record is deleted, one line each."""
    if entry.subnets == (None, None):
        return ["no node uses it: traffic is not touched"]
    subnets = " and ".join(str(subnet) for subnet in entry.subnets if subnet is not None)
    lines = [f"all peers remove their routes to {subnets} at once: packets to the pods there are lost"]
    if entry.lease is None:
        return [*lines, "its node, if it runs, takes the same subnet again or another one"]
    lines.append(
        "if its node runs flannelpy, it takes the same subnet back within seconds, or another one if somebody"
        " was faster; a flannel daemon ends, and does the same when it is started again"
    )
    lines.append("if its node is gone, the subnet is free for others")
    if entry.is_reservation:
        lines.append("it is a reservation: the subnet is no longer kept for its node")
    elif entry.seconds_left is not None and entry.seconds_left > 0:
        lines.append(f"without this it would end in {duration(entry.seconds_left)} if its node is gone")
    return lines


def after_reserve(subnets: Iterable[Prefix | None], whom: str) -> list[str]:
    """What a new reservation does."""
    shown_subnets = " and ".join(str(subnet) for subnet in subnets if subnet is not None)
    if whom == "nobody":
        return [f"no node gets {shown_subnets} until it is unreserved"]
    return [
        f"only the node with the public IP {whom} gets {shown_subnets}, when its daemon starts",
        "a flannel daemon turns it into an ordinary lease then, flannelpy keeps it a reservation",
    ]


def after_keep(entry: Entry) -> list[str]:
    """What it does to turn a lease into a reservation."""
    return [
        f"it is kept for {holder(entry)} without an end; its value stays, traffic is not touched",
        "a flannel daemon turns it into an ordinary lease with its next renewal, flannelpy does not",
    ]


def after_unreserve(*, in_use: bool) -> list[str]:
    """What it does to end a reservation."""
    if not in_use:
        return ["no node has taken it: it is deleted, and the subnet is free at once"]
    return [
        "it becomes a lease of 24 hours with the same value: traffic is not touched",
        "its node renews it if it runs; if it is gone, the subnet is free in 24 hours",
    ]


def as_json(entry: Entry, findings: Sequence[Finding]) -> dict[str, Any]:
    """A record for programs; its shape is in docs/reference.md."""
    attrs = None if entry.lease is None else entry.lease.attrs
    subnet, subnet6 = (None if subnet is None else str(subnet) for subnet in entry.subnets)
    ips = (None, None) if attrs is None else attrs[:2]
    public_ip, public_ipv6 = (None if ip is None else format_address(ip) for ip in ips)
    return {
        "key": entry.key,
        "subnet": subnet,
        "subnet6": subnet6,
        "public_ip": public_ip,
        "public_ipv6": public_ipv6,
        "backend_type": None if attrs is None else attrs.backend_type,
        "backend_data": None if attrs is None else attrs.backend_data,
        "backend_v6_data": None if attrs is None else attrs.backend_v6_data,
        "reservation": entry.is_reservation,
        "expires_in": entry.seconds_left,
        "created_revision": entry.created,
        "revision": entry.revision,
        "etcd_lease": f"{entry.etcd_lease_id:x}" if entry.etcd_lease_id else None,
        "unreadable": entry.problem or None,
        "findings": [finding.kind for finding in findings],
    }


def pool_json(use: PoolUse) -> dict[str, Any]:
    """A pool for programs."""
    return {
        "network": str(use.pool.network),
        "subnet_len": use.pool.length,
        "first": format_address(use.pool.low),
        "last": format_address(use.pool.high),
        "size": use.pool.size,
        "taken": use.taken,
        "free": use.free,
    }
