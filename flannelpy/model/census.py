"""All records of a network held against its config: what is wrong with them, how full the pool is. Pure.

The judgements are those that nodes make: a peer is programmed or refused by the rules of `model/peers.py`, a
lease is kept or replaced at a start by the test of `model/subnet.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from flannelpy.model.address import Address, Prefix, format_address, is_unicast
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import Pool, pools

Severity: TypeAlias = Literal["error", "warning", "note"]
Subnets: TypeAlias = tuple[Prefix | None, Prefix | None]
"""The IPv4 and the IPv6 one."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first. error: packets are lost. warning: something is about to change. note: worth knowing."""

NEARLY_FULL = 80
"""Percent of the pool from which on it is a warning."""
OVERDUE_SECONDS = 1800
"""A living node renews with an hour left (flannel's default margin); half of that is not a late renewal."""

_UNTYPED = ("udp", "alloc", "tencent-vpc")
"""Backends whose leases name no backend type, as flannel writes them."""
_IDENTITIES = (("vtepmac", "VTEP MAC"), ("publickey", "public key"))


class Entry(NamedTuple):
    """One key under `<prefix>/subnets/`, readable or not."""

    key: str
    """What follows `<prefix>/subnets/`; exact if it could be a lease's, else printable and bounded."""
    raw_key: bytes
    """The same as it is."""
    value: bytes
    subnets: Subnets
    """What the key says, also where the value cannot be read; both None where the key cannot."""
    lease: Lease | None
    """The record, read; None if it is unreadable."""
    problem: str
    """Why it is unreadable; empty if it is not."""
    created: int
    revision: int
    """etcd's revision of the last change."""
    etcd_lease_id: int
    """0 = none: it never expires."""
    seconds_left: int | None
    """Until the record expires; None if it does not, or if it was not asked for."""

    @property
    def is_reservation(self) -> bool:
        """Whether it is a lease without an end."""
        return self.etcd_lease_id == 0 and self.lease is not None


class Census(NamedTuple):
    """Everything that etcd holds about a network, at one revision."""

    config_text: str | None
    config_revision: int
    """Of the config's last change; 0 if there is none."""
    entries: tuple[Entry, ...]
    """In the order of their keys."""
    beside: tuple[str, ...]
    """Keys that begin like ours but are not below `subnets/`, such as `subnets-old/x`; the first few."""
    revision: int


class Finding(NamedTuple):
    """One thing that is wrong, or worth knowing."""

    severity: Severity
    kind: str
    """A word for programs: "overlap", "public-ip", ..."""
    keys: tuple[str, ...]
    """The records that it is about."""
    text: str
    """One line: what is so, what follows, what to do."""


class PoolUse(NamedTuple):
    """How full one family's pool is."""

    pool: Pool
    taken: int
    """Subnets of the pool that a record overlaps."""

    @property
    def free(self) -> int:
        """Subnets that a new node can get."""
        return self.pool.size - self.taken

    @property
    def percent(self) -> int:
        """Taken, of all; 100 only when nothing is free."""
        return self.taken * 100 // self.pool.size


def findings(config: NetworkConfig | None, census: Census) -> tuple[Finding, ...]:
    """All of them, the worst first. Without a config only what needs none."""
    found = [*_unreadable(census), *_overlaps(census.entries), *_doubles(census.entries)]
    for entry in census.entries:
        found += _about_entry(config, entry)
    if config is not None:
        for use in pool_use(config, census.entries):
            found += _fullness(use)
    return tuple(sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.keys)))


def worst(found: Iterable[Finding]) -> Severity | None:
    """The worst severity among them; None if there are none."""
    return min((finding.severity for finding in found), key=SEVERITIES.index, default=None)


def pool_use(config: NetworkConfig, entries: Sequence[Entry]) -> tuple[PoolUse, ...]:
    """For each family that is on, IPv4 first."""
    uses = []
    for family, pool in enumerate(pools(config)):
        if pool is not None:
            leased = [subnet for entry in entries if (subnet := entry.subnets[family]) is not None]
            taken = sum(last - first + 1 for first, last in pool.taken(leased))
            uses.append(PoolUse(pool, taken))
    return tuple(uses)


