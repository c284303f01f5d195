"""The memory store keeps the contract, and goes through outages like etcd."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from random import Random
from typing import Any

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.lease import Snapshot
from flannelpy.store.memory import MemoryData, MemoryStore
from tests.etcd.store_contract import NOTHING, V4, StoreContract, Updates, offer


class MemoryLab:
    def __init__(self) -> None:
        self.data = MemoryData()
        self._nodes = 0

    def node(self) -> MemoryStore:
        self._nodes += 1
        return MemoryStore(self.data, random=Random(self._nodes))

    async def put(self, key: str, value: bytes, *, leased: bool = True) -> int:
        lease_id = self.data.grant() if leased else 0
        self.data.put(key, value, lease_id)
        return lease_id

    async def delete(self, key: str) -> None:
        self.data.delete(key)

    async def expire(self, lease_id: int) -> None:
        self.data.expire(lease_id)

    async def set_config(self, text: str | None) -> None:
        self.data.set_config(text)

    async def records(self) -> dict[str, tuple[bytes, int]]:
        return {key: (record.value, record.etcd_lease_id) for key, record in self.data.records.items()}


class TestMemoryStore(StoreContract):
    def run(self, scenario: Callable[[Any], Awaitable[None]]) -> None:
        async def wrapped() -> None:
            await scenario(MemoryLab())

        asyncio.run(wrapped())


@pytest.mark.parametrize("compacted", [False, True])
def test_a_watch_survives_an_outage(compacted: bool) -> None:
    async def scenario() -> None:
        lab = MemoryLab()
        troubles: list[str | None] = []
        node = MemoryStore(lab.data, on_trouble=troubles.append)
        peers = [await lab.node().acquire(V4, offer(n), NOTHING) for n in (1, 2)]
        async with aclosing(node.watch()) as source:
            updates = Updates(source)
            await updates.until(lambda u: len(u.table) == 2)
            node.connect(connected=False)
            with pytest.raises(StoreError) as raised:
                await node.acquire(V4, offer(3), NOTHING)
            assert raised.value.transient
            lab.data.delete(peers[0].key)
            await lab.node().acquire(V4, offer(4), NOTHING)
            if compacted:
                lab.data.compact()
            node.connect(connected=True)
            await updates.until(lambda u: len(u.table) == 2 and peers[0].key not in u.table)
        assert isinstance(updates.seen[-1], Snapshot) is compacted
        assert troubles == ["the store in memory is switched off", None]

    asyncio.run(scenario())
