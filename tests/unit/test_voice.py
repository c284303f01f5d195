"""The watchdog is fed by the reconciler's sign of life; time is simulated."""

import asyncio

from flannelpy.health import Health
from flannelpy.notify import Notify
from flannelpy.verdict import STUCK_SECONDS
from flannelpy.voice import Voice
from tests.sim import clock


class Listener(Notify):
    """Stands where systemd listens: when it was told what."""

    def __init__(self) -> None:
        super().__init__({})
        self.heard: list[tuple[float, str]] = []

    def _send(self, message: str) -> bool:
        self.heard.append((asyncio.get_running_loop().time(), message))
        return True


def test_the_watchdog_is_fed_until_the_reconciler_stops_and_again_when_it_goes_on() -> None:
    health, systemd = Health(), Listener()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        feeding = asyncio.ensure_future(Voice(health, systemd, 10).feed_watchdog(60.0))
        await asyncio.sleep(300)  # idle for long
        assert len(systemd.heard) >= 5 * 3
        gaps = [
            after - before for (before, _), (after, _) in zip(systemd.heard, systemd.heard[1:], strict=False)
        ]
        assert max(gaps) <= 60 / 2
        health.work_since = loop.time()  # it begins with something, and does not come back
        await asyncio.sleep(STUCK_SECONDS + 60)
        last = systemd.heard[-1][0]
        assert last <= health.work_since + STUCK_SECONDS
        await asyncio.sleep(60)
        assert systemd.heard[-1][0] == last
        health.work_since = loop.time()  # a sign of life
        await asyncio.sleep(25)
        assert systemd.heard[-1][0] > last
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)

    clock.run(clock.SimulatedLoop(), main())
    assert {message for _time, message in systemd.heard} == {"WATCHDOG=1"}
