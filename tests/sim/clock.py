"""An event loop whose clock is a number: when nothing is ready it jumps to the next timer.

Nothing sleeps, nothing reads or writes a descriptor, and what runs when depends on nothing outside.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


class _Selector:
    """Stands where the loop waits for descriptors: waiting moves the clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is ready and no timer is set: the simulation would wait for ever")
        self.now += timeout
        return []

    def close(self) -> None:
        pass


class SimulatedLoop(asyncio.BaseEventLoop):
    """For code that waits only for timers and for other tasks."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Selector()
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Simulated seconds."""
        return self._selector.now

    def jump(self, seconds: float) -> None:
        """Let time pass with nothing happening: every timer in between is late."""
        self._selector.now += seconds

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""


def run(loop: SimulatedLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; asynchronous generators that are left over are closed."""
    loop.set_exception_handler(_raise)
    try:
        loop.run_until_complete(main)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _raise(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    raise RuntimeError(f"the loop complains: {context}")
