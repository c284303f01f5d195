"""The rules in nf_tables: tables of our own, and what iptables-nft or a flannel left of ours in others.

    observe (dumps) -> plan (pure) -> one transaction, tied to the generation that was observed

Our tables have flannel's names, so a flannel that follows us takes them over, and we its. A table that is
not as it should be is replaced as a whole, atomically. Outside of them two accepts are all that we ever add,
and only where `ip filter FORWARD` drops by its policy, as Docker sets it: an accept in a table of ours does
not override another table's drop.
"""

import errno
from collections.abc import Sequence
from typing import NamedTuple

from flannelpy.kernel import nft_codec
from flannelpy.kernel.codec import Message
from flannelpy.kernel.netlink import NetlinkError
from flannelpy.kernel.nfnetlink import NetfilterSocket
from flannelpy.kernel.nft_codec import (
    DROP,
    FAMILY,
    FAMILY_WORD,
    HOOK_FORWARD,
    HOOK_POSTROUTING,
    INET,
    Chain,
    Expression,
    FoundChain,
    FoundRule,
)
from flannelpy.model.traffic import FamilyRules, Rule, RuleSet

OWN_TABLES = {32: "flannel-ipv4", 128: "flannel-ipv6"}
"""By the width of the family's addresses; flannel's names."""
FORWARD = Chain("forward", "filter", HOOK_FORWARD, 0)
POSTRTG = Chain("postrtg", "nat", HOOK_POSTROUTING, 100)
_CHAIN_COMMENTS = {
    FORWARD: "chain to accept flannel traffic",
    POSTRTG: "chain to manage traffic masquerading by flannel",
}
COMMENTS = ("flanneld masq", "flanneld forward")
_HOOKS = (("nat", "POSTROUTING"), ("filter", "FORWARD"), ("filter", "DOCKER-USER"))
"""Chains of iptables-nft in which a rule may be ours."""
_LEFT = (("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD"))
"""Chains of iptables-nft that are ours."""
_WORTH_READING = (b"flanneld ", b"FLANNEL-", b"DOCKER-USER")
_ATTEMPTS = 5

NO_NFTABLES = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.EAFNOSUPPORT)
"""How a kernel without nf_tables answers."""


class Observed(NamedTuple):
    """What the kernel has, as far as it concerns us."""

    chains: tuple[FoundChain, ...] = ()
    rules: tuple[tuple[int, FoundRule], ...] = ()
    """(family, rule): all of our tables; of others those that name us, or lead to DOCKER-USER."""

    def chain(self, family: int, table: str, name: str) -> FoundChain | None:
        """The chain of that name, if there is one."""
        place = family, table, name
        return next((chain for chain in self.chains if chain[:3] == place), None)

    def in_chain(self, family: int, table: str, chain: str) -> list[FoundRule]:
        """Its rules, in order."""
        return [r for kind, r in self.rules if (kind, r.table, r.chain) == (family, table, chain)]


class Plan(NamedTuple):
    """What to do, as messages and in words; nothing when all is as it should be."""

    messages: list[Message]
    words: list[str]


class Outcome(NamedTuple):
    """What was done, in words, and what there was before."""

    words: list[str]
    found: Observed
    refused: bool = False
    """Rules of ours in tables of others may not be touched: these belong to one program alone (`owner`)."""


