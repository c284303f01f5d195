"""A node that follows a cluster of the stand-in's, for tests of what goes wrong."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from flannelpy.model.lease import LeaseUpdate
from flannelpy.store.kube import KubeStore
from tests.kube.api import StandIn
from tests.kube.test_api import NOTHING, V4, Table, offer, store_of

MANY = 40


def filled(api: StandIn) -> StandIn:
    """With so many nodes, and n1."""
    api.do("many", {"first": 0, "count": MANY, "padding": 0})
    api.add_node("n1", ("10.244.1.0/24",))
    return api


@asynccontextmanager
async def watching(
    api: StandIn, troubles: list[str | None] | None = None
) -> AsyncIterator[tuple[KubeStore, AsyncGenerator[LeaseUpdate, None], Table]]:
    """n1's store, its watch, and what that has told: the list, and that it stands."""
    store = store_of(api, "n1", troubles)
    await store.acquire(V4, offer(1), NOTHING)
    async with aclosing(store.watch()) as source:
        table = Table(source)
        await table.until(lambda t: len(t.seen) > 1)
        yield store, source, table
    await store.close()
