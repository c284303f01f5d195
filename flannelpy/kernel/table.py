"""A kernel table as it is dumped: thousands of messages, nearly all of one layout, read by one struct each.

To walk through the attributes of a message takes Python 3 us, and 10,000 peers are 40,000 messages. So the
layout of a message is learned once, and what follows it with the same length, type and attribute headers is
read in one step. A message that differs teaches its own layout. Pure.

Whether messages are alike is seen in columns: one byte of each, taken together by a slice with a step.
"""

import struct
from collections.abc import Callable, Collection
from operator import itemgetter
from typing import Any, NamedTuple

Row = tuple[Any, ...]

_HEADER_SIZE = 16
_LENGTH = struct.Struct("=I")
_ATTR = struct.Struct("=HH")
_ANY = range(1 << 14)
_LAYOUTS = 64
"""Layouts remembered; a table has a handful."""


class _Layout(NamedTuple):
    whole: struct.Struct
    same: tuple[int, ...]
    """Where the bytes are that must be the same in a message for it to have this layout."""
    pick: Callable[[Row], Row]
    odd: bool
    """It has attributes that are not usual."""


class Table:
    """How one kind of message becomes a row: fields of the fixed part, attributes, what is odd.

    `fixed` is the struct format of what follows the header. Of the attributes, `numbers` are 32 bits in host
    order and `octets` stay bytes; one that is absent is b"". A row's last field is the body of a message
    that has attributes other than `usual`, otherwise b"".
    """

    def __init__(
        self,
        fixed: str,
        numbers: Collection[int],
        octets: Collection[int],
        usual: Collection[int] = _ANY,
    ) -> None:
        self._fixed = fixed
        self._first_attr = _HEADER_SIZE + struct.calcsize(f"={fixed}")
        self._fields = len(struct.unpack(f"={fixed}", bytes(self._first_attr - _HEADER_SIZE)))
        self._numbers = frozenset(numbers)
        self._wanted = (*numbers, *octets)
        self._usual = usual
        self._layouts: dict[tuple[int, ...], _Layout] = {}

    def read(self, data: bytes, offset: int) -> tuple[list[Row], int]:
        """The rows of the message at `offset` and of all that follow alike, and where the next one begins.

        `data` holds a whole message at `offset`. Malformed attributes, and a body that is too short, are
        skipped.
        """
        (length,) = _LENGTH.unpack_from(data, offset)
        step = (length + 3) & ~3
        if length < self._first_attr:
            return [], offset + step
        whole, same, pick, odd = self._layout(data, offset, length)
        count = (len(data) - offset) // step if whole.size == step else 1
        for place in same if count > 1 else ():
            column = data[offset + place : offset + count * step : step]
            count -= len(column.lstrip(column[:1]))  # what comes after the first that differs
        if count > 1:
            rows = list(map(pick, whole.iter_unpack(memoryview(data)[offset : offset + count * step])))
        else:
            rows = [pick(whole.unpack_from(data, offset))]
        if odd:
            starts = range(offset + _HEADER_SIZE, len(data), step)
            rows = [
                (*row[:-1], data[start : start + length - _HEADER_SIZE])
                for row, start in zip(rows, starts, strict=False)
            ]
        return rows, offset + len(rows) * step

    def read_one(self, body: bytes) -> Row:
        """The row of a single message without its header; what is missing of the fixed part counts as 0."""
        body = body.ljust(self._first_attr - _HEADER_SIZE, b"\0")
        rows, _end = self.read(_LENGTH.pack(_HEADER_SIZE + len(body)) + bytes(12) + body, 0)
        return rows[0]

    def _layout(self, data: bytes, offset: int, length: int) -> _Layout:
        end = offset + length
        position = offset + self._first_attr
        heads = []
        while position <= end - 4:
            size, kind = _ATTR.unpack_from(data, position)
            if size < 4 or position + size > end:
                break
            heads += [size, kind]
            position += (size + 3) & ~3
        key = tuple(heads)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = self._learn(key)
        return layout

    def _learn(self, heads: tuple[int, ...]) -> _Layout:
        """The struct of a message with these (size, kind, size, kind, ...) of its attributes."""
        parts = [f"={_HEADER_SIZE}x{self._fixed}"]
        same = [*range(12)]  # length, type, flags and sequence number; the port says nothing
        count, position = self._fields, self._first_attr
        place: dict[int, int] = {}
        odd, padding = False, 0
        for size, kind in zip(heads[::2], heads[1::2], strict=True):
            same += range(position, position + 4)
            position += (size + 3) & ~3
            kind &= 0x3FFF  # without NLA_F_NESTED
            odd = odd or kind not in self._usual
            payload = size - 4
            if kind in self._wanted and (kind not in self._numbers or payload == 4):
                parts.append(f"{padding + 4}x" + ("I" if kind in self._numbers else f"{payload}s"))
                place[kind] = count
                count += 1
            else:
                parts.append(f"{padding + 4 + payload}x")
            padding = -payload & 3
        parts.append("0s")  # b"" for all that is absent
        picked = [*range(self._fields), *(place.get(kind, count) for kind in self._wanted), count]
        return _Layout(struct.Struct("".join(parts)), tuple(same), itemgetter(*picked), odd)
