"""nf_tables messages as bytes: what we send, and how to know it again in what the kernel has. Pure.

Sources: include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h; numbers are in network order. A rule is a
list of expressions: "load the source address", "and it with a mask", "compare". Only what our few rules need;
tests let `nft` itself read back what we send. Why our own, and not the nft program: docs/design/0007.
"""

import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from flannelpy.kernel.codec import NLM_F_CREATE, NLM_F_DUMP, Message, attr, attributes
from flannelpy.model.traffic import MARK, Match, Rule, Verdict

SUBSYSTEM = 10
"""NFNL_SUBSYS_NFTABLES: the upper byte of the message types."""
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NEWTABLE, GETTABLE, DELTABLE = 0x0A00, 0x0A01, 0x0A02
NEWCHAIN, GETCHAIN, DELCHAIN = 0x0A03, 0x0A04, 0x0A05
NEWRULE, GETRULE, DELRULE = 0x0A06, 0x0A07, 0x0A08
NEWSET, GETSET, DELSET = 0x0A09, 0x0A0A, 0x0A0B
NEWSETELEM, GETSETELEM, DELSETELEM = 0x0A0C, 0x0A0D, 0x0A0E
NEWGEN, GETGEN = 0x0A0F, 0x0A10
NLM_F_APPEND = 0x800

INET, IPV4, IPV6 = 1, 2, 10
"""NFPROTO_*: the family of a table."""
FAMILY = {32: IPV4, 128: IPV6}
FAMILY_WORD = {INET: "inet", IPV4: "ip", IPV6: "ip6"}

HOOK_PREROUTING, HOOK_FORWARD, HOOK_POSTROUTING = 0, 2, 4
DROP, ACCEPT, JUMP, GOTO, RETURN = 0, 1, -3, -4, -5

# Attributes that are read elsewhere.
TABLE_NAME = 1
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 1, 3, 4, 5, 7
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS, RULE_USERDATA = 1, 2, 3, 4, 7
HOOK_MARK = b"\x14\x00\x04" if sys.byteorder == "little" else b"\x00\x14"
"""Bytes that each message about a base chain has: its hook, two numbers long."""
GEN_ID, GEN_PROC_PID, GEN_PROC_NAME = 1, 2, 3

_LIST_ELEM, _EXPR_NAME, _EXPR_DATA = 1, 1, 2
_NESTED = 0x8000
_RANDOM_FULLY = 0x10
"""NF_NAT_RANGE_PROTO_RANDOM_FULLY."""
_META_MARK = 3
_REGISTER, _VERDICT_REGISTER = 1, 0
_COMMENT = 0
"""NFTNL_UDATA_*_COMMENT: the kind of user data in which nft and iptables-nft keep comments."""

Value: TypeAlias = "bytes | tuple[tuple[int, Value], ...]"
"""An attribute's payload: bytes, or attributes again."""


class Expression(NamedTuple):
    """One step of a rule: the name of its kind, and its attributes."""

    name: str
    attrs: tuple[tuple[int, Value], ...]


class Chain(NamedTuple):
    """A base chain."""

    name: str
    type: str
    """"filter" or "nat"."""
    hook: int
    priority: int
    policy: int = ACCEPT


class FoundRule(NamedTuple):
    """A rule as the kernel has it."""

    table: str
    chain: str
    handle: int
    expressions: tuple[tuple[str, bytes], ...]
    """(kind, its attributes as sent by the kernel)."""
    comment: str


class FoundChain(NamedTuple):
    """A chain as the kernel has it."""

    family: int
    table: str
    name: str
    hook: tuple[int, int] | None
    """(hook, priority) of a base chain."""
    type: str
    policy: int | None


def u32(value: int) -> bytes:
    """A number in network order."""
    return struct.pack(">I", value & 0xFFFFFFFF)


def text_attr(kind: int, text: str) -> bytes:
    """An attribute that is a name."""
    return attr(kind, text.encode() + b"\0")


def head(family: int) -> bytes:
    """What every message begins with: its family."""
    return bytes((family, 0, 0, 0))  # nfgenmsg: NFNETLINK_V0, no resource


def _comment(text: str) -> bytes:
    data = text.encode() + b"\0"
    return bytes((_COMMENT, len(data))) + data


# --- expressions -----------------------------------------------------------------------------------------


def expressions(rule: Rule, *, random_fully: bool) -> tuple[Expression, ...]:
    """A rule for a table of its own family."""
    found: list[Expression] = []
    if rule.marked:
        found.append(Expression("meta", ((1, u32(_REGISTER)), (2, u32(_META_MARK)))))
        found += _masked_compare(struct.pack("=I", MARK), struct.pack("=I", MARK))  # a mark is in host order
    for match, is_source in ((rule.source, True), (rule.destination, False)):
        if match is not None:
            found += _address(match, source=is_source)
    if rule.verdict is Verdict.MASQUERADE:
        flags = ((1, u32(_RANDOM_FULLY)),) if random_fully else ()
        return (*found, Expression("masq", flags))
    return (*found, verdict(ACCEPT if rule.verdict is Verdict.ACCEPT else RETURN))


