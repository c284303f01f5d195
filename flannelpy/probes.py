"""The loop that asks peers whether they are there, and tells which layer is at fault when they are not.

However many peers there are, no more than `_PER_SECOND` are asked a second. Each round asks all of them, in
an order that is another one on each node and in each round. A peer that does not answer is asked again a
little later: then it is said, and it is asked so until it answers. Of these, too, no more than `_PER_SECOND`
are asked a second. Nobody waits for the silence of another: it takes seconds.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple, Protocol

from flannelpy.health import Health, Trip
from flannelpy.model.address import Address, format_address
from flannelpy.model.probe import MEANING, Heard, Target, fault

log = logging.getLogger(__name__)

_PER_SECOND = 4.0
"""Peers that are asked, at most: four packets each, if all is well."""
_ROUND_SECONDS = 10.0
"""A round over all peers takes at least so long."""
_SETTLE_SECONDS = 3.0
"""After a start: peers that do not know us yet would take probes for a stranger's."""
_AGAIN_SECONDS = 5.0
"""Until one that did not answer is asked again, at least."""
_ANSWER_SECONDS = 1.0
_TRIES = 3
"""Packets without an answer before a layer is held to be at fault."""
_NAMED = 5
"""Peers that are named one by one when many fail within a round."""
_SMALL = 84
"""Bytes of a packet such as ping's."""


class Pinger(Protocol):
    """Sends probes; `kernel.echo.Echo` is the real one."""

    async def ask(
        self, address: Address, size: int, seconds: float, *, next_hop: bool = False
    ) -> float | None:
        """The round trip time of an echo request of `size` bytes; None without an answer.

        `next_hop`: to no further than the next hop, which answers whether it has that address or not.
        """
        ...

    async def is_refused(self, address: Address, seconds: float, *, summed_here: bool = False) -> bool:
        """Whether a datagram to a closed port is refused, as it should be.

        Its checksum is left to the network card, unless `summed_here`.
        """
        ...

    def close(self) -> None:
        """No more of them."""
        ...


class Situation(NamedTuple):
    """What there is to probe now."""

    targets: Callable[[], list[Target]]
    """All that may be asked; not cheap."""
    is_here: Callable[[str], bool]
    """Whether there still is a peer of this key: cheap."""
    overlay_mtu: int
    underlay_mtu: int


class Probes:
    """Owned by one node; `look` tells the situation afresh."""

    def __init__(
        self, open_pinger: Callable[[], Pinger], look: Callable[[], Situation], health: Health, random: Random
    ) -> None:
        self._open = open_pinger
        self._look = look
        self._health = health
        self._random = random
        self._unreached: dict[Target, float] = {}
        """When each is to be asked again, on the loop's clock; infinity while it is asked."""
        self._named = 0
        """In this round."""

    async def run(self) -> None:
        """Ask, for ever; at once the end, said, where that is not allowed."""
        try:
            pinger = self._open()
        except OSError as error:
            log.info("peers are not probed: %s; CAP_NET_RAW is needed", error.strerror or error)
            return
        try:
            await asyncio.sleep(_SETTLE_SECONDS)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ask_all(pinger, tasks))
                tasks.create_task(self._ask_again(pinger, tasks))
        finally:
            pinger.close()

    async def _ask_all(self, pinger: Pinger, tasks: asyncio.TaskGroup) -> None:
        """Round after round."""
        loop = asyncio.get_running_loop()
        while True:
            round_end = loop.time() + _ROUND_SECONDS
            now = self._look()
            found = now.targets()
            pause = max(1 / _PER_SECOND, _ROUND_SECONDS / max(1, len(found)))
            for target in self._random.sample(found, len(found)):
                if now.is_here(target.key) and target not in self._unreached:
                    tasks.create_task(self._ask(pinger, target, now))
                await asyncio.sleep(pause * self._random.uniform(0.8, 1.2))
            self._end_of_round()
            await asyncio.sleep(round_end - loop.time())

    async def _ask_again(self, pinger: Pinger, tasks: asyncio.TaskGroup) -> None:
        """Those that did not answer, the one whose turn came first before the others."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1 / _PER_SECOND)
            if not self._unreached:
                continue
            target, turn = min(self._unreached.items(), key=lambda item: item[1])
            now = self._look()
            if not now.is_here(target.key):
                self._forget(now)
            elif turn <= loop.time():
                self._unreached[target] = math.inf
                tasks.create_task(self._ask(pinger, target, now))

    async def _ask(self, pinger: Pinger, target: Target, now: Situation) -> None:
        self._note(target, await self._probe(pinger, target, now))

    async def _probe(self, pinger: Pinger, target: Target, now: Situation) -> Heard:
        async def ask(address: Address, size: int) -> float | None:
            for _try in range(_TRIES):
                heard = await pinger.ask(address, size, _ANSWER_SECONDS, next_hop=target.is_routed)
                if heard is not None:
                    return heard
            return None

        overlay, underlay = await asyncio.gather(ask(target.overlay, _SMALL), ask(target.underlay, _SMALL))
        if overlay is None:
            return Heard(None, None, underlay)
        full = await ask(target.overlay, now.overlay_mtu)
        if full is None:
            return Heard(overlay, None, underlay, await ask(target.underlay, now.underlay_mtu))
        # The card's sums are the hosts' own matter without a tunnel, and TCP to the store tells of them.
        wrong_sums = not target.is_routed and await self._sums_are_wrong(pinger, target.overlay)
        return Heard(overlay, full, underlay, only_summed_here=wrong_sums)

    async def _sums_are_wrong(self, pinger: Pinger, address: Address) -> bool:
        """A firewall that drops datagrams drops both kinds: that says nothing."""
        for _try in range(_TRIES):
            if await pinger.is_refused(address, _ANSWER_SECONDS):
                return False
            if not await pinger.is_refused(address, _ANSWER_SECONDS, summed_here=True):
                return False
        return True

    def _note(self, target: Target, heard: Heard) -> None:
        unreached, place = self._health.unreached, (target.key, target.overlay)
        self._health.trips[target.key] = Trip(heard.overlay, heard.underlay)
        layer, before = fault(target, heard), unreached.get(place)
        if layer is not None:
            suspected = target in self._unreached
            self._unreached[target] = asyncio.get_running_loop().time() + _AGAIN_SECONDS
            if not suspected:
                return  # it may be about to start: only the second time counts
            unreached[place] = layer
        else:
            self._unreached.pop(target, None)
            unreached.pop(place, None)
        self._health.metrics.note_probe(heard.overlay, layer)
        if layer == before:
            return
        where = f"peer {target.key} ({format_address(target.overlay)}, {format_address(target.underlay)})"
        if layer is None:
            self._say(logging.INFO, f"{where} is reached again")
        else:
            self._say(logging.WARNING, f"{where} is not reached (all): {layer}: {MEANING[layer]}")

    def _say(self, level: int, text: str) -> None:
        self._named += 1
        if self._named <= _NAMED:
            log.log(level, "%s", text)

    def _end_of_round(self) -> None:
        trips, is_here = self._health.trips, self._look().is_here
        for key in [key for key in trips if not is_here(key)]:
            del trips[key]
        if self._named > _NAMED:
            log.warning("and %d more peers that are reached or not; %d are not (all)",
                        self._named - _NAMED, len(self._health.unreached))  # fmt: skip
        self._named = 0

    def _forget(self, now: Situation) -> None:
        """Peers that are gone are no trouble any more."""
        for target in [one for one in self._unreached if not now.is_here(one.key)]:
            del self._unreached[target]
            self._health.unreached.pop((target.key, target.overlay), None)
