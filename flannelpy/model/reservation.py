"""What it takes to reserve a subnet for a node, and to give a reservation back. Pure.

A reservation is a record without an etcd lease: it never expires. A node takes the record with its own public
IP, so one that names no public IP keeps its subnet free of everybody.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from flannelpy.model.address import Address, Prefix, format_address, is_unicast
from flannelpy.model.census import Entry, Subnets, misfits, names_backend, public_ips
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import format_key


class Make(NamedTuple):
    """Write a new record."""

    lease: Lease


class Keep(NamedTuple):
    """Take the record's etcd lease away, leave its value: its node notices nothing."""

    entry: Entry


Reserving: TypeAlias = Make | Keep


def pair(prefixes: Sequence[Prefix]) -> Subnets:
    """One or two prefixes -> the subnets of a record; ValueError with the rule."""
    found: dict[int, Prefix] = {}
    for prefix in prefixes:
        if prefix != prefix.network():
            raise ValueError(f"{prefix} is not the first address of its subnet: {prefix.network()} is")
        if prefix.bits in found:
            raise ValueError(f"{found[prefix.bits]} and {prefix} are of one family: give one of each")
        found[prefix.bits] = prefix
    return found.get(32), found.get(128)


def reserve(
    config: NetworkConfig, entries: Sequence[Entry], subnets: Subnets, addresses: Sequence[Address]
) -> Reserving:
    """How to reserve `subnets` for the node with these public IPs (none: for nobody).

    ValueError with the rule and the remedy if that cannot be.
    """
    for _, reason in misfits(config, subnets):
        raise ValueError(reason.replace("it has", "the reservation has", 1))
    ips = _families(config, addresses)
    key = format_key(*subnets)
    here = next((entry for entry in entries if entry.subnets == subnets), None)
    for entry in entries:
        if entry is not here and _share(entry.subnets, subnets):
            raise ValueError(f"{entry.key} overlaps it: release that first, or choose another subnet")
        for address in ips:
            if entry is not here and address is not None and address in public_ips(entry):
                whom = format_address(address)
                raise ValueError(f"{whom} has {entry.key} already: reserve that subnet, or release it first")
    if here is None:
        return Make(Lease(key, *subnets, LeaseAttrs(*ips, "")))
    return _keep(here, [address for address in ips if address is not None])


def _keep(here: Entry, addresses: Sequence[Address]) -> Keep:
    if here.lease is None:
        raise ValueError(f"{here.key} is there and unreadable: release it first")
    if here.is_reservation:
        raise ValueError(f"{here.key} is a reservation already, for {holder(here)}")
    if addresses and not set(addresses) <= set(public_ips(here)):
        raise ValueError(
            f"{here.key} is leased by {holder(here)}: release it first, or choose another subnet"
        )
    return Keep(here)


def holder(entry: Entry) -> str:
    """For whom a record is, in words."""
    return " and ".join(map(format_address, public_ips(entry))) or "nobody"


def is_in_use(config: NetworkConfig | None, entry: Entry) -> bool:
    """Whether the node of a reservation has written its record: then it is not to be deleted under it.

    Where leases name no backend (udp, alloc) that cannot be seen: whoever may be there counts as there.
    """
    if entry.lease is None or not public_ips(entry):
        return False
    return bool(entry.lease.attrs.backend_type) or config is None or not names_backend(config)


def _families(config: NetworkConfig, addresses: Sequence[Address]) -> tuple[Address | None, Address | None]:
    """(IPv4, IPv6) public IP; ValueError with the rule."""
    found: dict[int, Address] = {}
    for address in addresses:
        shown = format_address(address)
        if not is_unicast(address):
            raise ValueError(f"{shown} is no address of a host: give the node's public IP")
        if len(address) in found:
            raise ValueError(f"{format_address(found[len(address)])} and {shown} are of one family: give one")
        for network in (config.network, config.network6):
            if network is not None and network.has(address):
                raise ValueError(
                    f"{shown} is inside the overlay network {network}: give the node's public IP"
                )
        found[len(address)] = address
    return found.get(4), found.get(16)


def _share(one: Subnets, other: Subnets) -> bool:
    return any(a is not None and b is not None and a.overlaps(b) for a, b in zip(one, other, strict=True))