class Nftables:
    """The nf_tables of this network namespace."""

    def __init__(self) -> None:
        self._socket = NetfilterSocket()
        self.port = self._socket.port

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def works(self) -> bool:
        """Whether this kernel has nf_tables."""
        try:
            return self._socket.generation() > 0
        except NetlinkError:
            return False

    def set(self, wanted: RuleSet, *, keep_iptables: bool, only_show: bool = False) -> Outcome:
        """Make our tables as wanted (an empty rule set: remove them).

        `keep_iptables`: leave the rules of ours that belong to iptables-nft, which sets them itself.
        Raises NetlinkError; then nothing was done.
        """
        refused = False
        for attempt in range(_ATTEMPTS):
            generation = self._socket.generation()
            try:
                found = self.observe()
                todo = plan(wanted, found, keep_iptables=keep_iptables or refused)
                if todo.messages and not only_show:
                    self._socket.transact(todo.messages, generation)
            except NetlinkError as error:
                if error.errno == errno.EPERM and not (keep_iptables or refused):
                    refused = True  # our own tables, then
                    continue
                # Somebody was quicker, so what we looked at is not what there is.
                if error.errno not in (errno.ERESTART, errno.ENOENT, errno.EINTR) or attempt == _ATTEMPTS - 1:
                    raise
                continue
            return Outcome(todo.words, found, refused)
        raise NetlinkError(errno.EAGAIN)  # pragma: no cover

    def observe(self) -> Observed:
        """What there is of ours, and what has to do with it."""
        chains = tuple(map(nft_codec.read_chain, filter(_concerns_us, self._dump(nft_codec.chains_dump()))))
        rules: list[tuple[int, FoundRule]] = []
        for bits, family in FAMILY.items():
            if any(chain[:2] == (family, OWN_TABLES[bits]) for chain in chains):
                rules += self._rules(family, OWN_TABLES[bits])
            for table, name in (*_HOOKS, *_LEFT):
                if any(chain[:3] == (family, table, name) for chain in chains):
                    rules += self._rules(family, table, name)
        tables = map(nft_codec.read_table, self._dump(nft_codec.tables_dump()))
        empty = [
            FoundChain(family, name, "", None, "", None)
            for family, name in tables
            if (family, name) in {(FAMILY[bits], OWN_TABLES[bits]) for bits in FAMILY}
        ]
        return Observed((*chains, *empty), tuple(rules))

    def fingerprints(self, bits: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Of the rules that iptables-nft keeps for us, by table: those in our chain, and before our jump.

        A rule's handle is enough: a rule cannot be changed, only be replaced by one with another handle.
        """
        family = FAMILY[bits]
        prints = {}
        for (table, hook), (_table, chain) in zip(_HOOKS, _LEFT, strict=False):
            found: list[tuple[int, ...]] = []
            for name in (chain, hook):
                try:
                    bodies = self._dump(nft_codec.rules_dump(family, table, name))
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    bodies = []
                if name == hook:
                    ours = [b"FLANNEL-" in body or b"flanneld " in body for body in bodies]
                    bodies = bodies[: len(ours) - ours[::-1].index(True)] if any(ours) else []
                found.append(tuple(map(nft_codec.read_handle, bodies)))
            prints[table] = tuple(found)
        return prints

    def _rules(self, family: int, table: str, chain: str = "") -> list[tuple[int, FoundRule]]:
        bodies = self._dump(nft_codec.rules_dump(family, table, chain))
        if chain:  # of others there may be 20,000
            bodies = [body for body in bodies if any(name in body for name in _WORTH_READING)]
        return [(family, nft_codec.read_rule(body)) for body in bodies]

    def _dump(self, message: Message) -> list[bytes]:
        return self._socket.dump(message)


def _concerns_us(body: bytes) -> bool:
    """Whether a chain may matter, without taking it apart: there may be thousands."""
    return (
        b"flannel-ipv" in body
        or b"FLANNEL-" in body
        or any(name.encode() + b"\0" in body for _table, name in _HOOKS)
        or nft_codec.HOOK_MARK in body
    )


# --- what should be --------------------------------------------------------------------------------------


def plan(wanted: RuleSet, found: Observed, *, keep_iptables: bool) -> Plan:
    """From what was found to what is wanted. Pure."""
    todo = Plan([], [])
    for bits, family in FAMILY.items():
        rules = wanted.family(bits) or FamilyRules()
        _plan_own(todo, bits, rules, found, random_fully=wanted.random_fully)
        if not keep_iptables:
            _plan_elsewhere(todo, family, rules.forward, found)
    return todo


def _steps(rules: Sequence[Rule], *, random_fully: bool = False) -> list[tuple[Expression, ...]]:
    return [nft_codec.expressions(rule, random_fully=random_fully) for rule in rules]


def _plan_own(todo: Plan, bits: int, rules: FamilyRules, found: Observed, *, random_fully: bool) -> None:
    """Our own table, replaced as a whole if anything differs."""
    family, table = FAMILY[bits], OWN_TABLES[bits]
    chains = {
        chain: _steps(asked, random_fully=random_fully)
        for chain, asked in ((FORWARD, rules.forward), (POSTRTG, rules.masquerade))
        if asked
    }
    exists = any(chain[:2] == (family, table) for chain in found.chains)
    if not chains and not exists:
        return
    if chains and exists and _as_wanted(family, table, chains, found):
        return
    name = f"table {FAMILY_WORD[family]} {table}"
    comment = f"rules for {table}"
    if exists:
        todo.messages.append(nft_codec.table_delete(family, table))
    todo.words.append(f"{'removed' if not chains else 'replaced' if exists else 'added'} {name}")
    if not chains:
        return
    todo.messages.append(nft_codec.table_put(family, table, comment))
    for chain, listed in chains.items():
        todo.messages.append(nft_codec.chain_put(family, table, chain, _CHAIN_COMMENTS[chain]))
        todo.messages.extend(nft_codec.rule_put(family, table, chain.name, steps) for steps in listed)


def _as_wanted(
    family: int, table: str, chains: dict[Chain, list[tuple[Expression, ...]]], found: Observed
) -> bool:
    present = {chain.name: chain for chain in found.chains if chain[:2] == (family, table) and chain.name}
    if present.keys() != {chain.name for chain in chains}:
        return False
    for chain, listed in chains.items():
        seen = present[chain.name]
        if (seen.hook, seen.type, seen.policy) != ((chain.hook, chain.priority), chain.type, chain.policy):
            return False
        if not _same(found.in_chain(family, table, chain.name), listed):
            return False
    return True


def _same(rules: Sequence[FoundRule], wanted: Sequence[Sequence[Expression]]) -> bool:
    return len(rules) == len(wanted) and all(map(nft_codec.matches, rules, wanted))


def is_ours(rule: FoundRule) -> bool:
    """Whether a rule in somebody else's chain is ours: by its comment, or by where it leads."""
    if rule.comment in COMMENTS or nft_codec.jumps_to(rule) in ("FLANNEL-POSTRTG", "FLANNEL-FWD"):
        return True
    # Older versions of iptables-nft keep a comment in a match of its own.
    return any(
        name == "match" and b"comment\0" in data and any(word.encode() in data for word in COMMENTS)
        for name, data in rule.expressions
    )


def _plan_elsewhere(todo: Plan, family: int, forward: Sequence[Rule], found: Observed) -> None:
    """In the tables of iptables-nft: our two accepts where they are needed, nothing else of ours."""
    word = FAMILY_WORD[family]
    target = _accepts_go_to(family, found) if forward else None
    wanted = _steps(forward)
    for table, chain in _HOOKS:
        ours = [rule for rule in found.in_chain(family, table, chain) if is_ours(rule)]
        here = target == chain and table == "filter"
        if _same(ours, wanted if here else ()):
            continue
        todo.messages.extend(nft_codec.rules_delete(family, table, chain, rule.handle) for rule in ours)
        if here:
            # At the front, the last one first: DOCKER-USER ends with a return, FORWARD may with a drop.
            todo.messages.extend(
                nft_codec.rule_put(family, table, chain, steps, comment=COMMENTS[1], first=True)
                for steps in reversed(wanted)
            )
            todo.words.append(f"added two accepts to {word} {table} {chain}, which drops by its policy")
        else:
            todo.words.append(f"removed {len(ours)} rule(s) of ours from {word} {table} {chain}")
    for table, chain in _LEFT:
        if found.chain(family, table, chain) is not None:
            todo.messages.append(nft_codec.rules_delete(family, table, chain))
            todo.messages.append(nft_codec.chain_delete(family, table, chain))
            todo.words.append(f"removed chain {chain} from {word} {table}")


def _accepts_go_to(family: int, found: Observed) -> str | None:
    """The chain that must accept forwarded packets, because FORWARD drops the rest; None = none must."""
    chain = found.chain(family, "filter", "FORWARD")
    if chain is None or chain.hook is None or chain.policy != DROP:
        return None
    jumps = any(
        nft_codec.jumps_to(rule) == "DOCKER-USER" for rule in found.in_chain(family, "filter", "FORWARD")
    )
    return "DOCKER-USER" if jumps and found.chain(family, "filter", "DOCKER-USER") else "FORWARD"


def droppers(wanted: RuleSet, found: Observed, *, forward_is_served: bool) -> list[str]:
    """Chains of others that drop forwarded packets by their policy, where no accept of ours is.

    `forward_is_served`: in FORWARD of iptables-nft there is one.
    """
    families = {FAMILY[bits] for bits in FAMILY if (wanted.family(bits) or FamilyRules()).forward}
    return [
        f"{FAMILY_WORD.get(chain.family, '?')} {chain.table} {chain.name}"
        for chain in found.chains
        if chain.hook is not None
        and chain.hook[0] == HOOK_FORWARD
        and chain.policy == DROP
        and (chain.family in families or (chain.family == INET and families))
        and not (forward_is_served and (chain.table, chain.name) == ("filter", "FORWARD"))
    ]