def misfits(config: NetworkConfig, subnets: Subnets) -> list[tuple[bool, str]]:
    """Why subnets do not fit a config: (whether peers refuse them, the reason); empty if they fit."""
    reasons = []
    names = (("IPv4", config.network), ("IPv6", config.network6))
    for (family, network), pool, subnet in zip(names, pools(config), subnets, strict=True):
        if pool is None:
            if subnet is not None:
                reasons.append(
                    (False, f"it has the {family} subnet {subnet}, but the config has no {family}")
                )
        elif subnet is None:
            reasons.append((False, f"it has no {family} subnet, but the config has the network {network}"))
        elif not pool.network.contains(subnet):
            reasons.append((True, f"{subnet} is not inside the network {network}"))
        elif subnet.length != pool.length:
            reasons.append((False, f"{subnet} has length {subnet.length}, the config asks for {pool.length}"))
        elif not pool.holds(subnet):
            bounds = f"{format_address(pool.low)} to {format_address(pool.high)}"
            reasons.append((False, f"{subnet} is not among the subnets that may be leased, {bounds}"))
    return reasons


def matching(entries: Sequence[Entry], wanted: Prefix | Address | str) -> list[Entry]:
    """The records of a key, of a subnet (equal, else around or inside), or of a public IP, else around it."""
    if isinstance(wanted, str):
        return [entry for entry in entries if entry.key == wanted]
    if isinstance(wanted, Prefix):
        return [entry for entry in entries if wanted in entry.subnets] or [
            entry for entry in entries if any(subnet and subnet.overlaps(wanted) for subnet in entry.subnets)
        ]
    return [entry for entry in entries if _has_public_ip(entry, wanted)] or [
        entry for entry in entries if any(subnet and subnet.has(wanted) for subnet in entry.subnets)
    ]


def names_backend(config: NetworkConfig) -> bool:
    """Whether the leases of this network name their backend; flannel's udp, alloc and tencent-vpc do not."""
    return config.backend_type not in _UNTYPED


def public_ips(entry: Entry) -> tuple[Address, ...]:
    """The addresses by which its node is known, IPv4 first."""
    if entry.lease is None:
        return ()
    attrs = entry.lease.attrs
    return tuple(address for address in (attrs.public_ip, attrs.public_ipv6) if address is not None)


def _has_public_ip(entry: Entry, address: Address) -> bool:
    return address in public_ips(entry)


# --- what can be wrong ---


def _unreadable(census: Census) -> Iterator[Finding]:
    for entry in census.entries:
        if entry.lease is not None:
            continue
        if entry.subnets == (None, None):
            consequence = (
                "flannelpy skips it, flannel nodes drop the routes to all peers when it is written: delete it"
            )
            yield Finding("error", "unreadable-key", (entry.key,), f"{entry.problem}; {consequence}")
        else:
            consequence = (
                "its subnet counts as taken and no peer reaches it: release it, or correct the value"
            )
            yield Finding("error", "unreadable-value", (entry.key,), f"{entry.problem}; {consequence}")
    if census.beside:
        yield Finding(
            "warning",
            "beside",
            census.beside,
            f"keys that begin like ours but are no leases, such as {census.beside[0]}: flannel nodes read "
            "them and drop the routes to all peers; move them elsewhere",
        )


def _overlaps(entries: Sequence[Entry]) -> Iterator[Finding]:
    """One finding for each run of records that share addresses."""
    seen = set()
    for family in (0, 1):
        spans = sorted(
            ((subnet.first, subnet.last, entry) for entry in entries if (subnet := entry.subnets[family])),
            key=lambda span: span[:2],
        )
        run: list[Entry] = []
        end = -1
        for first, last, entry in [*spans, (1 << 129, 1 << 129, None)]:
            if first > end:
                keys = tuple(entry.key for entry in _oldest_first(run))
                if len(run) > 1 and keys not in seen:
                    seen.add(keys)
                    yield _overlap(family, keys, _oldest_first(run))
                run = []
            if entry is not None:
                run.append(entry)
            end = max(end, last)


def _overlap(family: int, keys: tuple[str, ...], run: Sequence[Entry]) -> Finding:
    owner = run[0]
    others = _listed([entry.key for entry in run[1:]])
    return Finding(
        "error",
        "overlap",
        keys,
        f"the subnet {owner.subnets[family]} of {owner.key} overlaps that of {others}: peers serve the "
        f"oldest, {owner.key}; release what is wrong, and the daemon there takes another subnet",
    )


def _oldest_first(run: Sequence[Entry]) -> list[Entry]:
    return sorted(run, key=lambda entry: (entry.created, entry.key))


