"""Thousands of nodes: how many requests of etcd a start, a day and an outage cost each of them."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from random import Random

import pytest

from flannelpy.model.config import parse_config
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import encode_attrs
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.store_contract import NOTHING, Updates, attrs, offer
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd

CONFIG = parse_config('{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}')
PEERS = 5000
HERD = 500
MARGIN_MINUTES = 60


class Member:
    """A node's store with a connection of its own, up to the first updates of its watch."""

    def __init__(self, endpoint: str, prefix: str, number: int) -> None:
        self._client = EtcdClient([endpoint], call_timeout=30, connect_timeout=30)
        self.store = EtcdStore(self._client, prefix, random=Random(number))
        self._number = number
        self._closing = AsyncExitStack()

    async def start(self) -> Lease:
        """What a daemon asks at its start."""
        async with aclosing(self.store.watch_config()) as texts:
            parse_config(str(await anext(texts)))
        own = await self.store.acquire(CONFIG, offer(self._number), NOTHING)
        self.updates = Updates(await self._closing.enter_async_context(aclosing(self.store.watch())))
        await self.updates.until(lambda u: len(u.seen) > 1, 60)
        return own

    async def close(self) -> None:
        await self._closing.aclose()
        await self.store.close()


@asynccontextmanager
async def herd(endpoint: str, prefix: str, size: int) -> AsyncIterator[list[Member]]:
    members = [Member(endpoint, prefix, number) for number in range(1, size + 1)]
    try:
        yield members
    finally:
        await asyncio.gather(*(member.close() for member in members))


def requests(members: Sequence[Member]) -> Counter[str]:
    return sum((member.store.requests for member in members), Counter[str]())


async def put_peers(client: EtcdClient, prefix: str) -> None:
    """Leases of as many other nodes, or all of them renewed; 100 in a transaction."""
    lease = await client.grant(3600)
    for start in range(0, PEERS, 100):
        puts = []
        for number in range(start, start + 100):
            key = f"{prefix}/subnets/10.{200 + number // 250}.{number % 250}.0-24".encode()
            value = encode_attrs(attrs(1000 + number)).encode()
            puts.append(pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease)))
        await client.txn([], puts)


def test_five_hundred_nodes_start_at_once(shared_etcd: EtcdProcess, prefix: str) -> None:
    shared_etcd.ctl("put", f"{prefix}/config", '{"Network":"10.0.0.0/14"}')

    async def scenario() -> Counter[str]:
        async with herd(shared_etcd.endpoint, prefix, HERD) as members:
            async with asyncio.timeout(60):
                leases = await asyncio.gather(*(member.start() for member in members))
            assert len({lease.subnet for lease in leases}) == HERD
            return requests(members)

    counted = asyncio.run(scenario())
    sys.stderr.write(f"\n{HERD} nodes start at once: {dict(counted)}\n")
    lost_races = counted.pop("txn") - HERD
    assert counted == {"range": 2 * HERD, "grant": HERD, "watch": HERD}
    assert 0 <= lost_races < HERD / 4


def test_a_day_of_five_thousand_nodes(shared_etcd: EtcdProcess, prefix: str) -> None:
    """A node among them sees each renewal of each of them, and asks for nothing because of that."""
    shared_etcd.ctl("put", f"{prefix}/config", '{"Network":"10.0.0.0/8"}')

    async def scenario() -> None:
        async with herd(shared_etcd.endpoint, prefix, 2) as (other, node):
            await put_peers(other._client, prefix)
            own = await node.start()
            start = Counter(node.store.requests)
            assert start == {"range": 2, "grant": 1, "txn": 1, "watch": 1}
            revision = max(lease.revision for lease in node.updates.table.values())
            await put_peers(other._client, prefix)
            await node.updates.until(
                lambda u: sum(lease.revision > revision for lease in u.table.values()) == PEERS, 30
            )
            assert node.store.requests == start, "no request per peer and event"
            assert await node.store.renew(own) is not None
            renewal = node.store.requests - start
            assert renewal == {"grant": 1, "txn": 1, "ttl": 1, "revoke": 1}

    asyncio.run(scenario())
