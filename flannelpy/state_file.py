"""What a node remembers over a reboot: its lease, the peers and how far into the store's history it had seen.

With it a node can begin to forward packets while the store is away. It is a copy, never a claim: what the
store says replaces it, and a lease is used only as long as the store would have kept it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from flannelpy.files import read_regular, replace
from flannelpy.model.address import parse_prefix
from flannelpy.model.config import NetworkConfig, parse_config
from flannelpy.model.lease import Lease
from flannelpy.model.leases import Held
from flannelpy.model.subnet import decode_attrs, encode_attrs, parse_key
from flannelpy.store import TTL_SECONDS, Head

_VERSION = 1
_LARGEST = 64 << 20
"""Bytes; 10,000 peers take 2.5 MB."""


class Origin(NamedTuple):
    """Which network of which store."""

    prefix: str
    """--etcd-prefix."""
    endpoints: tuple[str, ...]
    """--etcd-endpoints."""

    def is_same(self, other: "Origin") -> bool:
        """The same network; of several endpoints some may have been replaced."""
        return self.prefix == other.prefix and not {*self.endpoints}.isdisjoint(other.endpoints)


class Memory(NamedTuple):
    """One node's memory of one network."""

    origin: Origin
    config_text: str
    config: NetworkConfig
    own: Lease
    expires: float
    """When the store forgets our lease unless it is renewed, seconds since 1970."""
    saved: float
    head: Head
    peers: tuple[Lease, ...]
    held: tuple[Held, ...]
    """Peers without a record since the store began a new history,"""
    began: int
    """which it did at this revision."""

    def is_valid_at(self, now: float) -> bool:
        """Whether the lease still lasts; never by a clock that went back.

        Nor by one that was ahead when the lease was written, and was put right before this was saved.
        """
        return self.saved <= now < min(self.expires, self.saved + TTL_SECONDS)


def path_for(folder: str, prefix: str) -> Path:
    """Where the memory of this network is kept."""
    return Path(folder, f"{quote(prefix.strip('/') or 'network', safe='')}.json")


def render(memory: Memory) -> str:
    """The file's text: JSON, one lease a line."""
    head = {
        "version": _VERSION,
        "prefix": memory.origin.prefix,
        "endpoints": memory.origin.endpoints,
        "config": memory.config_text,
        "expires": memory.expires,
        "saved": memory.saved,
        "head": memory.head,
        "began": memory.began,
    }
    records = [
        *(_record(lease) for lease in (memory.own, *memory.peers)),
        *({**_record(one.lease), "held": one.stale} for one in memory.held),
    ]
    lines = ",\n".join(map(json.dumps, records))
    return f'{json.dumps(head)[:-1]}, "leases": [\n{lines}\n]}}\n'


def parse(text: str) -> Memory:
    """The reverse; ValueError for anything that `render` would not have written."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    try:
        own, *others = values["leases"]
        endpoints = tuple(str(one) for one in values["endpoints"])
        head = Head(*(int(number) for number in values["head"]))
        config_text = str(values["config"])
        return Memory(
            Origin(str(values["prefix"]), endpoints),
            config_text,
            parse_config(config_text),
            _lease(own),
            float(values["expires"]),
            float(values["saved"]),
            head,
            tuple(_lease(record) for record in others if "held" not in record),
            tuple(Held(_lease(record), int(record["held"])) for record in others if "held" in record),
            int(values["began"]),
        )
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it has no usable {error}") from None


def read(path: Path) -> tuple[Memory | None, str | None]:
    """(the memory, None), (None, None) if there is none, or (None, why it is not used)."""
    try:
        return parse(read_regular(path, _LARGEST).decode()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        return None, f"{path} is not used: {reason}"


def write(path: Path, memory: Memory) -> None:
    """Replace the file in one step. Raises OSError."""
    replace(path, render(memory), 0o600)


def _record(lease: Lease) -> dict[str, Any]:
    # An etcd key is the subnets; a Kubernetes node's name is not.
    return {
        **({} if _has_key_of(lease) else {"subnets": [str(subnet) for subnet in lease.subnets()]}),
        "key": lease.key,
        "value": encode_attrs(lease.attrs),
        "created": lease.created,
        "revision": lease.revision,
        "etcd_lease": lease.etcd_lease_id,
    }


def _has_key_of(lease: Lease) -> bool:
    try:
        return parse_key(lease.key) == (lease.subnet, lease.subnet6)
    except ValueError:
        return False


def _lease(record: Any) -> Lease:
    if "subnets" in record:
        found = {prefix.bits: prefix for prefix in map(parse_prefix, record["subnets"])}
        subnet, subnet6 = found.get(32), found.get(128)
    else:
        subnet, subnet6 = parse_key(record["key"])
    return Lease(
        record["key"],
        subnet,
        subnet6,
        decode_attrs(record["value"]),
        int(record["created"]),
        int(record["revision"]),
        int(record["etcd_lease"]),
    )
