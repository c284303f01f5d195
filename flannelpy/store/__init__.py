"""Where leases live: the protocol that etcd, Kubernetes and the memory store share."""

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs, LeaseUpdate
from flannelpy.model.subnet import Previous

# gRPC's own lines on stderr (a rejected certificate, say) repeat in its words what our errors say. Here,
# because it looks when it is imported, and this is imported before every module that does.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

TTL_SECONDS = 86_400
"""How long a claim lasts without renewal, flannel's; after that the subnet is free for others."""

Offer: TypeAlias = Callable[[Lease | None, Sequence[Lease]], LeaseAttrs]
"""(the lease that we are about to take over or None, all other nodes' leases) -> what we tell the peers.

A function, because what we tell may depend on what we find: a VTEP MAC is kept from the lease that is taken
over, and must not be another node's. `offer(None, ())` tells our public IPs.
"""


class Head(NamedTuple):
    """How far into which history of a store we have seen."""

    cluster: int
    term: int
    revision: int

    def contradicts(self, seen: "Head") -> bool:
        """Whether this looks like another history: a restored backup, another cluster; or a member lags."""
        return self.cluster != seen.cluster or self.revision < seen.revision or self.term < seen.term


class Mark(NamedTuple):
    """One version of a record. etcd gives no two of its leases one id."""

    created: int
    revision: int
    etcd_lease_id: int


def mark_of(lease: Lease) -> Mark:
    """Which version of a record this is."""
    return Mark(lease.created, lease.revision, lease.etcd_lease_id)


Marks: TypeAlias = Mapping[str, Mark | None]
"""Key -> the version that was seen; None = one that is not known exactly."""


class Running(NamedTuple):
    """What a running node goes on with although the store may have no record of it."""

    own: Lease
    """As it was written last."""
    held: tuple[Lease, ...] = ()
    """Peers of a history of the store that ended: their subnets are not free."""
    began: int = 0
    """Records up to this revision were there when the present history was met: they may be from a backup."""


class Store(Protocol):
    """A datastore of one network.

    Every method but `watch*` raises `StoreError`; `transient=True` in it means: ask again later. A store
    never decides what to do about an outage, it only says that there is one.
    """

    config_place: str
    """Where the network config is kept, for messages: `/coreos.com/network/config in etcd (http://...)`."""

    def watch_config(self) -> AsyncGenerator[str | None, None]:
        """The text of the network config: now, then whenever it changes; None while there is none."""
        ...

    @property
    def head(self) -> Head | None:
        """How far into which history the watch has seen."""
        ...

    def remember(self, head: Head, marks: Marks) -> None:
        """What an earlier life of this node had seen, for the first Snapshot to be compared with."""
        ...

    async def acquire(
        self, config: NetworkConfig, offer: Offer, previous: Previous, running: Running | None = None
    ) -> Lease:
        """Claim a subnet: the one we hold already (by public IP), else the previous one, else a free one.

        A node that runs keeps its own subnet if nobody else has it. Raises StoreError(transient=False) when
        the pool has no free subnet.
        """
        ...

    @property
    def replaced(self) -> str | None:
        """The note (see `sign`) beside the record that a start's `acquire` has taken over; None = none."""
        ...

    async def renew(self, own: Lease) -> Lease | None:
        """Prolong our claim by one full TTL, only if the record is still as we wrote it.

        Returns None when it is not ours any more (deleted, or written by somebody else).
        """
        ...

    def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        """All leases: a Snapshot first, then Deltas; a Snapshot again whenever the deltas were lost.

        Never ends and never raises for an outage: it reconnects for ever. An empty Delta is a sign of life.
        """
        ...

    async def sign(self, own: Lease, identity: str) -> None:
        """Leave a note beside our record that says which machine wrote it; lasts as long as the record.

        A courtesy: where the store does not allow it nothing happens. Raises nothing.
        """
        ...

    async def signature(self, key: str) -> str | None:
        """The note beside a record; None if there is none, or if it cannot be read. Raises nothing."""
        ...

    async def close(self) -> None:
        """Let go of all connections."""
        ...
