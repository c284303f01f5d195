"""The loop around the peer filter, over a table that is a list of calls; and the filter as a value."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from flannelpy.health import Health
from flannelpy.kernel import nft_codec
from flannelpy.kernel import peer_filter as kernel_filter
from flannelpy.model.address import Address, parse_mac, parse_v4
from flannelpy.model.peer_filter import Fate, PeerFilter, fate, peer_filter, port_of
from flannelpy.strangers import Strangers
from tests.builders import config, lease
from tests.builders import lease as peer

HERE = parse_v4("192.0.2.1")
DROP, COUNT = Fate(True, True, "dropped"), Fate(False, True, "counted")


class Seen(NamedTuple):
    strangers: Mapping[Address, int] = {}
    natted: Mapping[Address, int] = {}


class Table:
    """Remembers what it was told; `fails` makes it refuse."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.filter: PeerFilter | None = None
        self.now = Seen()
        self.fails = False

    def set(self, wanted: PeerFilter) -> bool:
        self.calls.append("set")
        if self.fails:
            raise OSError(1, "Operation not permitted")
        made, self.filter = self.filter is None, wanted
        return made

    def change(self, before: PeerFilter, after: PeerFilter) -> None:
        assert before == self.filter
        self.calls.append("change")
        self.filter = after

    def seen(self) -> Seen:
        return self.now


async def run(strangers: Strangers, table: Table, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await strangers.run()


def test_there_is_no_filter_before_the_first_leases() -> None:
    table = Table()
    asyncio.run(run(Strangers(table, 8472, Health(), DROP), table, 0.1))
    assert table.calls == []


def test_peers_are_told_by_difference_and_strangers_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    table, health = Table(), Health()
    strangers = Strangers(table, 8472, health, COUNT)

    async def scenario() -> None:
        task = asyncio.create_task(strangers.run())
        strangers.offer((HERE, None), [peer()])
        await asyncio.sleep(0.02)
        strangers.offer((HERE, None), [peer(), lease("10.5.3.0/24", "192.0.2.3")])
        await asyncio.sleep(0.02)
        assert table.calls == ["set", "change"]
        many = {parse_v4(f"203.0.113.{number}"): 2 for number in range(30)}
        table.now = Seen(many, {parse_v4("192.0.2.77"): 1})
        while health.metrics.stranger_packets == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert table.filter is not None
    assert parse_v4("192.0.2.3") in table.filter.peers
    assert (health.metrics.stranger_packets, health.metrics.natted_packets) == (60, 1)
    assert len(health.strangers) == 20
    lines = [record.getMessage() for record in caplog.records]
    assert sum("no lease explains" in line for line in lines) == 6  # five by name, one for the rest
    assert any("192.0.2.77" in line and "NAT?" in line for line in lines)


def test_a_refusal_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    table.fails = True
    strangers = Strangers(table, 8472, Health(), COUNT)

    async def scenario() -> None:
        strangers.offer((HERE,), [peer()])
        await run(strangers, table, 1.5)

    asyncio.run(scenario())
    assert len(table.calls) >= 2
    assert [record.getMessage() for record in caplog.records] == [
        "cannot keep the peer filter: Operation not permitted; trying again"
    ]


def test_what_explains_a_packet() -> None:
    odd = lease("10.5.4.0/24", data={"VtepMAC": 7})
    found = peer_filter(8472, [HERE], [peer(mac="02:00:00:00:00:09"), odd], enforce=True)
    assert found.peers == {HERE, parse_v4("192.0.2.2")}
    assert found.macs == {parse_mac("02:00:00:00:00:09")}


@pytest.mark.parametrize(
    ("backend", "port"),
    [
        ('{"Type":"vxlan"}', 8472),
        ('{"Type":"vxlan","Port":4789}', 4789),
        ('{"Type":"udp"}', 8285),
        ('{"Type":"udp","port":9000}', 9000),
        ('{"Type":"host-gw"}', None),
    ],
)
def test_port(backend: str, port: int | None) -> None:
    assert port_of(config('{"Network":"10.5.0.0/16","Backend":' + backend + "}"), {}) == port


def test_only_enforce_drops() -> None:
    counting = peer_filter(8472, [HERE], [peer()], enforce=False)
    drop = nft_codec.verdict(nft_codec.DROP)
    for wanted, drops in ((counting, 0), (counting._replace(enforce=True), 2)):
        steps = [step for chain in kernel_filter.rules(wanted).values() for rule in chain for step in rule]
        assert steps.count(drop) == drops


@pytest.mark.parametrize(
    ("backend", "enforce", "expected"),
    [
        ('{"Type":"vxlan"}', True, DROP),
        ('{"Type":"vxlan"}', False, COUNT),
        ('{"Type":"udp"}', True, Fate(False, False, "dropped by the forwarder")),
        ('{"Type":"udp","AcceptAnySource":true}', True, Fate(False, False, "let in, by AcceptAnySource")),
    ],
)
def test_what_becomes_of_strangers(backend: str, enforce: bool, expected: Fate) -> None:
    assert fate(config(f'{{"Network":"10.5.0.0/16","Backend":{backend}}}'), enforce=enforce) == expected
