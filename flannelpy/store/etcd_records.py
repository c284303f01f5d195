"""The records under `<prefix>/subnets/` in etcd: list, write, delete, each write with its comparison."""

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import NamedTuple

from flannelpy.errors import StoreError
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import encode_attrs
from flannelpy.store import Head
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd_client import EtcdClient
from flannelpy.store.etcd_codec import MAX_VALUE, Listing, read_listing, record_of, subnets_range

_log = logging.getLogger(__name__)


class State(NamedTuple):
    """All records, and the point at which they were read."""

    listing: Listing
    head: Head


class EtcdRecords:
    """The records of one network. Every method raises StoreError."""

    def __init__(self, client: EtcdClient, prefix: str, ttl: int) -> None:
        self.client = client
        self.ttl = ttl
        self.first, self.end = subnets_range(prefix)
        self._signatures = f"{prefix}/flannelpy/nodes/".encode()
        """Beside `subnets/`, never in it: flannel takes every key there for a lease."""

    def key(self, name: str) -> bytes:
        """The etcd key of the record with this name."""
        return self.first + name.encode()

    async def read_all(self) -> State:
        """All records; linearizable."""
        return self.state(await self.client.range(self.first, self.end))

    def state(self, reply: pb.RangeResponse, header: pb.ResponseHeader | None = None) -> State:
        """A Range over all records, read. `header` is the transaction's if the Range was part of one."""
        head = head_of(header or reply.header)
        records = (record_of(kv, len(self.first)) for kv in reply.kvs)
        return State(read_listing(records, head.revision), head)

    def put(self, lease: Lease) -> pb.RequestOp:
        """The write of a record, on its etcd lease."""
        value = encode_attrs(lease.attrs).encode()
        return pb.RequestOp(
            request_put=pb.PutRequest(key=self.key(lease.key), value=value, lease=lease.etcd_lease_id)
        )

    def get(self) -> pb.RequestOp:
        """The Range over all records, for a transaction."""
        return pb.RequestOp(request_range=pb.RangeRequest(key=self.first, range_end=self.end))

    def unchanged(self, lease: Lease) -> list[pb.Compare]:
        """The record's last change is the one that we know.

        Another history may have another change under the same revision: hardly with the same beginning.
        """
        key = self.key(lease.key)
        return [
            pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=lease.revision),
            pb.Compare(
                result=pb.Compare.EQUAL, target=pb.Compare.CREATE, key=key, create_revision=lease.created
            ),
        ]

    def free(self, lease: Lease) -> list[pb.Compare]:
        """There is no record of this key, and none that pairs its IPv4 subnet with another IPv6 subnet."""
        key = self.key(lease.key)
        compares = [_none_in(key, b"")]
        if lease.subnet is not None:
            # "10.5.52.0-" up to "10.5.52.0.": every key that begins with this IPv4 subnet, whatever follows.
            head = key[: key.index(b"-", len(self.first)) + 1]
            compares.append(_none_in(head, head[:-1] + b"."))
        return compares

    async def remove(self, lease: Lease) -> bool:
        """Delete a record unless somebody has changed it since; whether it is gone by our hand."""
        key = self.key(lease.key)
        delete = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
        reply = await self.client.txn(self.unchanged(lease), [delete])
        return reply.succeeded

    async def retire(self, lease_id: int) -> None:
        """End an etcd lease that a record was on, unless another key hangs on it. An error is only logged."""
        if await quietly(self._is_bare(lease_id)):
            await quietly(self.client.revoke(lease_id))

    async def retire_signed(self, name: str, lease_id: int) -> str | None:
        """The same; who had signed the record, if that is known. Both are asked at once."""
        signature, bare = await asyncio.gather(self._signed(name), quietly(self._is_bare(lease_id)))
        if bare:
            await quietly(self.client.revoke(lease_id))
        return signature

    async def _signed(self, name: str) -> str | None:
        """A courtesy, like the signature itself."""
        with suppress(StoreError):
            return await self.signature(name)
        return None

    async def _is_bare(self, lease_id: int) -> bool:
        if not lease_id:
            return False
        return all(key.startswith(self._signatures) for key in await self.client.keys_on(lease_id))

    async def sign(self, lease: Lease, identity: str) -> None:
        """Write who wrote a record, on the record's etcd lease."""
        put = pb.PutRequest(
            key=self._signatures + lease.key.encode(), value=identity.encode(), lease=lease.etcd_lease_id
        )
        await self.client.txn(self.unchanged(lease), [pb.RequestOp(request_put=put)])

    async def unsign(self, name: str) -> bool:
        """Delete what `sign` left of a record that is gone; on an etcd lease it goes by itself."""
        delete = pb.RequestOp(
            request_delete_range=pb.DeleteRangeRequest(key=self._signatures + name.encode())
        )
        return (await self.client.txn([_none_in(self.key(name), b"")], [delete])).succeeded

    async def signature(self, key: str) -> str | None:
        """Who wrote a record, as they say; None if they do not."""
        reply = await self.client.range(self._signatures + key.encode())
        return reply.kvs[0].value[:MAX_VALUE].decode("utf-8", "replace") if reply.kvs else None


def head_of(header: pb.ResponseHeader) -> Head:
    """What a header says about etcd's history."""
    return Head(header.cluster_id, header.raft_term, header.revision)


def with_changes(listing: Listing, put: Iterable[Lease], gone: Iterable[str]) -> Listing:
    """The listing after some changes of our own, at its old revision: the watch will repeat them."""
    names = set(gone)
    leases = {name: lease for name, lease in listing.leases.items() if name not in names}
    leases.update((lease.key, lease) for lease in put)
    return listing._replace(leases=leases)


async def quietly(request: Awaitable[bool | None]) -> bool:
    """For tidying up: an error is logged and means False; what stays behind expires by itself."""
    try:
        return await request is not False
    except StoreError as error:
        _log.info("left for etcd to expire: %s", error)
        return False


def _none_in(key: bytes, range_end: bytes) -> pb.Compare:
    return pb.Compare(
        result=pb.Compare.EQUAL, target=pb.Compare.VERSION, key=key, range_end=range_end, version=0
    )
