"""The loop that keeps the peer filter, and tells who sent packets that no lease explains.

The filter is told about peers as soon as the store tells us. Once a minute it is compared as a whole, armed
for another five, and asked whom it has seen.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from flannelpy.health import Health
from flannelpy.model.address import Address, format_address
from flannelpy.model.lease import Lease
from flannelpy.model.peer_filter import Fate, PeerFilter, peer_filter

log = logging.getLogger(__name__)

_LOOK_SECONDS = (1.0, 60.0)
"""Between looks: at first, and, doubling, at last."""
_BREATH = 4.0
"""Between two changes, at least this many times what the last one took,"""
_LONGEST_BREATH = 8.0
"""but never longer than this: the machine may have been paused."""
_NAMED = 5
"""Sources that are named one by one when a look finds many."""
_REMEMBERED = 2000
"""Sources that were named already, and are not named again."""


class Seen(Protocol):
    """Sources and their packets."""

    @property
    def strangers(self) -> Mapping[Address, int]:
        """Those that no lease explains."""
        ...

    @property
    def natted(self) -> Mapping[Address, int]:
        """Those that carry the MAC of a peer: it sits behind a NAT."""
        ...


class Table(Protocol):
    """Where the filter stands; `kernel.peer_filter` has the real one."""

    def set(self, wanted: PeerFilter) -> bool:
        """Compare it as a whole, and arm it; whether it had to be made anew. May raise OSError."""
        ...

    def change(self, before: PeerFilter, after: PeerFilter) -> None:
        """Peers came or went. May raise OSError."""
        ...

    def seen(self) -> Seen:
        """Who was seen within the last hour. May raise OSError."""
        ...


class _Nobody(NamedTuple):
    strangers: Mapping[Address, int]
    natted: Mapping[Address, int]


_NOBODY = _Nobody({}, {})


class _News(NamedTuple):
    here: tuple[Address, ...]
    leases: tuple[Lease, ...]


class Strangers:
    """Keeps the filter for one port."""

    def __init__(self, table: Table, port: int, health: Health, fate: Fate) -> None:
        self._table = table
        self._port = port
        self._fate = fate
        self._health = health
        self._news: _News | None = None
        self._woken = asyncio.Event()
        self._stands: PeerFilter | None = None
        self._counted: Seen = _NOBODY
        self._said: set[tuple[Address, str]] = set()
        self._trouble = ""

    def offer(self, here: Iterable[Address | None], leases: Iterable[Lease]) -> None:
        """Our own addresses, and all leases that count. Before the first of these there is no filter."""
        self._news = _News(tuple(filter(None, here)), tuple(leases))
        self._woken.set()

    async def run(self) -> None:
        """Follow what is offered, for ever."""
        loop = asyncio.get_running_loop()
        await self._woken.wait()
        pause, longest = _LOOK_SECONDS
        look_at = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(look_at):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            began = loop.time()
            looks = began >= look_at
            if looks:
                look_at, pause = began + pause, min(longest, pause * 2)
            try:
                self._keep(whole=looks)
            except OSError as error:
                self._stands = None
                self._say_trouble(f"cannot keep the peer filter: {error.strerror or error}; trying again")
            else:
                self._trouble = ""
            await asyncio.sleep(min(_BREATH * (loop.time() - began), _LONGEST_BREATH))

    def _keep(self, *, whole: bool) -> None:
        if self._news is None:
            return
        wanted = peer_filter(self._port, *self._news, enforce=self._fate.dropped)
        if not whole and self._stands is not None and self._stands.here == wanted.here:
            self._table.change(self._stands, wanted)
        else:
            if self._stands is not None:
                self._tell(self._table.seen())
            if self._table.set(wanted):
                self._counted = _NOBODY
                if self._stands is not None:
                    log.warning("peer filter: somebody changed it, it was made anew")
        self._stands = wanted

    def _tell(self, seen: Seen) -> None:
        """Count what is new, and name who is."""
        metrics = self._health.metrics
        strangers = _growth(self._counted.strangers, seen.strangers)
        natted = _growth(self._counted.natted, seen.natted)
        self._counted = seen
        metrics.stranger_packets += sum(strangers.values())
        metrics.natted_packets += sum(natted.values())
        self._health.strangers = {
            format_address(address): packets for address, packets in list(seen.strangers.items())[:20]
        }
        self._name(strangers, f"that no lease explains; they are {self._fate.words}")
        self._name(natted, "with the VTEP MAC of a lease with another public IP (NAT?); they are let through")

    def _name(self, grown: Mapping[Address, int], words: str) -> None:
        new = [address for address in grown if (address, words) not in self._said]
        for address in new[:_NAMED]:
            log.warning("peer filter: %s sent %d packet(s) to port %d %s",
                        format_address(address), grown[address], self._port, words)  # fmt: skip
        if len(new) > _NAMED:
            log.warning("peer filter: %d more sources sent packets %s", len(new) - _NAMED, words)
        if len(self._said) < _REMEMBERED:
            self._said.update((address, words) for address in new)

    def _say_trouble(self, text: str) -> None:
        if text != self._trouble:
            self._trouble = text
            log.warning("%s", text)


def _growth(before: Mapping[Address, int], now: Mapping[Address, int]) -> dict[Address, int]:
    """What came since the last look; a source that was forgotten begins at 0 again."""
    grown = {}
    for address, count in now.items():
        known = before.get(address, 0)
        grown[address] = count - known if count >= known else count
    return {address: count for address, count in grown.items() if count}
