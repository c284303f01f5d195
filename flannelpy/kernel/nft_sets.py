"""Sets of nf_tables as messages, and the expressions that look things up in them. Pure.

Sources as in `nft_codec`.
"""

import struct
from collections.abc import Collection, Iterable

from flannelpy.kernel.codec import NLM_F_CREATE, NLM_F_DUMP, Message, attr, attributes
from flannelpy.kernel.nft_codec import (
    DELSETELEM,
    GETSETELEM,
    JUMP,
    NEWCHAIN,
    NEWSET,
    NEWSETELEM,
    Expression,
    Value,
    compare,
    elements,
    head,
    load,
    text_attr,
    u32,
)

TIMEOUT, EVAL = 0x10, 0x20
"""NFT_SET_*: elements vanish by themselves; packets add elements."""
_KEY_TYPE = {4: 7, 16: 8, 6: 9}
"""nft's numbers for ipv4_addr, ipv6_addr and ether_addr, by their width."""
_NESTED = 0x8000
_AT_ONCE = 1000
"""Elements per message: an attribute holds 64 KiB."""

META_NFPROTO, META_L4PROTO = 15, 16
UDP = 17
DYNSET_UPDATE = 1
COUNTER = Expression("counter", ())


def set_put(
    family: int,
    table: str,
    name: str,
    number: int,
    width: int,
    *,
    flags: int = 0,
    seconds: int = 0,
    size: int = 0,
) -> Message:
    """Make a set of keys of 4, 16 or 6 bytes; `number` tells sets of one transaction apart."""
    body = head(family) + text_attr(1, table) + text_attr(2, name)
    body += attr(3, u32(flags)) + attr(4, u32(_KEY_TYPE[width])) + attr(5, u32(width)) + attr(10, u32(number))
    if seconds:
        body += attr(11, struct.pack(">Q", seconds * 1000))
    if size:
        body += attr(9 | _NESTED, attr(1, u32(size)))
    return Message(NEWSET, NLM_F_CREATE, body)


def plain_chain_put(family: int, table: str, name: str) -> Message:
    """Make a chain that is only jumped to."""
    return Message(NEWCHAIN, NLM_F_CREATE, head(family) + text_attr(1, table) + text_attr(3, name))


def elements_put(family: int, table: str, name: str, keys: Collection[bytes]) -> list[Message]:
    """Add elements."""
    return _elements(NEWSETELEM, NLM_F_CREATE, family, table, name, keys)


def elements_delete(family: int, table: str, name: str, keys: Collection[bytes]) -> list[Message]:
    """Remove elements that are there."""
    return _elements(DELSETELEM, 0, family, table, name, keys)


def elements_flush(family: int, table: str, name: str) -> Message:
    """Remove all elements."""
    return Message(DELSETELEM, 0, head(family) + text_attr(1, table) + text_attr(2, name))


def elements_dump(family: int, table: str, name: str) -> Message:
    """All elements of a set."""
    return Message(GETSETELEM, NLM_F_DUMP, head(family) + text_attr(1, table) + text_attr(2, name))


def _elements(
    kind: int, flags: int, family: int, table: str, name: str, keys: Collection[bytes]
) -> list[Message]:
    place = head(family) + text_attr(1, table) + text_attr(2, name)
    found = []
    ordered = sorted(keys)
    for start in range(0, len(ordered), _AT_ONCE):
        listed = b"".join(
            attr(1 | _NESTED, attr(1 | _NESTED, attr(1, key))) for key in ordered[start : start + _AT_ONCE]
        )
        found.append(Message(kind, flags, place + attr(3 | _NESTED, listed)))
    return found


def read_elements(bodies: Iterable[bytes]) -> dict[bytes, int]:
    """Key -> packets that its counter has seen (0 without one)."""
    found = {}
    for body in bodies:
        for element in elements(attributes(body, 4).get(3, b"")):
            parts = attributes(element, 0)
            key = attributes(parts.get(1, b""), 0).get(1)
            if key is not None:
                counter = attributes(attributes(parts.get(7, b""), 0).get(2, b""), 0)
                found[key] = int.from_bytes(counter.get(2, b""))
    return found


# --- expressions -----------------------------------------------------------------------------------------


def meta(key: int, value: int) -> tuple[Expression, Expression]:
    """A property of the packet, one byte long, has this value."""
    return Expression("meta", ((1, u32(1)), (2, u32(key)))), compare(bytes([value]))


def udp_to(port: int) -> tuple[Expression, ...]:
    """UDP to this port."""
    return *meta(META_L4PROTO, UDP), load(2, 2, 2), compare(port.to_bytes(2))


def lookup(name: str, *, absent: bool = False) -> Expression:
    """Go on if the register's value is in the set (or is not)."""
    attrs: tuple[tuple[int, Value], ...] = ((1, name.encode() + b"\0"), (2, u32(1)))
    return Expression("lookup", (*attrs, (5, u32(1))) if absent else attrs)


def remember(name: str) -> Expression:
    """Put the register's value into the set and count its packets. Does not go on if the set is full."""
    counter: Value = ((1, b"counter\0"), (2, ()))
    return Expression(
        "dynset", ((1, name.encode() + b"\0"), (3, u32(DYNSET_UPDATE)), (4, u32(1)), (7, counter))
    )


def jump(chain: str) -> Expression:
    """Go on in another chain."""
    verdict: Value = ((1, u32(JUMP)), (2, chain.encode() + b"\0"))
    return Expression("immediate", ((1, u32(0)), (2, ((2, verdict),))))
