"""An operator's hand in etcd: everything is seen, every change compares first, a node's life goes on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import NamedTuple

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import parse_key
from flannelpy.store import TTL_SECONDS, etcd_admin
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_admin import EtcdAdmin
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.store_contract import NOTHING, V4, offer
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd


class Lab(NamedTuple):
    client: EtcdClient
    admin: EtcdAdmin
    node: EtcdStore
    prefix: str

    async def put(self, key: str | bytes, value: bytes = b"{}", *, lease: int = 0) -> None:
        name = key if isinstance(key, bytes) else f"{self.prefix}/{key}".encode()
        put = pb.PutRequest(key=name, value=value, lease=lease)
        assert (await self.client.txn([], [pb.RequestOp(request_put=put)])).succeeded


def run(etcd: EtcdProcess, prefix: str, scenario: Callable[[Lab], Awaitable[None]]) -> None:
    @contextlib.asynccontextmanager
    async def lab() -> AsyncIterator[Lab]:
        client = EtcdClient([etcd.endpoint])
        try:
            yield Lab(client, EtcdAdmin(client, prefix), EtcdStore(client, prefix, random=Random(1)), prefix)
        finally:
            await client.close()

    async def go() -> None:
        async with lab() as made:
            await scenario(made)

    asyncio.run(go())


def reservation(key: str) -> Lease:
    return Lease(key, *parse_key(key), LeaseAttrs(None, None, ""))


def test_a_census_sees_everything_and_nothing_else(
    shared_etcd: EtcdProcess, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_admin, "_PAGE", 3)

    async def scenario(lab: Lab) -> None:
        assert await lab.admin.config() == (None, 0)
        empty = await lab.admin.census(lifetimes=True)
        assert (empty.config_text, empty.entries, empty.beside) == (None, (), ())
        grant = await lab.client.grant(100)
        await lab.put("config", b"the text")
        for number in range(8):
            await lab.put(f"subnets/10.5.{number}.0-24", b'{"PublicIP":"192.0.2.1"}', lease=grant)
        await lab.put("subnets/10.5.8.0-24", b"\xff")
        await lab.put(f"{prefix}/subnets/\xff\x1b".encode("latin-1"))
        await lab.put("subnets/", b"x")
        for beside in ("subnets", "subnets-old/10.5.1.0-24", "subnetsx"):
            await lab.put(beside)
        await lab.put("subnetr")
        await lab.put("subnett")
        census = await lab.admin.census(lifetimes=True)
        assert census.config_text == "the text"
        assert [entry.key for entry in census.entries] == [
            "", *(f"10.5.{number}.0-24" for number in range(9)), r"\\xff\x1b",
        ]  # fmt: skip
        assert census.entries[-1].raw_key == b"\xff\x1b"
        assert [entry.lease is None for entry in census.entries] == [True, *[False] * 8, True, True]
        assert {entry.seconds_left for entry in census.entries[1:9]} <= set(range(90, 101))
        assert [census.entries[i].seconds_left for i in (0, 9)] == [None, None]
        assert census.beside == tuple(
            f"{prefix}/{x}" for x in ("subnets", "subnets-old/10.5.1.0-24", "subnetsx")
        )
        # One request for the one etcd lease, whatever hangs on it.
        before = lab.client.requests["ttl"]
        await lab.admin.census(lifetimes=True)
        assert lab.client.requests["ttl"] == before + 1
        monkeypatch.setattr(etcd_admin, "MOST_KEYS", 5)
        with pytest.raises(StoreError, match="check --etcd-prefix"):
            await lab.admin.census(lifetimes=False)

    run(shared_etcd, prefix, scenario)


def test_pages_are_of_one_revision(
    shared_etcd: EtcdProcess, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_admin, "_PAGE", 1)

    async def scenario(lab: Lab) -> None:
        for number in (1, 2, 3):
            await lab.put(f"subnets/10.5.{number}.0-24")
        real = lab.client.range
        asked = 0

        async def meddled(key: bytes, end: bytes = b"", **options: int) -> pb.RangeResponse:
            nonlocal asked
            asked += 1
            if asked == 3:  # the config and one page were read
                await lab.put("subnets/10.5.9.0-24")
                await lab.put("subnets/10.5.2.0-24", b"new")
            return await real(key, end, **options)

        monkeypatch.setattr(lab.client, "range", meddled)
        census = await lab.admin.census(lifetimes=False)
        assert [(entry.key, entry.value) for entry in census.entries] == [
            (f"10.5.{number}.0-24", b"{}") for number in (1, 2, 3)
        ]

    run(shared_etcd, prefix, scenario)


@pytest.mark.parametrize("action", ["remove", "keep", "let_expire"])
def test_a_record_that_changed_is_left_alone(shared_etcd: EtcdProcess, prefix: str, action: str) -> None:
    async def scenario(lab: Lab) -> None:
        own = await lab.node.acquire(V4, offer(1), NOTHING)
        (seen,) = (await lab.admin.census(lifetimes=False)).entries
        assert await lab.node.renew(own) is not None
        (now,) = (await lab.admin.census(lifetimes=False)).entries
        grants = lab.client.requests["grant"] - lab.client.requests["revoke"]
        assert await getattr(lab.admin, action)(seen) is False
        assert (await lab.admin.census(lifetimes=False)).entries == (now,)
        assert lab.client.requests["grant"] - lab.client.requests["revoke"] == grants, "no grant is left over"
        assert await getattr(lab.admin, action)(now) is True

    run(shared_etcd, prefix, scenario)


def test_an_unreadable_key_is_removed_by_its_bytes(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario(lab: Lab) -> None:
        await lab.put(f"{prefix}/subnets/".encode() + b"\xff\x00" + b"x" * 200)
        await lab.put("subnets/10.5.1.0-24")
        entries = (await lab.admin.census(lifetimes=False)).entries
        assert await lab.admin.remove(entries[1])
        assert (await lab.admin.census(lifetimes=False)).entries == entries[:1]

    run(shared_etcd, prefix, scenario)


def test_a_node_keeps_its_subnet_through_reservation_and_back(shared_etcd: EtcdProcess, prefix: str) -> None:
    """Its key is never absent, so no peer ever withdraws its route."""

    async def scenario(lab: Lab) -> None:
        own = await lab.node.acquire(V4, offer(1), NOTHING)
        for write, reserved in ((lab.admin.keep, True), (lab.admin.let_expire, False)):
            (entry,) = (await lab.admin.census(lifetimes=False)).entries
            assert await write(entry)
            (entry,) = (await lab.admin.census(lifetimes=True)).entries
            assert (entry.is_reservation, entry.created) == (reserved, own.created)
            assert reserved or TTL_SECONDS - 5 <= (entry.seconds_left or 0) <= TTL_SECONDS
            assert await lab.node.renew(own) is None, "the daemon notices"
            own = await lab.node.acquire(V4, offer(1), NOTHING)
            assert (own.key, own.etcd_lease_id == 0) == (entry.key, reserved)
            renewed = await lab.node.renew(own)
            assert renewed is not None
            own = renewed
            assert (own.etcd_lease_id == 0) is reserved, "and it stays so"

    run(shared_etcd, prefix, scenario)


def test_nothing_of_a_released_reservation_stays(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario(lab: Lab) -> None:
        grant = await lab.client.grant(100)
        for number, lease in ((1, 0), (2, grant)):
            await lab.put(f"subnets/10.5.{number}.0-24", b'{"PublicIP":"192.0.2.1"}', lease=lease)
            await lab.put(f"flannelpy/nodes/10.5.{number}.0-24", b"signed", lease=lease)
        census = await lab.admin.census(lifetimes=False)
        assert [await lab.admin.signature(entry) for entry in census.entries] == ["signed", "signed"]
        for entry in census.entries:
            assert await lab.admin.remove(entry)
        left = await lab.client.range(f"{prefix}/flannelpy/".encode(), f"{prefix}/flannelpy0".encode())
        assert [(kv.key[-11:], kv.lease) for kv in left.kvs] == [(b"10.5.2.0-24", grant)], "it will expire"

    run(shared_etcd, prefix, scenario)


def test_a_reservation_is_for_its_node_alone(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario(lab: Lab) -> None:
        (public_ip, *_) = offer(1)(None, ())
        wanted = Lease("10.5.77.0-24", *parse_key("10.5.77.0-24"), LeaseAttrs(public_ip, None, ""))
        revision = (await lab.admin.census(lifetimes=False)).revision
        assert await lab.admin.reserve(wanted, revision)
        other = await lab.node.acquire(V4, offer(2), NOTHING)
        own = await lab.node.acquire(V4, offer(1), NOTHING)
        assert (own.key, own.etcd_lease_id, own.attrs.backend_type) == ("10.5.77.0-24", 0, "vxlan")
        assert other.key != own.key

    run(shared_etcd, prefix, scenario)


def test_a_reservation_is_made_only_in_the_network_that_was_looked_at(
    shared_etcd: EtcdProcess, prefix: str
) -> None:
    async def scenario(lab: Lab) -> None:
        wanted = reservation("10.5.77.0-24")
        seen = (await lab.admin.census(lifetimes=False)).revision
        await lab.put("elsewhere")
        await lab.put("subnets/10.5.76.0-23")
        assert not await lab.admin.reserve(wanted, seen)
        assert len((await lab.admin.census(lifetimes=False)).entries) == 1
        seen = (await lab.admin.census(lifetimes=False)).revision
        await lab.put("subnets-old/x")
        assert await lab.admin.reserve(wanted, seen)
        assert not await lab.admin.reserve(wanted, seen + 100), "the key is there"

    run(shared_etcd, prefix, scenario)


def test_the_config_is_written_over_what_was_seen_only(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario(lab: Lab) -> None:
        assert await lab.admin.set_config("one", 0)
        assert not await lab.admin.set_config("two", 0)
        text, revision = await lab.admin.config()
        assert text == "one"
        assert await lab.admin.set_config("two", revision)
        assert not await lab.admin.set_config("three", revision)
        assert (await lab.admin.config())[0] == "two"

    run(shared_etcd, prefix, scenario)
