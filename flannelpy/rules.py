"""The loop that keeps the rules: like that of `reconcile.py`, for what stands in nftables or iptables.

A cause (our lease changed, somebody changed rules, a timer) carries no orders: the loop looks, compares and
sets what differs. It is a task of its own because iptables is a program that may take its time, and no
route shall wait for it.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import NamedTuple, Protocol, TypeAlias

from flannelpy.errors import KernelError
from flannelpy.health import Health
from flannelpy.metrics import Repair
from flannelpy.model.lease import Lease
from flannelpy.model.traffic import RuleSet

log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.25, 8.0)
"""After a failure: first and longest wait."""
_BREATH = 2.0
"""Between two looks, at least this many times what the last one took,"""
_LONGEST_BREATH = 8.0
"""but never longer than this: the machine may have been paused."""
_IN_VAIN = (0.02, 0.5)
"""After looks that found nothing: first and longest wait. Others may change their rules all day."""
_DOUBT_SECONDS = 60.0
"""A look this often where all changes are announced; it costs no process."""

_TROUBLE_SECONDS = 5.0
"""The same while somebody else drops what we accept: that he stopped is not always announced."""


class Firewall(Protocol):
    """Where the rules are kept; `kernel.firewall` has the real ones."""

    trouble: str | None
    """Why packets may be dropped although the rules stand."""
    period: float
    """Seconds between looks where changes are not announced; else infinite."""

    async def keep(self, wanted: RuleSet) -> list[str]:
        """Make the rules as wanted; what was done, in words. KernelError or OSError: try again."""
        ...

    def causes(self) -> AsyncGenerator[str, None]:
        """One line each time that somebody changed something which may concern us."""
        ...


Turn: TypeAlias = Callable[[Firewall], Awaitable[Firewall]]
"""Makes the firewall that takes the place of this one. May raise KernelError."""


class _Cause(NamedTuple):
    words: str
    since: float
    drift: bool
    """Somebody else's doing."""


class Rules:
    """Keeps the rules what our lease asks for. `decide` says what that is."""

    def __init__(
        self, firewall: Firewall, decide: Callable[[Lease], RuleSet], own: Lease, health: Health
    ) -> None:
        self._firewall = firewall
        self._decide = decide
        self._own = own
        self._wanted = decide(own)
        self._health = health
        self._cause: _Cause | None = None
        self._woken = asyncio.Event()
        self._then: list[Callable[[], None]] = []
        self._retry = 0.0
        self._in_vain = 0.0
        self._said: str | None = None
        self._other: Turn | None = None
        """The way to keep the rules that was asked for, as long as it is not taken."""

    def move(self, own: Lease, then: Callable[[], None]) -> None:
        """Our lease changed; `then` is called when the rules for it stand."""
        self._own, self._wanted = own, self._decide(own)
        self._then.append(then)
        self._wake("our lease changed", drift=False)

    def turn(self, to: Turn) -> None:
        """Keep the rules another way: the new ones stand before the old ones go."""
        self._other = to
        self._wake("EnableNFTables changed", drift=False)

    async def prepare(self) -> None:
        """Return when the rules stand for the first time; a failure is said, and tried again."""
        self._wake("start", drift=False)
        while not await self._look():  # noqa: ASYNC110  # only time can help
            await asyncio.sleep(self._retry)

    async def listen(self) -> None:
        """Take in what is announced, for ever."""
        async with aclosing(self._firewall.causes()) as causes:
            async for cause in causes:
                self._wake(cause, drift=True)

    async def run(self) -> None:
        """Look whenever there is a cause, for ever."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            doubt = _TROUBLE_SECONDS if self._firewall.trouble else _DOUBT_SECONDS
            period = min(self._firewall.period, doubt, self._retry or math.inf)
            try:
                async with asyncio.timeout_at(began + period):
                    await self._woken.wait()
            except TimeoutError:
                self._wake("resync", drift=True)
            began = loop.time()
            await self._look()
            await asyncio.sleep(max(min(_BREATH * (loop.time() - began), _LONGEST_BREATH), self._in_vain))

    def _wake(self, words: str, *, drift: bool) -> None:
        """The first cause is the one that is told; what we did ourselves is no drift."""
        now = asyncio.get_running_loop().time()
        if self._cause is None or (self._cause.drift and not drift):
            self._cause = _Cause(words, now, drift)
        self._woken.set()

    async def _look(self) -> bool:
        """Compare, set what differs; whether the rules stand."""
        now = asyncio.get_running_loop().time()
        cause = self._cause or _Cause("trying again", now, drift=False)
        self._cause = None
        self._woken.clear()
        then = len(self._then)
        refusal = await self._turn()
        try:
            words = await self._firewall.keep(self._wanted)
        except (KernelError, OSError) as error:
            self._failed(str(error))
            self._cause = cause  # what began it is what is told
            return False
        self._tell(words, cause)
        first, longest = _IN_VAIN
        self._in_vain = 0.0 if words else min(longest, self._in_vain * 2 or first)
        if refusal is not None:
            self._failed(refusal)
            return False
        self._retry = 0.0
        self._trouble(self._firewall.trouble)
        done, self._then = self._then[:then], self._then[then:]
        for call in done:
            call()
        return True

    async def _turn(self) -> str | None:
        """Take the other way if it was asked for; why it cannot be taken, and then all stays as it is."""
        to = self._other
        if to is None:
            return None
        try:
            other = await to(self._firewall)
            wanted = self._decide(self._own)
            words = await other.keep(wanted)
        except (KernelError, OSError) as error:
            return f"as EnableNFTables asks for it now: {error}; they stay as they are"
        self._firewall, self._wanted = other, wanted
        if self._other is to:
            self._other = None
        self._tell(words, _Cause("EnableNFTables changed", 0.0, drift=False))
        return None

    def _tell(self, words: list[str], cause: _Cause) -> None:
        if not words:
            return
        text = ", ".join(words)
        metrics = self._health.metrics
        metrics.operations += len(words)
        if not cause.drift:
            log.info("rules: %s (%s)", text, cause.words)
            return
        seconds = asyncio.get_running_loop().time() - cause.since
        metrics.note_repair(
            Repair(text, cause.words, seconds), [f"{word.split()[0]} Rules" for word in words]
        )
        log.warning("repaired in %.0f ms: %s (%s)", seconds * 1000, text, cause.words)

    def _failed(self, reason: str) -> None:
        first, longest = _RETRY_SECONDS
        self._retry = min(longest, self._retry * 2 or first)
        self._health.metrics.failures += 1
        self._trouble(f"cannot set the rules: {reason}; trying again")

    def _trouble(self, text: str | None) -> None:
        """Said once, in the log and in the state of health."""
        self._health.rules_trouble = text
        if text == self._said:
            return
        self._said = text
        if text is not None:
            log.warning("%s", text)
        else:
            log.info("the rules are well again")
