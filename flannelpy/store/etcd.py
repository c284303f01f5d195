"""Leases in etcd, as flannel keeps them: `<prefix>/config`, and a key under `<prefix>/subnets/` per node.

A claim is a key on an etcd lease (a TTL object) of our own. Every write compares first: a create wants the
key absent, a takeover and a renewal want the record as we saw it. A key without an etcd lease is a
reservation that an operator made; it stays one.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from random import Random, SystemRandom

from flannelpy.errors import StoreError
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Delta, Lease, LeaseUpdate, Snapshot
from flannelpy.model.subnet import Previous, encode_attrs
from flannelpy.store import TTL_SECONDS, Head, Marks, Offer, Running
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.decision import lacks_most
from flannelpy.store.etcd_acquire import Acquisition
from flannelpy.store.etcd_client import EtcdClient, OutcomeUnknownError
from flannelpy.store.etcd_codec import changes_of, read_changes
from flannelpy.store.etcd_records import EtcdRecords, State, head_of, quietly
from flannelpy.store.retry import Retry
from flannelpy.store.seen import Seen

_SECOND_LOOK_SECONDS = 1.0
"""Before a listing without most of the peers is believed it is read again."""
_REPEAT_SECONDS = 5.0
"""A watch that resumes gets the last change that was seen at once; after so long all records are read."""


class EtcdStore:
    """The Store in etcd; owns the client.

    `on_trouble` is told in one line why a watch cannot go on, and None once all of them stand again.
    """

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        *,
        ttl: int = TTL_SECONDS,
        random: Random | None = None,
        on_trouble: Callable[[str | None], None] | None = None,
    ) -> None:
        prefix = clean_prefix(prefix)
        self._client = client
        self._random = random or SystemRandom()
        self._on_trouble = on_trouble
        self._troubles: dict[str, str] = {}
        self._config_key = f"{prefix}/config".encode()
        self._records = EtcdRecords(client, prefix, ttl)
        self._handed: State | None = None
        self._replaced: str | None = None
        self._watching = False
        self._seen = Seen()
        """What the watch has told about."""
        self._doubtful: set[int] = set()
        self.config_place = f"{prefix}/config in etcd ({client.place})"

    @property
    def requests(self) -> Counter[str]:
        """How many requests of each kind were sent."""
        return self._client.requests

    @property
    def head(self) -> Head | None:
        """See Store."""
        return self._seen.head

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    async def watch_config(self) -> AsyncGenerator[str | None, None]:
        """The config's text now and whenever it changes; None while there is none.

        Raises StoreError only before the first item, and only if waiting cannot help (`transient` is False).
        """
        retry = Retry(self._random, partial(self._report, "config"))
        known: tuple[str | None] | None = None
        while True:
            try:
                async with aclosing(self._config_texts(retry)) as texts:
                    async for text in texts:
                        if known != (text,):
                            known = (text,)
                            yield text
            except StoreError as error:
                if known is None and not error.transient:
                    raise
                await retry.failed(str(error))

    async def _config_texts(self, retry: Retry) -> AsyncGenerator[str | None, None]:
        """The config as read, and after each change, until the watch ends."""
        reply = await self._client.range(self._config_key)
        retry.succeeded()  # a start needs no more than this
        yield _text(reply.kvs[0].value) if reply.kvs else None
        watch = self._client.watch(self._config_key, b"", reply.header.revision + 1)
        async with aclosing(watch) as responses:
            async for response in responses:
                if response.created:
                    retry.succeeded()
                for event in response.events[-1:]:
                    yield None if event.type == pb.Event.DELETE else _text(event.kv.value)

    def remember(self, head: Head, marks: Marks) -> None:
        """See Store."""
        self._seen.remember(head, marks)

    async def acquire(
        self, config: NetworkConfig, offer: Offer, previous: Previous, running: Running | None = None
    ) -> Lease:
        """Claim a subnet; see Store. A `watch` that follows begins with the listing that was made for it."""
        seen, watching = self._seen.copy(), self._watching
        acquisition = Acquisition(
            self._records, config, offer, previous, self._random, running, seen, watching=watching
        )
        own, state = await acquisition.run()
        self._replaced = acquisition.replaced
        if not self._watching:
            self._handed = state
        self._doubtful.clear()
        return own

    @property
    def replaced(self) -> str | None:
        """See Store."""
        return self._replaced

    async def sign(self, own: Lease, identity: str) -> None:
        """See Store."""
        with suppress(StoreError):
            await self._records.sign(own, identity)

    async def signature(self, key: str) -> str | None:
        """See Store."""
        with suppress(StoreError):
            return await self._records.signature(key)
        return None

    async def renew(self, own: Lease) -> Lease | None:
        """Write `own` again, on a new etcd lease, if the record is still as we wrote it; None if it is not.

        If the answer got lost, the record is read; if that fails, too, the next renewal finds out.
        """
        grant = await self._client.grant(self._records.ttl) if own.etcd_lease_id else 0
        wanted = own._replace(etcd_lease_id=grant)
        read = pb.RequestOp(request_range=pb.RangeRequest(key=self._records.key(own.key)))
        try:
            reply = await self._client.txn(self._records.unchanged(own), [self._records.put(wanted)], [read])
        except OutcomeUnknownError:
            self._doubtful.add(grant)
            return await self._after_lost_answer(own)
        except StoreError:
            if grant:
                await quietly(self._client.revoke(grant))
            raise
        if reply.succeeded:
            renewed: Lease | None = wanted._replace(revision=reply.header.revision)
        else:
            renewed = self._ours_after_all(own, reply.responses[0].response_range)
            if grant:
                await quietly(self._client.revoke(grant))
        return await self._settled(own, renewed)

    async def _after_lost_answer(self, own: Lease) -> Lease | None:
        reply = await self._client.range(self._records.key(own.key))
        if reply.kvs and reply.kvs[0].mod_revision == own.revision:
            raise StoreError("etcd did not confirm the renewal of our lease", transient=True)
        return await self._settled(own, self._ours_after_all(own, reply))

    def _ours_after_all(self, own: Lease, reply: pb.RangeResponse) -> Lease | None:
        """Our lease, if the record's last change is a renewal of ours whose answer got lost."""
        for kv in reply.kvs:
            if kv.lease in self._doubtful and kv.value == encode_attrs(own.attrs).encode():
                return own._replace(revision=kv.mod_revision, etcd_lease_id=kv.lease)
        return None

    async def _settled(self, own: Lease, renewed: Lease | None) -> Lease | None:
        self._doubtful.clear()
        if renewed is not None and renewed.etcd_lease_id != own.etcd_lease_id:
            await self._records.retire(own.etcd_lease_id)
        return renewed

    async def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        """All leases; see Store. Begins with the listing of the last `acquire`, if no other watch took it."""
        retry = Retry(self._random, partial(self._report, "leases"))
        state, self._handed = self._handed, None
        self._watching = True
        listed, resumes = False, state is not None  # a listing that was handed on is not of this moment
        while True:
            try:
                if not listed:
                    state = state or await self._records.read_all()
                    yield self._told(await self._confirmed(state))
                    listed, state = True, None
                async with aclosing(self._follow(retry, resumes=resumes)) as updates:
                    async for update in updates:
                        yield update
                resumes = False
            except StoreError as error:
                resumes = listed
                await retry.failed(str(error))

    async def _follow(self, retry: Retry, *, resumes: bool) -> AsyncGenerator[LeaseUpdate, None]:
        """Each update from the head on; ends with a Snapshot if deltas were lost, or belong elsewhere.

        A watch that resumes begins with the last change that was seen: if that does not come back, or others
        beside it, this is another history, whatever its revision.
        """
        seen = self._seen
        head = seen.head
        assert head is not None  # noqa: S101  # there was a listing
        repeats = resumes and seen.last > 0
        start = seen.last if repeats else head.revision + 1
        watch = self._client.watch(self._records.first, self._records.end, start)
        async with aclosing(watch) as responses:
            while True:
                response = await _next(responses, _REPEAT_SECONDS if repeats else None)
                if response is None or response.compact_revision:
                    yield self._told(await self._confirmed(await self._records.read_all()))
                    return
                if response.created:
                    retry.succeeded()
                    # A watch from a revision that this history has not reached would be deaf, and not say so.
                    if head_of(response.header).contradicts(head):
                        state = await self._records.read_all()
                        if seen.is_contradicted(state.listing, state.head):
                            yield self._told(state)
                            return
                    yield Delta((), (), head.revision)
                    continue
                changes = changes_of(response.events, len(self._records.first))
                again = [change for change in changes if change[1].revision <= head.revision]
                is_other_start = repeats and bool(changes) and not seen.begins_with(changes[0])
                is_another = is_other_start or not seen.explains(again)
                if is_another or (repeats and not changes):
                    yield self._told(await self._records.read_all(), is_another=is_another)
                    return
                repeats = False
                head = _advanced(head, response)
                update = read_changes(changes[len(again) :], head.revision)
                seen.take_changes(update, head, changes[-1][1].revision if changes else 0)
                yield update

    async def _confirmed(self, state: State) -> State:
        """A listing, read again if it lacks so much that a mistake is likely."""
        seen = self._seen
        is_same_history = seen.head is not None and not seen.is_contradicted(state.listing, state.head)
        if is_same_history and lacks_most(seen.marks, state.listing):
            await asyncio.sleep(_SECOND_LOOK_SECONDS)
            return await self._records.read_all()
        return state

    def _told(self, state: State, *, is_another: bool = False) -> Snapshot:
        """The listing for the world; from here on it is what we have seen."""
        new_history = is_another or self._seen.is_contradicted(state.listing, state.head)
        self._seen.take_listing(state.listing, state.head)
        return state.listing.snapshot()._replace(new_history=new_history)

    def _report(self, watch: str, reason: str | None) -> None:
        before = next(iter(self._troubles.values()), None)
        if reason is None:
            self._troubles.pop(watch, None)
        else:
            self._troubles[watch] = reason
        now = next(iter(self._troubles.values()), None)
        if now != before and self._on_trouble is not None:
            self._on_trouble(now)


def clean_prefix(prefix: str) -> str:
    """The prefix as flannel uses it: no slash at the end, none doubled."""
    parts = [part for part in prefix.split("/") if part]
    return "/" * prefix.startswith("/") + "/".join(parts) if parts else ""


async def _next(
    responses: AsyncGenerator[pb.WatchResponse, None], seconds: float | None
) -> pb.WatchResponse | None:
    """The next response; None if there is none within this time."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(responses)
    except TimeoutError:
        return None


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _advanced(head: Head, response: pb.WatchResponse) -> Head:
    """How far a response brings us.

    With events: to the last of them, not to the header. A watch that catches up gets 1,000 revisions at a
    time, all under the header of the newest one. Without: it is a progress notification, which the server
    sends by itself only to a watch that has everything.
    """
    revision = response.events[-1].kv.mod_revision if response.events else response.header.revision
    return Head(head.cluster, max(head.term, response.header.raft_term), max(head.revision, revision))