def verdict(code: int) -> Expression:
    """What becomes of the packet."""
    data: Value = ((2, ((1, u32(code)),)),)
    return Expression("immediate", ((1, u32(_VERDICT_REGISTER)), (2, data)))


def load(base: int, offset: int, length: int) -> Expression:
    """Bytes of the packet into the register; base 1 = from the network header, 2 = transport header."""
    places = ((1, _REGISTER), (2, base), (3, offset), (4, length))
    return Expression("payload", tuple((kind, u32(value)) for kind, value in places))


def compare(value: bytes, *, differs: bool = False) -> Expression:
    """Go on if the register is (or is not) this."""
    return Expression("cmp", ((1, u32(_REGISTER)), (2, u32(int(differs))), (3, ((1, value),))))


def _masked_compare(mask: bytes, value: bytes, *, differs: bool = False) -> tuple[Expression, ...]:
    width = len(mask)
    masked = Expression(
        "bitwise",
        (
            (1, u32(_REGISTER)),
            (2, u32(_REGISTER)),
            (3, u32(width)),
            (4, ((1, mask),)),
            (5, ((1, bytes(width)),)),
        ),
    )
    return masked, compare(value, differs=differs)


def _address(match: Match, *, source: bool) -> Iterable[Expression]:
    """The place of the addresses: 12 and 16 in an IPv4 header, 8 and 24 in an IPv6 one."""
    prefix = match.prefix
    width = len(prefix.address)
    offset = {(4, True): 12, (4, False): 16, (16, True): 8, (16, False): 24}[width, source]
    mask = (((1 << prefix.length) - 1) << (prefix.bits - prefix.length)).to_bytes(width)
    value = prefix.network().address
    return load(1, offset, width), *_masked_compare(mask, value, differs=match.inverted)


def _encode(attrs: Iterable[tuple[int, Value]]) -> bytes:
    return b"".join(
        attr(kind, value) if isinstance(value, bytes) else attr(kind | _NESTED, _encode(value))
        for kind, value in attrs
    )


def _step(step: Expression) -> bytes:
    return text_attr(_EXPR_NAME, step.name) + attr(_EXPR_DATA | _NESTED, _encode(step.attrs))


def matches(found: FoundRule, wanted: Sequence[Expression]) -> bool:
    """Whether the kernel's rule is what we would send; attributes that the kernel adds do not count.

    Counters that iptables-nft puts into its rules say nothing about what a rule does.
    """
    steps = [(name, data) for name, data in found.expressions if name != "counter"]
    ours = [expression for expression in wanted if expression.name != "counter"]
    return len(steps) == len(ours) and all(
        name == expression.name and _covers(data, expression.attrs)
        for (name, data), expression in zip(steps, ours, strict=True)
    )


def _covers(data: bytes, wanted: tuple[tuple[int, Value], ...]) -> bool:
    found = attributes(data, 0)
    for kind, value in wanted:
        payload = found.get(kind)
        if payload is None:
            return False
        if isinstance(value, bytes):
            if payload != value:
                return False
        elif not _covers(payload, value):
            return False
    return True


# --- messages --------------------------------------------------------------------------------------------


def table_put(family: int, name: str, comment: str) -> Message:
    """Make a table; one that is there is kept."""
    body = head(family) + text_attr(TABLE_NAME, name) + attr(6, _comment(comment))
    return Message(NEWTABLE, NLM_F_CREATE, body)


def table_delete(family: int, name: str) -> Message:
    """Remove a table with all that is in it."""
    return Message(DELTABLE, 0, head(family) + text_attr(TABLE_NAME, name))


def chain_put(family: int, table: str, chain: Chain, comment: str) -> Message:
    """Make a base chain."""
    hook = attr(1, u32(chain.hook)) + attr(2, u32(chain.priority))
    body = (
        text_attr(CHAIN_TABLE, table) + text_attr(CHAIN_NAME, chain.name) + attr(CHAIN_HOOK | _NESTED, hook)
    )
    body += attr(CHAIN_POLICY, u32(chain.policy)) + text_attr(CHAIN_TYPE, chain.type)
    return Message(NEWCHAIN, NLM_F_CREATE, head(family) + body + attr(12, _comment(comment)))


def chain_delete(family: int, table: str, name: str) -> Message:
    """Remove a chain that is empty and that nothing jumps to."""
    return Message(DELCHAIN, 0, head(family) + text_attr(CHAIN_TABLE, table) + text_attr(CHAIN_NAME, name))


