"""How soon a node says that etcd is silent, whatever it was doing when that began: 20 s at most.

Two clocks run then. gRPC pings a quiet connection after 10 s and waits 5 s more. A request is given up after
5 s, and the connection with it: its watches must not take that for a connection that was lost and is soon
replaced, and the attempts of several callers must not add up.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.lease import Lease
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import NOTHING, V4, offer
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd

_CALM = 1.0
"""gRPC pings whenever data comes, too, to measure the connection; here is no such ping under way."""


def notice(
    etcd: EtcdProcess, prefix: str, end: Callable[[Proxy], None], *, quiet: float, call: float, connect: float
) -> tuple[float, str]:
    """(seconds until the first trouble is told, what it is); a write is due `quiet` seconds after `end`."""

    async def scenario() -> tuple[float, str]:
        told: asyncio.Queue[str | None] = asyncio.Queue()
        async with Proxy(etcd.port) as proxy:
            client = EtcdClient([proxy.endpoint], call_timeout=call, connect_timeout=connect)
            store = EtcdStore(client, prefix, on_trouble=told.put_nowait)
            etcd.ctl("put", f"{prefix}/config", '{"Network":"10.5.0.0/16"}')
            own = await store.acquire(V4, offer(1), NOTHING)
            begun = asyncio.Event(), asyncio.Event()
            tasks = [
                asyncio.create_task(_follow(store.watch(), begun[0])),
                asyncio.create_task(_follow(store.watch_config(), begun[1])),
            ]
            for event in begun:
                await event.wait()
            await asyncio.sleep(_CALM)
            end(proxy)
            began = time.monotonic()
            tasks.append(asyncio.create_task(_write(store, own, quiet)))
            try:
                async with asyncio.timeout(40):
                    text = await told.get()
                return time.monotonic() - began, str(text)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await client.close()

    return asyncio.run(scenario())


async def _follow(source: AsyncGenerator[object, None], begun: asyncio.Event) -> None:
    async with aclosing(source) as updates:
        async for _update in updates:
            begun.set()


async def _write(store: EtcdStore, own: Lease, quiet: float) -> None:
    await asyncio.sleep(quiet)
    while True:
        with suppress(StoreError):
            await store.renew(own)
        await asyncio.sleep(0.5)


def test_a_request_without_an_answer_is_said_at_once(shared_etcd: EtcdProcess, prefix: str) -> None:
    seconds, text = notice(shared_etcd, prefix, Proxy.black_hole, quiet=0.0, call=1.0, connect=3.0)
    assert "it stopped answering" in text
    assert seconds < 2.0


def test_the_attempts_of_many_do_not_add_up(shared_etcd: EtcdProcess, prefix: str) -> None:
    """The connection is closed, and no new one is answered."""

    def end(proxy: Proxy) -> None:
        proxy.black_hole()
        proxy.hang_up()

    seconds, text = notice(shared_etcd, prefix, end, quiet=0.0, call=1.0, connect=1.0)
    assert "no answer within 1 s" in text
    assert seconds < 2.0


def test_a_write_that_is_due_does_not_delay_the_notice(shared_etcd: EtcdProcess, prefix: str) -> None:
    """With the real deadlines, and the write's just before gRPC's."""
    seconds, text = notice(shared_etcd, prefix, Proxy.black_hole, quiet=8.5, call=5.0, connect=3.0)
    assert "it stopped answering" in text
    assert seconds < 20.0
