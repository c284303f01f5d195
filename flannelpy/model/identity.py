"""Which machine a record is from: told beside it, so that two machines with one address can be named.

A cloned machine has the original's public IP, host name, even its VTEP MAC; what it tells the store may be
byte for byte the same. Its process is another one.
"""

import json
from typing import NamedTuple

from flannelpy.model.config import decode_json

_LONGEST = 80


class Identity(NamedTuple):
    """One daemon on one machine."""

    host: str
    """The host's name."""
    boot: str
    """Another one after each boot of the machine."""
    process: str
    """Another one for each start of the daemon."""
    since: int
    """When the machine booted, seconds since 1970: of two that quarrel the one that was here first stays."""
    started: int
    """When the daemon started, milliseconds since 1970: two containers share the machine's boot."""
    uplink: str = ""
    """The uplink and its address."""

    def __str__(self) -> str:
        return f"host {self.host or '(no name)'}, uplink {self.uplink or 'unknown'} (boot {self.boot[:8]})"

    def outranks(self, other: "Identity") -> bool:
        """Whether we stay and the other gives way."""
        ours, theirs = ((one.since, one.boot, one.started, one.process) for one in (self, other))
        return ours < theirs

    def is_later_than(self, other: "Identity") -> bool:
        """Whether this was seen to live after the other's boot: then it is no earlier life of that machine.

        By the clocks of both.
        """
        return max(self.since, self.started / 1000) > other.since


def render(identity: Identity) -> str:
    """One line of JSON."""
    return json.dumps(identity._asdict(), separators=(",", ":"))


def parse(text: str) -> Identity | None:
    """The reverse; None for anything else: it is foreign data, and only a courtesy."""
    try:
        values = decode_json(text)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    texts = [values.get(key) for key in ("host", "boot", "process", "uplink")]
    since, started = values.get("since"), values.get("started")
    if type(since) is not int or type(started) is not int:
        return None
    if not all(type(one) is str and one.isprintable() for one in texts):
        return None
    host, boot, process, uplink = (str(one)[:_LONGEST] for one in texts)
    return Identity(host, boot, process, since, started, uplink)
