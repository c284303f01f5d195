"""The etcd store keeps the contract on a real etcd, and survives what happens to one."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from random import Random
from typing import Any

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.config import parse_config
from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.model.subnet import encode_attrs
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient, OutcomeUnknownError
from tests.etcd.conftest import Start
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import DUAL, NOTHING, V4, StoreContract, Updates, attrs, offer
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd


class EtcdLab:
    """Nodes share a client; `client` is also the back door."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self._nodes = 0

    def node(self, **options: Any) -> EtcdStore:
        self._nodes += 1
        return EtcdStore(self.client, self.prefix, random=Random(self._nodes), **options)

    async def put(self, key: str, value: bytes, *, leased: bool = True) -> int:
        lease_id = await self.client.grant(3600) if leased else 0
        await self._write(f"subnets/{key}", value, lease_id)
        return lease_id

    async def _write(self, name: str, value: bytes, lease_id: int = 0) -> None:
        key = f"{self.prefix}/{name}".encode()
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease_id))
        await self.client.txn([], [put])

    async def _remove(self, name: str) -> None:
        key = f"{self.prefix}/{name}".encode()
        await self.client.txn([], [pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))])

    async def delete(self, key: str) -> None:
        await self._remove(f"subnets/{key}")

    async def expire(self, lease_id: int) -> None:
        await self.client.revoke(lease_id)

    async def set_config(self, text: str | None) -> None:
        if text is None:
            await self._remove("config")
        else:
            await self._write("config", text.encode())

    async def records(self) -> dict[str, tuple[bytes, int]]:
        first = f"{self.prefix}/subnets/".encode()
        reply = await self.client.range(first, first[:-1] + b"0")
        return {kv.key[len(first) :].decode(): (kv.value, kv.lease) for kv in reply.kvs}


@asynccontextmanager
async def lab(endpoint: str, prefix: str = "/net", **options: Any) -> AsyncIterator[EtcdLab]:
    client = EtcdClient([endpoint], **options)
    try:
        yield EtcdLab(client, prefix)
    finally:
        await client.close()


class TestEtcdStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _etcd(self, shared_etcd: EtcdProcess, prefix: str) -> None:
        self.endpoint, self.prefix = shared_etcd.endpoint, prefix

    def run(self, scenario: Callable[[Any], Awaitable[None]]) -> None:
        async def wrapped() -> None:
            async with lab(self.endpoint, self.prefix) as etcd_lab:
                await scenario(etcd_lab)

        asyncio.run(wrapped())


