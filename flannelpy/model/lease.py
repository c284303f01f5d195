"""Leases: a node's time-limited claim on a subnet, and how the set of all of them changes.

`Snapshot` and `Delta` are two types on purpose: an empty delta can never be read as "nobody is left".
"""

from typing import Any, NamedTuple, TypeAlias

from flannelpy.model.address import Address, Prefix, Span


class LeaseAttrs(NamedTuple):
    """What a node tells its peers; flannel's `LeaseAttrs`. The wire names are in `model/subnet.py`."""

    public_ip: Address | None
    """Where peers send the outer packet, 4 bytes; None on an IPv6-only node (on the wire `0.0.0.0`)."""
    public_ipv6: Address | None
    """The same for IPv6, 16 bytes; on the wire `null` when there is none."""
    backend_type: str
    """"vxlan", "host-gw", ...; empty for udp and alloc, as flannel writes them."""
    backend_data: Any = None
    """The backend's part for IPv4: decoded JSON, not yet validated; None when there is none."""
    backend_v6_data: Any = None
    """The same for IPv6."""


def same_node(one: LeaseAttrs, other: LeaseAttrs) -> bool:
    """A node is its IPv4 address, or its IPv6 address where one of the two records has no IPv4.

    All IPv6-only nodes have the same IPv4 address on the wire (0.0.0.0): it says nothing.
    """
    if one.public_ip is not None and other.public_ip is not None:
        return one.public_ip == other.public_ip
    return one.public_ipv6 is not None and one.public_ipv6 == other.public_ipv6


class Lease(NamedTuple):
    """One record under `<prefix>/subnets/`, or a Kubernetes node."""

    key: str
    """The store's name of the record: the last part of an etcd key, or the node's name."""
    subnet: Prefix | None
    """The IPv4 subnet; None on an IPv6-only node."""
    subnet6: Prefix | None
    """The IPv6 subnet; None when the node has none."""
    attrs: LeaseAttrs
    created: int = 0
    """The store's revision at which the record was created: the earlier one wins an overlap."""
    revision: int = 0
    """The store's revision of the last change of the record."""
    etcd_lease_id: int = 0
    """etcd's TTL object on the key; 0 = none (a reservation)."""

    def subnets(self) -> tuple[Prefix, ...]:
        """The subnets of the families that it has, IPv4 first."""
        return tuple(subnet for subnet in (self.subnet, self.subnet6) if subnet is not None)

    def spans(self) -> list[Span]:
        """The same as ranges of addresses."""
        return [subnet.span for subnet in (self.subnet, self.subnet6) if subnet is not None]


class Snapshot(NamedTuple):
    """All leases at one revision, our own included. Whatever is not in it is gone."""

    leases: tuple[Lease, ...]
    revision: int
    unreadable: tuple[tuple[str, str], ...] = ()
    """(key, reason) of each record that could not be read: named, counted, and no reason to remove a peer
    whose earlier record was good."""
    new_history: bool = False
    """The store's history is not the one seen before (a restored backup, an emptied or another cluster):
    what is absent was not deleted by anybody."""


class Delta(NamedTuple):
    """What changed up to a revision. Whatever is not in it is as it was."""

    put: tuple[Lease, ...]
    gone: tuple[str, ...]
    """Keys whose records were deleted or expired."""
    revision: int
    unreadable: tuple[tuple[str, str], ...] = ()


LeaseUpdate: TypeAlias = Snapshot | Delta
