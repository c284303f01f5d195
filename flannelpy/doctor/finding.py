"""What a check says: what is so, why it matters, and the command that mends it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from flannelpy.model.census import SEVERITIES, Severity


class Finding(NamedTuple):
    """One thing that is wrong, or worth knowing. `check` is a word for programs: "fdb", "path-mtu", ..."""

    severity: Severity
    check: str
    what: str
    why: str
    remedy: str


def in_order(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, else as they were found; none twice."""
    return tuple(sorted(dict.fromkeys(found), key=lambda one: SEVERITIES.index(one.severity)))


def error(check: str, what: str, why: str, remedy: str) -> Finding:
    """Packets are lost, or will be."""
    return Finding("error", check, what, why, remedy)


def warning(check: str, what: str, why: str, remedy: str) -> Finding:
    """It works, for now or not well."""
    return Finding("warning", check, what, why, remedy)


def note(check: str, what: str, why: str, remedy: str) -> Finding:
    """Nothing is wrong; it could be better."""
    return Finding("note", check, what, why, remedy)


def as_json(finding: Finding) -> dict[str, Any]:
    """For programs."""
    return finding._asdict()
