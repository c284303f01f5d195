"""Which record to claim, given all of them: the decision of `acquire`, the same for every store. Pure."""

from collections.abc import Collection
from random import Random
from typing import NamedTuple, TypeAlias

from flannelpy.model.address import Prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import PoolFull, Previous, choose, format_key, is_compatible
from flannelpy.store.etcd_codec import Listing

Pair: TypeAlias = tuple[Prefix | None, Prefix | None]


class TakeOver(NamedTuple):
    """Our own lease, from before: write it again."""

    lease: Lease


class Create(NamedTuple):
    """A free subnet: make a record."""

    subnet: Prefix | None
    subnet6: Prefix | None

    @property
    def key(self) -> str:
        """The record's key."""
        return format_key(self.subnet, self.subnet6)


class MakeRoom(NamedTuple):
    """Nothing is free, but leases of ours for another config are in the way: delete them, ask again."""

    leases: tuple[Lease, ...]


def decide(
    config: NetworkConfig,
    listing: Listing,
    ours: LeaseAttrs,
    previous: Previous,
    refused: Collection[Pair],
    random: Random,
) -> TakeOver | Create | MakeRoom:
    """`ours` needs only the public IPs. `refused` are subnets that could not be claimed. Raises PoolFull."""
    mine = own_leases(listing, ours)
    fitting = [lease for lease in mine if is_compatible(config, lease.subnet, lease.subnet6)]
    if fitting:
        wanted = (previous.subnet, previous.subnet6)
        return TakeOver(
            next((lease for lease in fitting if (lease.subnet, lease.subnet6) == wanted), fitting[0])
        )
    try:
        return Create(*choose(config, (*listing.taken, *refused), previous, random))
    except PoolFull:
        if not mine:
            raise
        return MakeRoom(tuple(mine))


def own_leases(listing: Listing, ours: LeaseAttrs) -> list[Lease]:
    """The leases with our public IP, in the order of their keys."""
    return [lease for lease in listing.leases.values() if is_same_node(lease.attrs, ours)]


def stale_leases(config: NetworkConfig, listing: Listing, ours: LeaseAttrs) -> list[Lease]:
    """Those of our leases that do not fit the config any more."""
    return [
        lease for lease in own_leases(listing, ours) if not is_compatible(config, lease.subnet, lease.subnet6)
    ]


def is_same_node(theirs: LeaseAttrs, ours: LeaseAttrs) -> bool:
    """A node is its IPv4 address, or its IPv6 address where one of the two records has no IPv4.

    All IPv6-only nodes have the same IPv4 address on the wire (0.0.0.0): it says nothing.
    """
    if ours.public_ip is not None and theirs.public_ip is not None:
        return ours.public_ip == theirs.public_ip
    return ours.public_ipv6 is not None and ours.public_ipv6 == theirs.public_ipv6


def has_rival(listing: Listing, own: Lease) -> bool:
    """Whether an older record overlaps ours: a race for one half of a dual-stack pair that we lost.

    etcd compares whole keys; two pairs may share one subnet and still be two keys.
    """
    return any(
        lease.created < own.created and any(a.overlaps(b) for a in lease.subnets() for b in own.subnets())
        for lease in listing.leases.values()
        if lease.key != own.key
    )
