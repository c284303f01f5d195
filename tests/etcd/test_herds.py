"""Thousands of nodes: how many requests of etcd a start, a day and an outage cost each of them.

Whole nodes over the simulated kernel, each with a connection of its own, on a real etcd.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from random import Random

import pytest

from flannelpy.backend import load
from flannelpy.health import Health
from flannelpy.kernel.fake import FakeKernel
from flannelpy.model.address import parse_prefix
from flannelpy.model.config import NetworkConfig, parse_config
from flannelpy.model.identity import Identity
from flannelpy.model.lease import Delta
from flannelpy.model.subnet import Previous, encode_attrs
from flannelpy.model.traffic import Wishes
from flannelpy.model.uplink import Interface, InterfaceAddress, Wish
from flannelpy.node import Node, Parts
from flannelpy.rules import Firewall
from flannelpy.state_file import Origin
from flannelpy.store import TTL_SECONDS
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import NOTHING, Updates, attrs, offer
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd

CONFIG = '{"Network":"10.0.0.0/14","Backend":{"Type":"alloc"}}'
PEERS = 5000
HERD = 500
AT_START = {"range": 3, "grant": 1, "txn": 2, "watch": 2}
"""Reads of the config (twice: learnt, then followed) and of the leases; a claim, and its signature."""
RENEWAL = {"grant": 1, "txn": 2, "ttl": 1, "revoke": 1}
MARGIN = 60
"""Minutes, the default of --subnet-lease-renew-margin."""


async def _no_rules(_config: NetworkConfig, _former: Firewall) -> tuple[Wishes, Firewall]:
    raise NotImplementedError


class Machine:
    """A node on a host of its own, as far as etcd can tell."""

    def __init__(self, endpoint: str, prefix: str, number: int, margin: float) -> None:
        self.number = number
        self.troubles: list[str | None] = []
        client = EtcdClient([endpoint], call_timeout=30)
        self.store = EtcdStore(client, prefix, random=Random(number), on_trouble=self.troubles.append)
        kernel = FakeKernel()
        address = parse_prefix(f"198.18.{number >> 8}.{number & 255}/16")
        kernel.others_set_uplink(Interface(2, "eth0", 1500, (InterfaceAddress(address),)))
        kernel.defaults = {32: "eth0"}
        config = parse_config(CONFIG)
        self._parts = Parts(
            store=self.store,
            host=kernel,
            config=config,
            config_text=CONFIG,
            backend=load(config),
            wish=Wish(),
            host_id=str(number),
            store_hosts=(),
            previous=Previous(),
            margin_minutes=margin,  # type: ignore[arg-type]  # a fraction makes a day of seconds
            us=Identity(str(number), "boot", "process", number, number),
            origin=Origin(prefix, (endpoint,)),
            memory=None,
            store_is_silent=False,
            save=lambda _memory: None,
            write_subnet_env=lambda _text: None,
            firewall=None,
            turn_rules=_no_rules,
            traffic=Wishes(masquerade=False, forward=False),
            blackhole=False,
            peer_filter=None,
            enforce=False,
            open_pinger=None,
            on_ready=lambda _text: None,
            health=Health(),
            random=Random(number),
        )

    async def live(self) -> None:
        """What a daemon does from its start on."""
        async with aclosing(self.store.watch_config()) as texts:
            assert await anext(texts) == CONFIG
        await Node(self._parts).live()


@asynccontextmanager
async def herd(
    etcd: EtcdProcess, prefix: str, size: int, *, margin: float = MARGIN, port: int = 0
) -> AsyncIterator[list[Machine]]:
    """Machines that start at once."""
    await asyncio.to_thread(etcd.ctl, "put", f"{prefix}/config", CONFIG)
    endpoint = f"http://127.0.0.1:{port or etcd.port}"
    machines = [Machine(endpoint, prefix, number, margin) for number in range(1, size + 1)]
    lives = [asyncio.create_task(machine.live()) for machine in machines]
    try:
        yield machines
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*(machine.store.close() for machine in machines))


def requests(machines: Sequence[Machine]) -> Counter[str]:
    return sum((machine.store.requests for machine in machines), Counter[str]())


async def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


def have(machines: Sequence[Machine], wanted: dict[str, int]) -> Callable[[], bool]:
    return lambda: all(machine.store.requests >= Counter(wanted) for machine in machines)


def test_five_hundred_nodes_start_at_once(shared_etcd: EtcdProcess, prefix: str) -> None:
    """Only their stores: what one process can play of so many, each on a connection of its own."""
    shared_etcd.ctl("put", f"{prefix}/config", CONFIG)

    async def start(machine: Machine) -> None:
        store = machine.store
        async with aclosing(store.watch_config()) as texts:
            assert await anext(texts) == CONFIG
        own = await store.acquire(parse_config(CONFIG), offer(machine.number), NOTHING)
        await store.sign(own, "somebody")
        async with aclosing(store.watch()) as updates:
            assert len((await anext(updates)).leases) > 0  # type: ignore[union-attr]
            await anext(updates)

    async def scenario() -> Counter[str]:
        machines = [Machine(shared_etcd.endpoint, prefix, number, MARGIN) for number in range(1, HERD + 1)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(start(machine) for machine in machines))
        leases = (await machines[0].store._records.read_all()).listing.leases
        assert len(leases) == len({lease.subnet for lease in leases.values()}) == HERD
        await asyncio.gather(*(machine.store.close() for machine in machines))
        return requests(machines)

    counted = asyncio.run(scenario())
    sys.stderr.write(f"\n{HERD} starts: {dict(counted)}\n")
    more = counted - Counter(range=2 * HERD + 1, grant=HERD, txn=2 * HERD, watch=HERD)
    assert set(more) <= {"txn"}, "one for each lost race, and nothing else"
    assert more["txn"] < HERD / 2


def test_days_of_few_seconds_cost_nothing_but_renewals(shared_etcd: EtcdProcess, prefix: str) -> None:
    """Each renewal is seen by everybody, and asked about by nobody."""
    size, days, period = 40, 3, 3.0

    async def scenario() -> Counter[str]:
        margin = (TTL_SECONDS - period) / 60
        async with herd(shared_etcd, prefix, size, margin=margin) as machines:
            await until(have(machines, AT_START), "all have started", 30)
            await until(lambda: requests(machines)["revoke"] >= size * days, "all were renewed", 60)
            return requests(machines)

    counted = asyncio.run(scenario())
    renewals = counted["revoke"]
    # Some have begun with the next one, or not signed the last one yet.
    for kind in ("range", "grant", "txn", "watch", "ttl"):
        before, each = AT_START.get(kind, 0) * size, RENEWAL.get(kind, 0)
        assert before + each * (renewals - size) <= counted[kind] <= before + each * (renewals + size), kind
    assert set(counted) == {*AT_START, *RENEWAL}


def test_the_renewals_of_five_thousand_nodes_cost_a_node_no_request(
    shared_etcd: EtcdProcess, prefix: str
) -> None:
    async def scenario() -> None:
        client, back_door = EtcdClient([shared_etcd.endpoint]), EtcdClient([shared_etcd.endpoint])
        node = EtcdStore(client, prefix)
        await put_peers(back_door, prefix)
        await node.acquire(parse_config('{"Network":"10.0.0.0/8"}'), offer(1), NOTHING)
        async with aclosing(node.watch()) as source:
            updates = Updates(source)
            await updates.until(lambda u: len(u.seen) > 1)
            start = Counter(node.requests)
            await put_peers(back_door, prefix)
            await updates.until(lambda u: _told(u) >= PEERS, 30)
            assert node.requests == start == {"range": 1, "grant": 1, "txn": 1, "watch": 1}
        await client.close()
        await back_door.close()

    asyncio.run(scenario())


def _told(updates: Updates) -> int:
    return sum(len(update.put) for update in updates.seen if isinstance(update, Delta))


async def put_peers(client: EtcdClient, prefix: str) -> None:
    """Records of other nodes, written for the first time or once more."""
    lease = await client.grant(3600)
    for start in range(0, PEERS, 100):
        puts = []
        for number in range(start, start + 100):
            key = f"{prefix}/subnets/10.{200 + number // 250}.{number % 250}.0-24".encode()
            value = encode_attrs(attrs(1000 + number)).encode()
            puts.append(pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease)))
        await client.txn([], puts)


def test_an_outage_costs_each_node_three_requests(shared_etcd: EtcdProcess, prefix: str) -> None:
    """Two watches, and a look at the config; nobody lists the leases."""
    size = 50

    async def scenario() -> None:
        async with (
            Proxy(shared_etcd.port) as proxy,
            herd(shared_etcd, prefix, size, port=proxy.port) as machines,
        ):
            await until(have(machines, AT_START), "all have started", 30)
            before = requests(machines)
            proxy.cut()
            await until(lambda: all(one.troubles for one in machines), "all have seen it", 10)
            await proxy.heal()
            await until(have(machines, {**AT_START, "watch": 4}), "all watch again", 15)
            assert requests(machines) - before == {"watch": 2 * size, "range": size}

    asyncio.run(scenario())
