"""Which nexthop objects are ours, what they lead to, and which of them a route still needs."""

from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias
from zlib import crc32

from flannelpy.kernel.replies import NexthopInfo
from flannelpy.model.address import Address, Prefix
from flannelpy.model.kernel import ROUTE_PROTOCOL

RouteKey: TypeAlias = tuple[Prefix, int]
Way: TypeAlias = tuple[int, Address]
"""(device index, gateway)."""

_BLOCK = 1 << 16
_FIRST_BLOCK, _BLOCKS = 0x4600, 0x200
"""Our numbers lie far from those that people and routing daemons choose, in a block per first device."""


class Nexthops:
    """The nexthop objects of this host as last read, and as changed by us since.

    The kernel removes a nexthop object's routes with it, so one may only go once no route uses it. An object
    is ours by its mark and its device; a number alone says nothing.
    """

    def __init__(self) -> None:
        self.by_number: dict[int, NexthopInfo] = {}
        self._numbers: dict[Way, int] = {}
        """Ours only."""
        self._taken: set[int] = set()
        """Every number in use, anybody's."""
        self._used_by: dict[RouteKey, int] = {}
        self._users: dict[int, int] = {}
        """Number of ours -> routes that use it."""
        self._idle: set[int] = set()
        """Those that no route uses: to be removed."""
        self._ways: dict[int, Way] = {}
        """The reverse of `_numbers`."""
        self._last = 0

    def load(self, found: Iterable[NexthopInfo], devices: dict[int, str]) -> None:
        """Start afresh from what the kernel has; on `devices` (index -> name) what is marked is ours."""
        self.by_number = {info.number: info for info in found}
        self._taken = set(self.by_number)
        self._numbers = {
            (ifindex, gateway): number
            for number, ifindex, gateway, protocol, onlink in self.by_number.values()
            if protocol == ROUTE_PROTOCOL and gateway is not None and onlink and ifindex in devices
        }
        self._used_by = {}
        # What nothing uses was left by a crash between the two halves of a put.
        self._users = dict.fromkeys(self._numbers.values(), 0)
        self._idle = set(self._users)
        self._ways = dict(zip(self._numbers.values(), self._numbers, strict=True))
        if not self._last and devices:
            block = _FIRST_BLOCK + crc32(min(devices.values()).encode()) % _BLOCKS
            self._last = block * _BLOCK

    def load_users(self, used_by: dict[RouteKey, int]) -> None:
        """The routes that the kernel has, each with the number of the object that it goes through."""
        self._used_by = used_by
        users = Counter(used_by.values())
        self._users.update((number, users[number]) for number in self._users)
        self._idle = set(self._users).difference(users)

    def is_ours(self, number: int) -> bool:
        """Whether we made this object, or took it over."""
        return number in self._users

    def number_for(self, way: Way) -> tuple[int, bool]:
        """(the number of our object for a way, whether it has to be made first)."""
        number = self._numbers.get(way)
        if number is not None:
            return number, False
        self._last += 1
        while self._last in self._taken:
            self._last += 1
        self._numbers[way] = self._last
        self._taken.add(self._last)
        self._users[self._last] = 0
        self._idle.add(self._last)
        self._ways[self._last] = way
        return self._last, True

    def refused(self, way: Way) -> None:
        """Our object could not be made: somebody else may have its number, and we must not remove theirs."""
        self._forget(self._numbers.get(way, 0))

    def _forget(self, number: int) -> None:
        """An object is not ours any more."""
        if number in self._users:
            del self._users[number]
            self._idle.discard(number)
            self._numbers.pop(self._ways.pop(number), None)

    def use(self, route: RouteKey, number: int) -> None:
        """A route goes through this object now; 0 = through none, or there is no such route any more."""
        before = self._used_by.pop(route, 0)
        if before in self._users:
            self._users[before] -= 1
            if not self._users[before]:
                self._idle.add(before)
        if number:
            self._used_by[route] = number
            if number in self._users:
                self._users[number] += 1
                self._idle.discard(number)

    def unused(self) -> list[int]:
        """Our objects that no route needs, forgotten here: the caller removes them from the kernel."""
        numbers = sorted(self._idle)
        for number in numbers:
            self._forget(number)
        self._taken.difference_update(numbers)
        return numbers

    def forget_device(self, ifindex: int) -> None:
        """A device went, and its objects with it."""
        for way in [way for way in self._numbers if way[0] == ifindex]:
            number = self._numbers[way]
            self._forget(number)
            self._taken.discard(number)