def _doubles(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Records that share what should be one node's own."""
    by_ip: dict[Address, list[Entry]] = defaultdict(list)
    by_identity: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        for address in public_ips(entry):
            by_ip[address].append(entry)
        for identity in dict.fromkeys(_identities(entry)):
            by_identity[identity].append(entry)
    told = set()
    for address, group in by_ip.items():
        keys = tuple(entry.key for entry in group)
        if len(group) > 1 and keys not in told:
            told.add(keys)
            yield Finding(
                "error",
                "public-ip",
                keys,
                f"the public IP {format_address(address)} is in {_listed(keys)}: either one node has several "
                "leases, then release those that it does not use; or several nodes have one address, then "
                "give each its own (--iface or --public-ip)",
            )
    for (what, text), group in by_identity.items():
        keys = tuple(entry.key for entry in group)
        if len(group) > 1 and keys not in told:
            yield Finding(
                "error",
                "identity",
                keys,
                f"the {what} {text} is in {_listed(keys)}: peers serve the oldest; are these cloned "
                "machines? Give each a machine-id of its own, delete the overlay device on the clone and "
                "restart there",
            )


def _identities(entry: Entry) -> Iterator[tuple[str, str]]:
    if entry.lease is None:
        return
    for data in (entry.lease.attrs.backend_data, entry.lease.attrs.backend_v6_data):
        fields: dict[str, Any] = data if isinstance(data, dict) else {}
        folded = {key.casefold(): value for key, value in fields.items()}
        for key, what in _IDENTITIES:
            value = folded.get(key)
            if isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable():
                yield what, value.lower() if key == "vtepmac" else value


def _about_entry(config: NetworkConfig | None, entry: Entry) -> Iterator[Finding]:
    """What one record says about itself."""
    if entry.is_reservation:
        whom = " and ".join(map(format_address, public_ips(entry))) or "nobody"
        text = f"reserved for {whom}: it never expires"
        yield Finding("note", "reservation", (entry.key,), text)
    if entry.seconds_left is not None and entry.seconds_left < OVERDUE_SECONDS:
        text = f"it ends in {max(entry.seconds_left, 0) // 60} minutes and was not renewed: is its node gone?"
        yield Finding("note", "overdue", (entry.key,), text)
    if config is None:
        return
    if entry.subnets != (None, None):
        for refused, reason in misfits(config, entry.subnets):
            if refused:
                text = f"{reason}: peers refuse it; its node takes another subnet when it restarts"
                yield Finding("error", "outside", (entry.key,), text)
            else:
                text = f"{reason}: its node takes another subnet when it restarts"
                yield Finding("warning", "misfit", (entry.key,), text)
    if entry.lease is not None:
        yield from _about_attrs(config, entry, entry.lease)


def _about_attrs(config: NetworkConfig, entry: Entry, lease: Lease) -> Iterator[Finding]:
    """What peers make of the value."""
    for address in public_ips(entry):
        shown = format_address(address)
        reason = "" if is_unicast(address) else f"its public IP {shown} is not a unicast address"
        for network in (config.network, config.network6):
            if network is not None and network.has(address):
                reason = f"its public IP {shown} is inside the overlay network {network}"
        if reason:
            text = f"{reason}: no peer reaches it; correct --iface or --public-ip on its node"
            yield Finding("error", "unreachable", (entry.key,), text)
    kind = lease.attrs.backend_type
    if entry.is_reservation and not kind:
        return  # made by hand: its node fills the rest in
    expected = config.backend_type if names_backend(config) else ""
    if kind != expected:
        text = (
            f"its backend is {kind[:40] or 'not named'!r}, the config's is {config.backend_type[:40]!r}: "
            "peers with the config's backend ignore it; restart its daemon"
        )
        yield Finding("warning", "backend", (entry.key,), text)
    families = (
        (config.network, lease.subnet, lease.attrs.public_ip),
        (config.network6, lease.subnet6, lease.attrs.public_ipv6),
    )
    for network, subnet, public_ip in families:
        if expected and network and subnet and public_ip is None:
            text = f"it names no public IP for {subnet}: no peer reaches that; restart its daemon"
            yield Finding("error", "unreachable", (entry.key,), text)


def _fullness(use: PoolUse) -> Iterator[Finding]:
    if use.percent >= NEARLY_FULL:
        remedy = "release leases of nodes that are gone, or plan a larger network or smaller subnets"
        state = f"{use.taken} of {use.pool.size} subnets of {use.pool.network} are taken"
        if use.free:
            yield Finding("warning", "pool", (), f"{state}, {use.free} are free: {remedy}")
        else:
            yield Finding("error", "pool-full", (), f"{state}, no new node gets one: {remedy}")


def _listed(keys: Sequence[str]) -> str:
    """Up to four keys in words."""
    if len(keys) > 4:
        return f"{', '.join(keys[:3])} and {len(keys) - 3} more"
    return " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)
