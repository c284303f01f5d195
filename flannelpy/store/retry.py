"""How a watch waits between attempts, and when it says that there is trouble."""

import asyncio
import time
from collections.abc import Callable
from random import Random

STOPPED_ANSWERING = "it stopped answering"
"""How the reason ends when a server hangs."""
FIRST_WAIT = 0.1
LONGEST_WAIT = 5.0
_STEADY = 5.0
"""Seconds after which a connection counts as having worked."""


class Retry:
    """100 ms doubling to 5 s, each shortened by up to a half at random: thousands of nodes wait at once.

    One lost connection that is replaced at once is no news. Reported are the second failure in a row, the
    first of all, and a server that hangs. Another reason is reported when it is there twice in a row: members
    that fail in different ways take turns.
    """

    def __init__(self, random: Random, report: Callable[[str | None], None]) -> None:
        self._random = random
        self._report = report
        self._failures = 0
        self._worked_since: float | None = None
        self._ever = False
        self._reason = ""
        self._reported = ""

    def succeeded(self) -> None:
        """The watch stands."""
        self._ever = True
        self._worked_since = time.monotonic()
        self._reason = self._reported = ""
        self._report(None)

    async def failed(self, reason: str, at_least: float = 0.0) -> None:
        """Report if it is worth it, and wait; not less than the server asked for."""
        # A server that accepts each watch and drops it at once must not be asked ten times a second.
        if self._worked_since is not None and time.monotonic() - self._worked_since > _STEADY:
            self._failures = 0
        self._worked_since = None
        self._failures += 1
        settled = reason == self._reason or not self._reported
        self._reason = reason
        # A server that hangs was silent for 15 s when that is seen: say it now.
        is_news = self._failures > 1 or not self._ever or reason.endswith(STOPPED_ANSWERING)
        if is_news and settled and reason != self._reported:
            self._reported = reason
            self._report(reason)
        await asyncio.sleep(self._delay() + at_least)

    def _delay(self) -> float:
        longest = min(LONGEST_WAIT, FIRST_WAIT * (1 << min(self._failures - 1, 10)))
        return longest * self._random.uniform(0.5, 1.0)
