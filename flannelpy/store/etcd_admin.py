"""What an operator does with a network in etcd: look at everything, remove, reserve, set the config.

Reading is bounded: pages of one revision, up to a number of keys and bytes. Every write compares first: it
takes place only if the record, or the config, is still what the operator was shown.
"""

import asyncio

from flannelpy.errors import StoreError
from flannelpy.model.census import Census, Entry, Subnets
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import parse_key
from flannelpy.store import TTL_SECONDS
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd_client import EtcdClient, RefusedError
from flannelpy.store.etcd_codec import read_lease, reason_of, record_of, shown_key
from flannelpy.store.etcd_records import EtcdRecords, quietly

MOST_KEYS = 50_000
MOST_BYTES = 256 << 20
_PAGE = 250
_MOST_BESIDE = 5
_TTL_AT_ONCE = 50
"""Requests under way together when the lifetime of each etcd lease is asked for."""


class EtcdAdmin:
    """One network's records and config, for an operator; owns the client. Every method raises StoreError."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._config_key = f"{prefix}/config".encode()
        self._beside = f"{prefix}/subnets".encode()
        self._records = EtcdRecords(client, prefix, TTL_SECONDS)
        self.subnets_place = f"{prefix}/subnets/"
        self.config_place = f"{prefix}/config"
        self.place = client.place

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    # --- reading ---

    async def config(self) -> tuple[str | None, int]:
        """(the config's text, the revision of its last change); (None, 0) if there is none."""
        reply = await self._client.range(self._config_key)
        return _config(reply)

    async def census(self, *, lifetimes: bool) -> Census:
        """Everything at one revision; with `lifetimes` also when each record expires, a request for each."""
        reply = await self._client.range(self._config_key)
        text, config_revision = _config(reply)
        revision = reply.header.revision
        first, end = self._records.first, self._records.end
        kvs = await self._all(first, end, revision)
        beside = [
            *(await self._some(self._beside, first, revision)),
            *(await self._some(end, self._beside[:-1] + b"t", revision)),
        ]
        left = await self._lifetimes({kv.lease for kv in kvs if kv.lease}) if lifetimes else {}
        entries = tuple(_entry(kv, len(first), left.get(kv.lease)) for kv in kvs)
        return Census(text, config_revision, entries, tuple(beside), revision)

    async def signature(self, entry: Entry) -> str | None:
        """What the daemon that wrote a lease says about itself, if it does and we may read it."""
        if entry.lease is None:
            return None
        try:
            return await self._records.signature(entry.key)
        except RefusedError as error:
            if error.transient:
                raise
            return None

    async def _all(self, first: bytes, end: bytes, revision: int) -> list[pb.KeyValue]:
        kvs: list[pb.KeyValue] = []
        size = 0
        while True:
            reply = await self._client.range(first, end, limit=_PAGE, revision=revision)
            kvs += reply.kvs
            size += sum(len(kv.value) for kv in reply.kvs)
            if not reply.more:
                return kvs
            if len(kvs) >= MOST_KEYS or size > MOST_BYTES:
                raise StoreError(
                    f"more than {len(kvs)} keys ({size >> 20} MiB) are below {self.subnets_place}: that is "
                    "no network of leases; check --etcd-prefix"
                )
            first = kvs[-1].key + b"\0"

    async def _some(self, first: bytes, end: bytes, revision: int) -> list[str]:
        """The first few keys; none where we may not look: they are not ours."""
        try:
            reply = await self._client.range(first, end, limit=_MOST_BESIDE, revision=revision)
        except RefusedError as error:
            if error.transient:
                raise
            return []
        return [shown_key(kv.key) for kv in reply.kvs]

    async def _lifetimes(self, lease_ids: set[int]) -> dict[int, int]:
        """Seconds left by etcd lease; none for those that we may not ask about."""
        found: dict[int, int] = {}
        waiting = sorted(lease_ids)

        async def ask() -> None:
            while waiting:
                lease_id = waiting.pop()
                try:
                    found[lease_id] = max(0, await self._client.seconds_left(lease_id))
                except RefusedError as error:
                    if error.transient:
                        raise

        # Not a task group: the first error is raised as it is.
        await asyncio.gather(*(ask() for _ in range(min(_TTL_AT_ONCE, len(waiting)))))
        return found

    # --- writing: False = it is not as it was any more, and nothing is changed ---

    async def remove(self, entry: Entry) -> bool:
        """Delete a record. Its etcd lease is left to expire: its node may be about to use it again."""
        delete = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=self._key(entry)))
        done = (await self._client.txn([self._unchanged(entry)], [delete])).succeeded
        if done and entry.is_reservation:
            await quietly(self._records.unsign(entry.key))
        return done

    async def reserve(self, lease: Lease, revision: int) -> bool:
        """Make a record without an etcd lease, if no record was written since the census of `revision`."""
        untouched = pb.Compare(
            result=pb.Compare.LESS,
            target=pb.Compare.MOD,
            key=self._records.first,
            range_end=self._records.end,
            mod_revision=revision + 1,
        )
        put = self._records.put(lease._replace(etcd_lease_id=0))
        return (await self._client.txn([untouched, *self._records.free(lease)], [put])).succeeded

    async def keep(self, entry: Entry) -> bool:
        """Take a record off its etcd lease, value unchanged: it becomes a reservation."""
        return await self._rewrite(entry, 0)

    async def let_expire(self, entry: Entry) -> bool:
        """Put a record on an etcd lease of 24 hours, value unchanged: a reservation becomes a lease."""
        grant = await self._client.grant(self._records.ttl)
        try:
            done = await self._rewrite(entry, grant)
        except StoreError:
            # Also ends a write whose answer got lost; but never with the record on it.
            await self._records.retire(grant)
            raise
        if not done:
            await quietly(self._client.revoke(grant))
        return done

    async def set_config(self, text: str, revision: int) -> bool:
        """Write the config if its last change is still that of `revision`; 0 = there is none."""
        compare = pb.Compare(
            result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=self._config_key, mod_revision=revision
        )
        put = pb.RequestOp(request_put=pb.PutRequest(key=self._config_key, value=text.encode()))
        return (await self._client.txn([compare], [put])).succeeded

    async def _rewrite(self, entry: Entry, lease_id: int) -> bool:
        put = pb.PutRequest(key=self._key(entry), value=entry.value, lease=lease_id)
        return (await self._client.txn([self._unchanged(entry)], [pb.RequestOp(request_put=put)])).succeeded

    def _key(self, entry: Entry) -> bytes:
        return self._records.first + entry.raw_key

    def _unchanged(self, entry: Entry) -> pb.Compare:
        return pb.Compare(
            result=pb.Compare.EQUAL,
            target=pb.Compare.MOD,
            key=self._key(entry),
            mod_revision=entry.revision,
        )


def _config(reply: pb.RangeResponse) -> tuple[str | None, int]:
    if not reply.kvs:
        return None, 0
    return reply.kvs[0].value.decode("utf-8", "replace"), reply.kvs[0].mod_revision


def _entry(kv: pb.KeyValue, skip: int, seconds_left: int | None) -> Entry:
    """A record as it is, whatever it is."""
    record = record_of(kv, skip)
    lease, problem = None, ""
    subnets: Subnets = (None, None)
    try:
        subnets = parse_key(record.key)
        lease = read_lease(record)
    except ValueError as error:
        problem = reason_of(error)
    return Entry(
        record.key, kv.key[skip:], kv.value, subnets, lease, problem,
        record.created, record.revision, record.etcd_lease_id, seconds_left,
    )  # fmt: skip