def test_keys_and_values_are_flannels_byte_for_byte(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario() -> list[Lease]:
        async with lab(shared_etcd.endpoint, f"{prefix}//") as etcd_lab:
            one = await etcd_lab.node().acquire(V4, offer(1), NOTHING)
            two = await etcd_lab.node(ttl=1234).acquire(DUAL, offer(2, v6=True), NOTHING)
            return [one, two]

    one, two = asyncio.run(scenario())
    found = {
        base64.b64decode(kv["key"]).decode(): (base64.b64decode(kv["value"]).decode(), kv["lease"])
        for kv in shared_etcd.ctl_json("get", "--prefix", f"{prefix}/")["kvs"]
    }
    first = (
        '{"PublicIP":"192.0.0.1","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}'
    )
    second = (
        '{"PublicIP":"192.0.0.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},'
        '"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}'
    )
    assert found == {
        f"{prefix}/subnets/{one.key}": (first, one.etcd_lease_id),
        f"{prefix}/subnets/{two.key}": (second, two.etcd_lease_id),
    }
    for lease, ttl in ((one, 86_400), (two, 1234)):
        answer = shared_etcd.ctl_json("lease", "timetolive", f"{lease.etcd_lease_id:x}")
        assert answer["granted-ttl"] == ttl


def test_pairs_that_share_one_family_are_not_both_leased(shared_etcd: EtcdProcess, prefix: str) -> None:
    """Few IPv6 subnets, many IPv4 ones: the keys differ even where the IPv6 subnets do not."""
    config = parse_config(
        '{"Network":"10.4.0.0/14","EnableIPv6":true,"IPv6Network":"fd00::/59","IPv6SubnetLen":64}'
    )

    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            leases = await asyncio.gather(
                *(etcd_lab.node().acquire(config, offer(n, v6=True), NOTHING) for n in range(1, 26))
            )
            assert len({lease.subnet6 for lease in leases}) == 25
            assert set(await etcd_lab.records()) == {lease.key for lease in leases}

    asyncio.run(scenario())


def test_a_start_costs_a_constant_number_of_requests(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            for n in range(1, 30):
                await etcd_lab.put(f"10.5.{n + 100}.0-24", encode_attrs(attrs(n)).encode())
            etcd_lab.client.requests.clear()
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(99), NOTHING)
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
            assert len(updates.table) == 30
            assert updates.table[own.key] == own
            assert node.requests == {"range": 1, "grant": 1, "txn": 1, "watch": 1}

    asyncio.run(scenario())


def test_a_superseded_etcd_lease_is_revoked_unless_another_key_hangs_on_it(
    shared_etcd: EtcdProcess, prefix: str
) -> None:
    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            lonely = await node.renew(own)
            assert lonely is not None
            listed = shared_etcd.ctl("lease", "list")
            assert f"{own.etcd_lease_id:016x}" not in listed
            assert f"{lonely.etcd_lease_id:016x}" in listed

            await etcd_lab._write("other", b"precious", lonely.etcd_lease_id)
            again = await node.acquire(V4, offer(1), NOTHING)
            assert again.etcd_lease_id != lonely.etcd_lease_id
            assert (await etcd_lab.client.range(f"{prefix}/other".encode())).kvs

    asyncio.run(scenario())


def test_neighbouring_prefixes_are_not_ours(shared_etcd: EtcdProcess, prefix: str) -> None:
    value = encode_attrs(attrs(5)).encode()

    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            node = etcd_lab.node()
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                for name in ("subnets", "subnets-old/10.5.1.0-24", "subnets0/10.5.1.0-24"):
                    await etcd_lab._write(name, value)
                await etcd_lab.put("10.5.2.0-24", value)
                await updates.until(lambda u: bool(u.table))
                assert list(updates.table) == ["10.5.2.0-24"]
                assert not updates.unreadable
                assert len(updates.seen) == 3

    asyncio.run(scenario())


def test_events_of_one_transaction_are_one_delta(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            lease_id = await etcd_lab.put("10.5.1.0-24", encode_attrs(attrs(1)).encode())
            for n in (2, 3):
                await etcd_lab._write(f"subnets/10.5.{n}.0-24", encode_attrs(attrs(n)).encode(), lease_id)
            async with aclosing(etcd_lab.node().watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                await etcd_lab.expire(lease_id)
                await updates.until(lambda u: not u.table)
                last = updates.seen[-1]
                assert isinstance(last, Delta)
                assert set(last.gone) == {f"10.5.{n}.0-24" for n in (1, 2, 3)}

    asyncio.run(scenario())


@pytest.mark.parametrize("compacted", [False, True], ids=["resumes", "compacted"])
def test_a_cut_connection_loses_nothing(shared_etcd: EtcdProcess, prefix: str, *, compacted: bool) -> None:
    async def scenario() -> None:
        async with Proxy(shared_etcd.port) as proxy, lab(shared_etcd.endpoint, prefix) as etcd_lab:
            troubles: asyncio.Queue[str | None] = asyncio.Queue()
            client = EtcdClient([proxy.endpoint])
            node = EtcdStore(client, prefix, on_trouble=troubles.put_nowait)
            for n in (1, 2, 3):
                await etcd_lab.put(f"10.5.{n}.0-24", encode_attrs(attrs(n)).encode())
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                next_update = asyncio.create_task(updates.until(lambda u: "10.5.9.0-24" in u.table))
                proxy.cut()
                await etcd_lab.delete("10.5.1.0-24")
                await etcd_lab.put("10.5.2.0-24", encode_attrs(attrs(2, vni=5)).encode())
                await etcd_lab.put("10.5.9.0-24", encode_attrs(attrs(9)).encode())
                if compacted:
                    revision = shared_etcd.ctl_json("get", "x")["header"]["revision"]
                    shared_etcd.ctl("compact", str(revision))
                async with asyncio.timeout(10):
                    assert "connection refused" in str(await troubles.get())
                await proxy.heal()
                await next_update
                await updates.until(lambda u: "10.5.1.0-24" not in u.table)
                assert updates.table["10.5.2.0-24"].attrs == attrs(2, vni=5)
                assert sorted(updates.table) == ["10.5.2.0-24", "10.5.3.0-24", "10.5.9.0-24"]
                assert any(isinstance(u, Snapshot) for u in updates.seen[1:]) is compacted
            assert troubles.get_nowait() is None
            assert troubles.empty(), "said once, and once that it is over"
            await client.close()

    asyncio.run(scenario())


def test_a_long_absence_is_caught_up_in_full(shared_etcd: EtcdProcess, prefix: str) -> None:
    """A watch that catches up gets 1,000 revisions at a time, under a header that is ahead of them."""
    value = encode_attrs(attrs(1)).encode()

    async def scenario() -> None:
        async with lab(shared_etcd.endpoint, prefix) as etcd_lab:
            first = f"{prefix}/subnets/".encode()
            start = (await etcd_lab.client.range(first)).header.revision
            for batch in range(15):
                await asyncio.gather(
                    *(etcd_lab.put(f"10.{batch}.{n}.0-24", value, leased=False) for n in range(1, 101))
                )
            stream = etcd_lab.client.watch(first, first[:-1] + b"0", start + 1)
            async with aclosing(stream) as responses, asyncio.timeout(10):
                batches: list[pb.WatchResponse] = []
                count = 0
                while count < 1500:
                    batches.append(await anext(responses))
                    count += len(batches[-1].events)
            with_events = [batch for batch in batches if batch.events]
            assert len(with_events) > 1
            assert with_events[0].header.revision > with_events[0].events[-1].kv.mod_revision

    asyncio.run(scenario())


@pytest.mark.parametrize("forget", [False, True], ids=["same-data", "new-history"])
def test_etcd_restarts_under_the_watch(start_etcd: Start, *, forget: bool) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab:
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            for n in (2, 3, 4):
                await etcd_lab.put(f"10.5.{n}.0-24", encode_attrs(attrs(n)).encode())
            config = node.watch_config()
            assert await anext(config) is None
            async with aclosing(config), aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.table) == 4)
                waiting = asyncio.create_task(updates.until(lambda u: "10.5.200.0-24" in u.table))
                text = asyncio.ensure_future(anext(config))
                await asyncio.to_thread(etcd.restart, forget=forget)
                value = encode_attrs(attrs(200)).encode().decode()
                await asyncio.to_thread(etcd.ctl, "put", "/net/subnets/10.5.200.0-24", value)
                await asyncio.to_thread(etcd.ctl, "put", "/net/config", "hello")
                async with asyncio.timeout(10):
                    await waiting
                    assert await text == "hello"
                left = {"10.5.200.0-24"} if forget else {own.key, "10.5.200.0-24"}
                assert left <= set(updates.table)
                assert len(updates.table) == (1 if forget else 5)
                assert any(isinstance(u, Snapshot) for u in updates.seen[1:]) is forget
                renewed = await node.renew(own)
                assert (renewed is None) is forget

    asyncio.run(scenario())


def test_what_etcd_says_by_itself_moves_the_resume_point(start_etcd: Start) -> None:
    """A network where nothing changes does not fall behind the compaction of a busy etcd."""
    etcd = start_etcd(flags=["--experimental-watch-progress-notify-interval=100ms"])

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab, aclosing(etcd_lab.node().watch()) as source:
            updates = Updates(source)
            await updates.until(lambda u: len(u.seen) > 1)
            start = updates.seen[-1].revision
            for _ in range(5):
                await etcd_lab.set_config("{}")
            await updates.until(lambda u: u.seen[-1].revision == start + 5)
            assert all(update == Delta((), (), update.revision) for update in updates.seen[1:])

    asyncio.run(scenario())


def test_a_hung_server_is_noticed(start_etcd: Start) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with lab(etcd.endpoint, connect_timeout=1.0, call_timeout=1.0) as etcd_lab:
            troubles: asyncio.Queue[str | None] = asyncio.Queue()
            node = etcd_lab.node(on_trouble=troubles.put_nowait)
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                waiting = asyncio.create_task(updates.until(lambda u: bool(u.table), 30))
                etcd.pause()
                async with asyncio.timeout(20):
                    assert "stopped answering" in str(await troubles.get())
                etcd.resume()
                async with asyncio.timeout(5):
                    assert await troubles.get() is None
                await etcd_lab.put("10.5.1.0-24", encode_attrs(attrs(1)).encode())
                await waiting

    asyncio.run(scenario())


class _Interrupted(EtcdClient):
    """Loses the connection around its first transaction."""

    def interrupt(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    async def txn(self, *arguments: Any) -> pb.TxnResponse:
        action, self._action = self._action, None
        if action is not None:
            action()
        return await super().txn(*arguments)


@pytest.mark.parametrize("arrives", [True, False], ids=["answer-lost", "request-lost"])
@pytest.mark.parametrize("known", [True, False], ids=["takeover", "create"])
def test_a_write_of_unknown_outcome_is_read_back(
    shared_etcd: EtcdProcess, prefix: str, *, known: bool, arrives: bool
) -> None:
    async def scenario() -> None:
        async with Proxy(shared_etcd.port) as proxy, lab(shared_etcd.endpoint, prefix) as etcd_lab:
            if known:
                await etcd_lab.put("10.5.1.0-24", encode_attrs(attrs(1)).encode())
            client = _Interrupted([proxy.endpoint], call_timeout=1.0)
            lose = proxy.lose_answers if arrives else proxy.lose_everything
            client.interrupt(lose)
            node = EtcdStore(client, prefix)
            own = await node.acquire(V4, offer(1), NOTHING)
            value = encode_attrs(attrs(1)).encode()
            assert await etcd_lab.records() == {own.key: (value, own.etcd_lease_id)}
            assert client.requests["grant"] == 1
            assert client.requests["txn"] == (1 if arrives else 2)

            client.interrupt(lose)
            if arrives:
                renewed = await node.renew(own)
                assert renewed is not None
            else:
                with pytest.raises(StoreError) as raised:
                    await node.renew(own)
                assert raised.value.transient
                renewed = await node.renew(own)
                assert renewed is not None
            assert await etcd_lab.records() == {own.key: (value, renewed.etcd_lease_id)}
            assert await node.renew(renewed) is not None
            await client.close()

    asyncio.run(scenario())


def test_a_renewal_whose_answer_got_lost_is_recognised_later(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario() -> None:
        async with Proxy(shared_etcd.port) as proxy:
            client = _Interrupted([proxy.endpoint], call_timeout=1.0, connect_timeout=1.0)
            client.interrupt(lambda: None)
            node = EtcdStore(client, prefix)
            own = await node.acquire(V4, offer(1), NOTHING)
            client.interrupt(proxy.lose_answers_for_good)
            with pytest.raises(StoreError) as raised:
                await node.renew(own)
            assert raised.value.transient
            assert not isinstance(raised.value, OutcomeUnknownError), "it tried to find out"
            await proxy.heal()
            renewed = await node.renew(own)
            assert renewed is not None
            assert renewed.revision > own.revision
            await client.close()

    asyncio.run(scenario())
