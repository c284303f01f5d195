"""Where leases live: the protocol that etcd, Kubernetes and the memory store share."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeAlias

from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs, LeaseUpdate
from flannelpy.model.subnet import Previous

TTL_SECONDS = 86_400
"""How long a claim lasts without renewal, flannel's; after that the subnet is free for others."""

Offer: TypeAlias = Callable[[Lease | None, Sequence[Lease]], LeaseAttrs]
"""(the lease that we are about to take over or None, all other nodes' leases) -> what we tell the peers.

A function, because what we tell may depend on what we find: a VTEP MAC is kept from the lease that is taken
over, and must not be another node's. `offer(None, ())` tells our public IPs.
"""


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

    async def acquire(self, config: NetworkConfig, offer: Offer, previous: Previous) -> Lease:
        """Claim a subnet: the one we hold already (by public IP), else the previous one, else a free one.

        Raises StoreError(transient=False) when the pool has no free subnet.
        """
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

    async def close(self) -> None:
        """Let go of all connections."""
        ...
