"""The loop that probes peers, over a network of which some addresses do not answer; time is simulated."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from flannelpy.health import Health
from flannelpy.model.address import Address
from flannelpy.model.probe import CHECKSUM, ENCAPSULATION, UNDERLAY, Target
from flannelpy.probes import Probes, Situation
from tests.sim import clock


class Network:
    """Remembers who was asked and when."""

    def __init__(self, peers: int) -> None:
        self.targets = [
            Target(
                f"10.5.{n >> 8}.{n & 255}", bytes([10, 5, n >> 8, n & 255]), bytes([192, 0, n >> 8, n & 255])
            )
            for n in range(peers)
        ]
        self.silent: set[Address] = set()
        self.bad_card = False
        self.no_datagrams = False
        self.asked: list[tuple[float, Address, int]] = []
        self.waiting = 0
        self.most_waiting = 0
        self.closed = False

    async def ask(
        self, address: Address, size: int, seconds: float, *, next_hop: bool = False
    ) -> float | None:
        self.asked.append((asyncio.get_running_loop().time(), address, size))
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        await asyncio.sleep(seconds if address in self.silent else 0.001)
        self.waiting -= 1
        return None if address in self.silent else 0.001

    async def is_refused(self, address: Address, seconds: float, *, summed_here: bool = False) -> bool:
        return not self.no_datagrams and (summed_here or not self.bad_card)

    def close(self) -> None:
        self.closed = True

    def kill(self, count: int) -> None:
        for target in self.targets[:count]:
            self.silent |= {target.overlay, target.underlay}

    def situation(self) -> Situation:
        return Situation(
            lambda: self.targets, lambda key: any(one.key == key for one in self.targets), 1450, 1500
        )


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """In simulated time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.1)


def run(network: Network, story: Callable[[Health], Awaitable[None]]) -> Health:
    """Probe while the story is told."""
    health = Health()

    async def main() -> None:
        probes = asyncio.ensure_future(Probes(lambda: network, network.situation, health, Random(1)).run())
        await story(health)
        probes.cancel()
        await asyncio.gather(probes, return_exceptions=True)

    clock.run(clock.SimulatedLoop(), main())
    assert network.closed
    return health


def test_all_are_asked_in_a_round_and_no_more_than_so_many_a_second() -> None:
    network = Network(400)

    async def story(_health: Health) -> None:
        await asyncio.sleep(150)

    health = run(network, story)
    everybody = {(target.overlay, size) for target in network.targets for size in (84, 1450)}
    everybody |= {(target.underlay, 84) for target in network.targets}
    assert {(address, size) for _time, address, size in network.asked} == everybody
    seconds = [int(time) for time, _address, _size in network.asked]
    assert max(seconds.count(second) for second in set(seconds)) <= 3 * 6
    assert health.unreached == {}
    assert set(health.metrics.probes) == {"reached"}
    assert health.trips.keys() == {target.key for target in network.targets}
    assert all(None not in trip for trip in health.trips.values())


def test_three_peers_are_asked_every_ten_seconds() -> None:
    network = Network(3)

    async def story(_health: Health) -> None:
        await asyncio.sleep(60)

    run(network, story)
    asked = [address for _time, address, size in network.asked if size == 84]
    assert all(5 <= asked.count(target.overlay) <= 7 for target in network.targets)


def test_half_of_a_large_cluster_that_is_down_holds_up_neither_the_rest_nor_its_own_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = Network(1000)
    network.kill(500)
    begins: list[float] = []

    async def story(health: Health) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(600)
        assert len(health.unreached) == 500
        assert set(health.unreached.values()) == {UNDERLAY}
        network.silent.clear()
        begins.append(loop.time())
        await until(lambda: not health.unreached, 200)

    with caplog.at_level(logging.INFO, "flannelpy.probes"):
        health = run(network, story)
    assert health.metrics.probes["reached"] >= 1000
    assert network.most_waiting <= 2 * 2 * 4 * 6 + 10
    assert len(caplog.messages) < 40, "the log is bounded"


def test_one_lost_answer_is_no_trouble_and_two_are(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(1)
    (target,) = network.targets

    async def story(health: Health) -> None:
        network.silent.add(target.overlay)
        await until(lambda: any(address == target.underlay for _time, address, _size in network.asked))
        assert health.unreached == {}, "it may be about to start"
        await until(lambda: health.unreached)
        assert health.unreached == {(target.key, target.overlay): ENCAPSULATION}
        network.silent.clear()
        await until(lambda: not health.unreached)

    with caplog.at_level(logging.INFO, "flannelpy.probes"):
        run(network, story)
    assert len(caplog.messages) == 2
    assert "is not reached (all): encapsulation: " in caplog.messages[0]
    assert caplog.messages[1].endswith("is reached again")


def test_a_card_that_makes_wrong_sums_is_named_and_a_firewall_is_not() -> None:
    network = Network(1)
    (target,) = network.targets
    place = (target.key, target.overlay)

    async def story(health: Health) -> None:
        network.bad_card = True
        await until(lambda: health.unreached == {place: CHECKSUM})
        network.no_datagrams = True
        await until(lambda: health.unreached == {})
        await asyncio.sleep(60)
        assert health.unreached == {}

    run(network, story)


def test_a_peer_that_leaves_takes_its_trouble_along() -> None:
    network = Network(2)
    network.kill(1)

    async def story(health: Health) -> None:
        await until(lambda: health.unreached)
        del network.targets[0]
        await until(lambda: not health.unreached, 20)
        await until(lambda: health.trips.keys() == {network.targets[0].key}, 20)

    run(network, story)


def test_without_the_privilege_it_ends_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> Network:
        raise PermissionError(1, "Operation not permitted")

    network = Network(1)
    with caplog.at_level(logging.INFO, "flannelpy.probes"):
        asyncio.run(Probes(refuse, network.situation, Health(), Random(1)).run())
    assert caplog.messages == ["peers are not probed: Operation not permitted; CAP_NET_RAW is needed"]
    assert network.asked == []
