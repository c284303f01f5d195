"""When held peers are let go; time is simulated."""

import asyncio
from collections.abc import Awaitable, Callable

from flannelpy.hold import Hold
from flannelpy.store import TTL_SECONDS
from tests.sim import clock


class Story:
    """A hold, and what it looks at."""

    def __init__(self) -> None:
        self.loop = clock.SimulatedLoop()
        self.held = self.heard = True
        self.ended_at: list[float] = []
        self.hold = Hold(
            holds=lambda: self.held,
            hears=lambda: self.heard,
            end=lambda: self.ended_at.append(self.loop.time() - 1000.0),
        )

    def run(self, tell: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            running = asyncio.ensure_future(self.hold.run())
            await tell()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        clock.run(self.loop, main())


def test_it_ends_once_after_a_whole_ttl() -> None:
    story = Story()

    async def tell() -> None:
        story.hold.begin()
        await asyncio.sleep(3 * TTL_SECONDS)

    story.run(tell)
    assert len(story.ended_at) == 1
    assert TTL_SECONDS <= story.ended_at[0] <= TTL_SECONDS + 60


def test_time_without_the_store_or_asleep_does_not_count() -> None:
    story = Story()

    async def tell() -> None:
        story.hold.begin()
        await asyncio.sleep(3600)
        story.heard = False
        await asyncio.sleep(2 * TTL_SECONDS)
        story.heard = True
        await asyncio.sleep(3600)
        story.loop.jump(3 * TTL_SECONDS)
        await asyncio.sleep(TTL_SECONDS - 7300)
        assert story.ended_at == []
        await asyncio.sleep(400)
        assert len(story.ended_at) == 1

    story.run(tell)


def test_another_new_history_begins_it_anew_and_without_anybody_held_it_is_over() -> None:
    story = Story()

    async def tell() -> None:
        story.hold.begin()
        await asyncio.sleep(TTL_SECONDS - 3600)
        story.hold.begin()
        await asyncio.sleep(TTL_SECONDS - 3600)
        assert story.ended_at == []
        story.held = False
        await asyncio.sleep(2 * TTL_SECONDS)
        assert story.ended_at == []

    story.run(tell)