def rule_put(
    family: int,
    table: str,
    chain: str,
    steps: Sequence[Expression],
    *,
    comment: str = "",
    first: bool = False,
) -> Message:
    """Add a rule at the end of a chain, or as its first."""
    listed = b"".join(attr(_LIST_ELEM | _NESTED, _step(step)) for step in steps)
    body = (
        text_attr(RULE_TABLE, table) + text_attr(RULE_CHAIN, chain) + attr(RULE_EXPRESSIONS | _NESTED, listed)
    )
    if comment:
        body += attr(RULE_USERDATA, _comment(comment))
    return Message(NEWRULE, NLM_F_CREATE | (0 if first else NLM_F_APPEND), head(family) + body)


def rules_delete(family: int, table: str, chain: str, handle: int = 0) -> Message:
    """Remove one rule of a chain, or (0) all of them."""
    body = text_attr(RULE_TABLE, table) + text_attr(RULE_CHAIN, chain)
    if handle:
        body += attr(RULE_HANDLE, struct.pack(">Q", handle))
    return Message(DELRULE, 0, head(family) + body)


def generation_get() -> Message:
    """Which number the rule set as a whole has; every transaction counts it up."""
    return Message(GETGEN, 0, head(0))


def tables_dump() -> Message:
    """All tables."""
    return Message(GETTABLE, NLM_F_DUMP, head(0))


def chains_dump() -> Message:
    """All chains of all tables."""
    return Message(GETCHAIN, NLM_F_DUMP, head(0))


def rules_dump(family: int, table: str, chain: str = "") -> Message:
    """The rules of one table, or of one chain of it."""
    body = text_attr(RULE_TABLE, table) + (text_attr(RULE_CHAIN, chain) if chain else b"")
    return Message(GETRULE, NLM_F_DUMP, head(family) + body)


# --- answers ---------------------------------------------------------------------------------------------


def read_table(body: bytes) -> tuple[int, str]:
    """(family, name)."""
    return body[0], _string(attributes(body, 4).get(TABLE_NAME))


def read_chain(body: bytes) -> FoundChain:
    """NEWCHAIN."""
    found = attributes(body, 4)
    hook = attributes(found[CHAIN_HOOK], 0) if CHAIN_HOOK in found else None
    place = None
    if hook is not None and len(hook.get(1, b"")) == len(hook.get(2, b"")) == 4:
        place = (int.from_bytes(hook[1]), int.from_bytes(hook[2], signed=True))
    policy = found.get(CHAIN_POLICY)
    return FoundChain(
        body[0],
        _string(found.get(CHAIN_TABLE)),
        _string(found.get(CHAIN_NAME)),
        place,
        _string(found.get(CHAIN_TYPE)),
        int.from_bytes(policy) if policy is not None else None,
    )


def read_rule(body: bytes) -> FoundRule:
    """NEWRULE."""
    found = attributes(body, 4)
    steps = []
    for payload in elements(found.get(RULE_EXPRESSIONS, b"")):
        step = attributes(payload, 0)
        steps.append((_string(step.get(_EXPR_NAME)), step.get(_EXPR_DATA, b"")))
    return FoundRule(
        _string(found.get(RULE_TABLE)),
        _string(found.get(RULE_CHAIN)),
        int.from_bytes(found.get(RULE_HANDLE, b"")),
        tuple(steps),
        _read_comment(found.get(RULE_USERDATA, b"")),
    )


def read_handle(body: bytes) -> int:
    """The number of a rule, of NEWRULE."""
    return int.from_bytes(attributes(body, 4).get(RULE_HANDLE, b""))


def read_generation(body: bytes) -> tuple[int, int, str]:
    """(number, id of the process that made it, its name); 0 and "" where the kernel does not say."""
    found = attributes(body, 4)
    pid = int.from_bytes(found.get(GEN_PROC_PID, b""))
    return int.from_bytes(found.get(GEN_ID, b"")), pid, _string(found.get(GEN_PROC_NAME))


def jumps_to(rule: FoundRule) -> str:
    """The chain that a rule's verdict leads to, or ""."""
    for name, data in rule.expressions:
        if name == "immediate":
            given = attributes(attributes(attributes(data, 0).get(2, b""), 0).get(2, b""), 0)
            return _string(given.get(2))
    return ""


def elements(data: bytes) -> Iterable[bytes]:
    """The payloads of a list, whose attributes all have the same kind."""
    offset = 0
    while offset + 4 <= len(data):
        (length,) = struct.unpack_from("=H", data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _read_comment(data: bytes) -> str:
    offset = 0
    while offset + 2 <= len(data):
        kind, length = data[offset], data[offset + 1]
        if kind == _COMMENT:
            return _string(data[offset + 2 : offset + 2 + length])
        offset += 2 + length
    return ""


def _string(data: bytes | None) -> str:
    return (data or b"").partition(b"\0")[0].decode("utf-8", "replace")
