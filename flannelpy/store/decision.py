"""Which record to claim, given all of them: the decision of `acquire`, the same for every store. Pure."""

from collections.abc import Collection
from contextlib import suppress
from random import Random
from typing import NamedTuple

from flannelpy.model.address import Prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs, same_node
from flannelpy.model.subnet import Pair, PoolFull, Previous, choose, format_key, is_compatible
from flannelpy.store import Running
from flannelpy.store.etcd_codec import Listing

_MANY = 10
"""From so many records on it is a mishap rather than a coincidence when most are gone."""


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
    """Other leases of ours are in the way (for another config, or restored): delete them, ask again."""

    leases: tuple[Lease, ...]


def decide(
    config: NetworkConfig,
    listing: Listing,
    ours: LeaseAttrs,
    previous: Previous,
    refused: Collection[Pair],
    random: Random,
    running: Running | None = None,
    lost: Collection[Pair] = (),
) -> TakeOver | Create | MakeRoom:
    """`ours` needs only the public IPs. `refused` are subnets that could not be claimed. Raises PoolFull.

    `lost`: what a node that starts knows of a history that ended; given to it only if nothing else is free.
    """
    mine = own_leases(listing, ours)
    if running:
        mine += [lease for lease in listing.leases.values() if _is_of_a_backup(lease, ours, running)]
    # Of two pairs with one half in common the older one counts, whoever made the other one again.
    settled = [lease for lease in mine if not has_rival(listing, lease, but=mine)]
    fitting = [lease for lease in settled if is_compatible(config, lease.subnet, lease.subnet6)]
    wanted = _pair(running.own) if running else (previous.subnet, previous.subnet6)
    for lease in settled if running else fitting:
        if _pair(lease) == wanted:
            return TakeOver(lease)
    taken = [*listing.taken, *refused]
    held: list[Pair] = []
    if running:
        former = next((lease for lease in listing.leases.values() if _is_former(lease, running.own)), None)
        if former is not None and not has_rival(listing, former, but=mine):
            return TakeOver(former)
        # A restored backup may hold an older lease of ours, and SubnetMin may have changed: packets flow by
        # the one that we have now.
        pairs = [_pair(lease) for lease in mine]
        is_free = not any(overlap(wanted, pair) for pair in taken if pair not in pairs)
        held = [_pair(lease) for lease in running.held]
        in_the_way = [  # half of a pair that we had once; or we had a subnet that is a held peer's now
            lease for lease in mine if (is_free and overlap(_pair(lease), wanted)) or _is_held(lease, held)
        ]
        if in_the_way:
            return MakeRoom(tuple(in_the_way))
        if is_free:
            return Create(*wanted)
    free = [lease for lease in fitting if not any(overlap(_pair(lease), pair) for pair in held)]
    if free:
        return TakeOver(free[0])
    avoided = [pair for pair in lost if pair != wanted]
    if avoided:
        with suppress(PoolFull):
            return Create(*choose(config, (*taken, *held, *avoided), previous, random))
    try:
        return Create(*choose(config, (*taken, *held), previous, random))
    except PoolFull:
        if not mine:
            raise
        return MakeRoom(tuple(mine))


def overlap(one: Pair, other: Pair) -> bool:
    """Whether the two have an address in common."""
    return any(a is not None and b is not None and a.overlaps(b) for a, b in zip(one, other, strict=True))


def _is_held(lease: Lease, held: Collection[Pair]) -> bool:
    return lease.etcd_lease_id != 0 and any(overlap(_pair(lease), pair) for pair in held)


def _is_former(lease: Lease, own: Lease) -> bool:
    """Whether it is our own record of the time when we had another address.

    It is as we wrote it last, or, from an older backup, it has our MAC.
    """
    data = [(attrs.backend_data, attrs.backend_v6_data) for attrs in (lease.attrs, own.attrs)]
    return _pair(lease) == _pair(own) and (lease.attrs == own.attrs or data[0] == data[1] != (None, None))


def _is_of_a_backup(lease: Lease, ours: LeaseAttrs, running: Running) -> bool:
    """Whether it is our own record of the time when we had another address and another subnet."""
    data = [(attrs.backend_data, attrs.backend_v6_data) for attrs in (lease.attrs, running.own.attrs)]
    is_ours = not same_node(lease.attrs, ours) and data[0] == data[1] != (None, None)
    return is_ours and lease.etcd_lease_id != 0 and lease.revision <= running.began


def _pair(lease: Lease) -> Pair:
    return lease.subnet, lease.subnet6


def own_leases(listing: Listing, ours: LeaseAttrs) -> list[Lease]:
    """The leases with our public IP, in the order of their keys."""
    return [lease for lease in listing.leases.values() if same_node(lease.attrs, ours)]


def stale_leases(
    config: NetworkConfig, listing: Listing, ours: LeaseAttrs, own: Lease, running: Running | None = None
) -> list[Lease]:
    """Those of our leases that count no more; never `own`, the one that was just written.

    They do not fit the config, or a backup brought them back: peers would send to where we were then.
    """
    began = running.began if running else 0
    return [
        lease
        for lease in own_leases(listing, ours)
        if lease.key != own.key
        and (
            not is_compatible(config, lease.subnet, lease.subnet6)
            or (lease.etcd_lease_id != 0 and lease.revision <= began)
        )
    ]


def other_nodes(listing: Listing, ours: LeaseAttrs, decision: TakeOver | Create) -> tuple[Lease, ...]:
    """The leases of all others; what is taken over is ours, under whichever address."""
    former = decision.lease.key if isinstance(decision, TakeOver) else None
    return tuple(
        lease for lease in listing.leases.values() if lease.key != former and not same_node(lease.attrs, ours)
    )


def lacks_most(known: Collection[str], listing: Listing) -> bool:
    """Whether a listing comes without most of many records whose deletion nobody told: look twice."""
    if len(known) < _MANY:
        return False
    gone = sum(key not in listing.leases and key not in listing.unreadable for key in known)
    return gone * 2 > len(known)


def has_rival(listing: Listing, own: Lease, *, but: Collection[Lease] = ()) -> bool:
    """Whether an older record, `but` none of these, overlaps ours: we lost a race for one half of a pair.

    etcd compares whole keys; two pairs may share one subnet and still be two keys.
    """
    ours = {own.key, *(lease.key for lease in but)}
    return any(
        lease.created < own.created and any(a.overlaps(b) for a in lease.subnets() for b in own.subnets())
        for lease in listing.leases.values()
        if lease.key not in ours
    )
