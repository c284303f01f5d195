"""When the peers are let go that have no record since the store began a new history.

Who has not written its record within a TTL is gone: the old history would have forgotten it, too. But only
time counts in which it could have written, and we would have heard of it. While the store does not answer,
or this machine sleeps (with its whole cluster, perhaps), nobody's silence says anything.
"""

import asyncio
from collections.abc import Callable

from flannelpy.store import TTL_SECONDS

_STEP_SECONDS = 60.0
"""A step that took much longer was slept through."""


class Hold:
    """Owned by one node; `end` is called when the time is over."""

    def __init__(
        self, *, holds: Callable[[], bool], hears: Callable[[], bool], end: Callable[[], object]
    ) -> None:
        self._holds = holds
        self._hears = hears
        self._end = end
        self._begun = asyncio.Event()
        self._left = 0.0

    def begin(self) -> None:
        """A new history has begun: a whole TTL from now on."""
        self._left = TTL_SECONDS
        self._begun.set()

    async def run(self) -> None:
        """Count, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._begun.wait()
            began, heard = loop.time(), self._hears()
            await asyncio.sleep(_STEP_SECONDS)
            passed = loop.time() - began
            if not self._holds():
                self._begun.clear()
            elif heard and self._hears() and passed < 2 * _STEP_SECONDS:
                self._left -= passed
                if self._left <= 0:
                    self._begun.clear()
                    self._end()
