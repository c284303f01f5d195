"""Which history it is, told by the records: a disk that was set back has its cluster id, and may be ahead."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from flannelpy.model.lease import Snapshot
from flannelpy.model.subnet import encode_attrs
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.conftest import Start
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import NOTHING, V4, Updates, attrs, offer
from tests.etcd.test_etcd_store import EtcdLab, lab
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd

ONE, TWO, NINE = "10.5.1.0-24", "10.5.2.0-24", "10.5.9.0-24"


def copy_disk(etcd: EtcdProcess) -> Path:
    """What a snapshot of the machine's disk holds."""
    etcd.kill()
    copy = etcd.directory / "copy"
    shutil.copytree(etcd.directory / "data", copy)
    etcd.start()
    return copy


def set_back(etcd: EtcdProcess, copy: Path) -> None:
    """The disk as it was then."""
    etcd.kill()
    shutil.rmtree(etcd.directory / "data")
    shutil.copytree(copy, etcd.directory / "data")
    etcd.start()


def value(number: int) -> bytes:
    return encode_attrs(attrs(number)).encode()


def has(records: dict[str, tuple[bytes, int]]) -> Callable[[Updates], bool]:
    """Whether a node knows exactly these."""
    leases = {key: lease_id for key, (_value, lease_id) in records.items()}
    return lambda updates: {key: one.etcd_lease_id for key, one in updates.table.items()} == leases


class Follower:
    """A node behind a proxy, and the etcd that it follows."""

    def __init__(self, etcd: EtcdProcess, proxy: Proxy, etcd_lab: EtcdLab, node: EtcdStore) -> None:
        self.etcd, self.proxy, self.lab, self.node = etcd, proxy, etcd_lab, node

    async def revision(self) -> int:
        return (await self.lab.client.range(b"x")).header.revision

    async def pass_by(self, revision: int) -> None:
        """Other users of etcd bring its revision so far."""
        while await self.revision() <= revision:
            await self.lab._write("other", b"x")


@asynccontextmanager
async def followed(etcd: EtcdProcess) -> AsyncIterator[Follower]:
    async with Proxy(etcd.port) as proxy, lab(etcd.endpoint) as etcd_lab:
        client = EtcdClient([proxy.endpoint])
        try:
            yield Follower(etcd, proxy, etcd_lab, EtcdStore(client, "/net"))
        finally:
            await client.close()


async def nothing(_follower: Follower) -> None:
    """Nobody wrote a lease since the backup, but others wrote."""


async def a_put(follower: Follower) -> None:
    await follower.lab.put(NINE, value(9))


async def a_renewal(follower: Follower) -> None:
    await follower.lab.put(TWO, value(2))


async def a_deletion(follower: Follower) -> None:
    await follower.lab.delete(TWO)


async def another_renewal(follower: Follower) -> None:
    await follower.lab.put(TWO, value(3))


CASES = {
    "a put was lost": (a_put, nothing, True),
    "a renewal was lost": (a_renewal, nothing, True),
    "a deletion was lost": (a_deletion, nothing, True),
    "the same was written again": (a_renewal, a_renewal, True),
    "only others' writes were lost": (nothing, nothing, False),
    "only others' writes were lost, a lease was written instead": (nothing, another_renewal, True),
}
"""(what happened after the backup, what happens after it was restored, whether that is another history)."""


@pytest.mark.parametrize(
    ("lost", "instead", "is_new"), CASES.values(), ids=[name.replace(" ", "-") for name in CASES]
)
def test_a_disk_that_was_set_back_while_we_were_cut_off_and_has_overtaken_us(
    lost: Callable[[Follower], Awaitable[None]],
    instead: Callable[[Follower], Awaitable[None]],
    start_etcd: Start,
    *,
    is_new: bool,
) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with followed(etcd) as one:
            await one.lab.put(ONE, value(1))
            await one.lab.put(TWO, value(2))
            copy = await asyncio.to_thread(copy_disk, etcd)
            async with aclosing(one.node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                await lost(one)
                await one.pass_by(await one.revision() + 5)
                await updates.until(has(await one.lab.records()))
                last, seen = await one.revision(), one.node._seen
                assert seen.head is not None
                seen.head = seen.head._replace(revision=last)  # what a progress notification tells
                one.proxy.cut()
                await asyncio.to_thread(set_back, etcd, copy)
                await instead(one)
                await one.pass_by(last)
                while (await one.lab.client.range(b"x")).header.raft_term < seen.head.term:
                    await asyncio.to_thread(etcd.restart)
                before = len(updates.seen)
                await one.proxy.heal()
                await one.lab.put("10.5.8.0-24", value(8))
                await updates.until(has(await one.lab.records()), 20)
                told = [update for update in updates.seen[before:] if isinstance(update, Snapshot)]
                assert [update.new_history for update in told] == [True] * is_new

    asyncio.run(scenario())


def test_a_connection_that_was_lost_costs_no_request(start_etcd: Start) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with followed(etcd) as one:
            await one.node.acquire(V4, offer(1), NOTHING)
            async with aclosing(one.node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 2)
                before = dict(one.node.requests)
                for number in range(2, 5):
                    one.proxy.cut()
                    await one.lab.put(f"10.5.{number}.0-24", value(number))
                    await one.proxy.heal()
                    await updates.until(has(await one.lab.records()))
                assert sum(isinstance(update, Snapshot) for update in updates.seen) == 1
                asked = {kind: count - before.get(kind, 0) for kind, count in one.node.requests.items()}
                assert {kind for kind, count in asked.items() if count} == {"watch"}

    asyncio.run(scenario())
