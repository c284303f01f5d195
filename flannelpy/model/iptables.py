"""Rules as iptables knows them: from `iptables-save` to `iptables-restore --noflush`. Pure.

The lines are flannel's, byte for byte, as `iptables -S` prints them. A chain of our own per table, and one
jump to it. What is ours outside of our chains carries our comment, or jumps to a chain of ours.
"""

import re
from typing import NamedTuple

from flannelpy.model.traffic import MARK, FamilyRules, Match, Rule, RuleSet, Verdict


class _Table(NamedTuple):
    """Where one kind of rules lives."""

    name: str
    hook: str
    """The chain of the table that jumps to ours."""
    chain: str
    comment: str


NAT = _Table("nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq")
FILTER = _Table("filter", "FORWARD", "FLANNEL-FWD", "flanneld forward")
TABLES = (NAT, FILTER)

_JUMP = re.compile(r" -[jg] FLANNEL-(?:POSTRTG|FWD)(?= |$)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')

_ENDS = {
    "nat": re.compile(r"-j (?:ACCEPT|MASQUERADE|SNAT|RETURN)\b"),
    "filter": re.compile(r"-j (?:DROP|REJECT|RETURN)\b"),
}
"""Rules without a condition after which nothing of a chain is reached."""


class Difference(NamedTuple):
    """What iptables-restore has to be told, and the same in words; both empty when nothing differs."""

    text: str
    words: tuple[str, ...]


def chain_lines(table: _Table, wanted: FamilyRules, *, random_fully: bool) -> list[str]:
    """The lines of our chain in this table, as `iptables -S` prints them; none = the chain is not wanted."""
    rules = wanted.masquerade if table is NAT else wanted.forward
    return [f"-A {table.chain} {_specification(rule, table.comment, random_fully)}" for rule in rules]


def jump_line(table: _Table) -> str:
    """The line that leads to our chain."""
    return f'-A {table.hook} -m comment --comment "{table.comment}" -j {table.chain}'


def difference(saved: str, wanted: FamilyRules, *, random_fully: bool, only: str = "") -> Difference:
    """What leads from the tables as saved to those that are wanted; or `only` for one of them.

    Our chain is replaced as a whole in the same transaction as its jump, so there is never a moment without.
    """
    texts: list[str] = []
    words: list[str] = []
    for table in TABLES:
        if only not in ("", table.name):
            continue
        lines = chain_lines(table, wanted, random_fully=random_fully)
        text, what = _table_difference(table, _read(saved, table), lines)
        if text:
            texts.append(f"*{table.name}\n{text}COMMIT\n")
            words += what
    return Difference("".join(texts), tuple(words))


class _Saved(NamedTuple):
    """What one table has, as far as it concerns us."""

    declared: bool
    """Our chain exists."""
    chain: list[str]
    """Its lines."""
    outside: list[str]
    """Lines of ours in other chains."""
    hook: list[str]
    """The lines of the chain that ours hangs in, ours included."""


def _read(saved: str, table: _Table) -> _Saved:
    _before, _mark, rest = f"\n{saved}".partition(f"\n*{table.name}\n")
    lines = rest.partition("\nCOMMIT")[0].split("\n")
    start, own = f"-A {table.hook} ", f"-A {table.chain} "
    named = [line for line in lines if "flanneld " in line or "FLANNEL-" in line]
    return _Saved(
        any(line.startswith(f":{table.chain} ") for line in named),
        [line for line in named if line.startswith(own)],
        [line for line in named if line.startswith("-A ") and not line.startswith(own) and _is_ours(line)],
        [line for line in lines if line.startswith(start)],
    )


def _is_ours(line: str) -> bool:
    """Whether a line outside of our chains is; also what an old flannel put straight into POSTROUTING."""
    if any(f'--comment "{table.comment}"' in line for table in TABLES):
        return True
    return _JUMP.search(_QUOTED.sub('""', line)) is not None


def _table_difference(table: _Table, saved: _Saved, lines: list[str]) -> tuple[str, list[str]]:
    restore: list[str] = []
    words: list[str] = []
    if lines and (not saved.declared or saved.chain != lines):
        restore += [f":{table.chain} - [0:0]", *lines]
        words.append(f"{'changed' if saved.declared else 'added'} chain {table.chain}")
    jump = jump_line(table) if lines else None
    if saved.outside != [jump] * bool(lines) or (jump and not _reached(table, saved, jump)):
        restore += [f"-D {line.removeprefix('-A ')}" for line in saved.outside]
        words += _jump_words(table, saved.outside, jump)
        if jump:
            restore.append(_placed(table, saved, jump))
    if saved.declared and not lines:
        restore += [f"-F {table.chain}", f"-X {table.chain}"]
        words.append(f"removed chain {table.chain}")
    return "".join(f"{line}\n" for line in restore), words


def _jump_words(table: _Table, outside: list[str], jump: str | None) -> list[str]:
    found = outside.count(jump) if jump else 0
    strays = len(outside) - found
    words = []
    if jump and found != 1:
        words.append(f"{'added the' if not found else 'left only one'} jump to {table.chain}")
    elif jump and not strays:
        words.append(f"moved the jump to {table.chain}")
    if strays:
        words.append(f"removed {strays} rule(s) of ours outside of {table.chain}")
    return words


def _end(table: _Table, lines: list[str]) -> int:
    """How many lines of the hook come before one that ends it for all packets."""
    start = len(f"-A {table.hook} ")
    return next((i for i, line in enumerate(lines) if _ENDS[table.name].match(line, start)), len(lines))


def _reached(table: _Table, saved: _Saved, jump: str) -> bool:
    return jump in saved.hook[: _end(table, saved.hook)]


def _placed(table: _Table, saved: _Saved, jump: str) -> str:
    """The line that sets the jump: at the end, as flannel does, unless nothing there is reached."""
    others = [line for line in saved.hook if line not in saved.outside]
    end = _end(table, others)
    if end == len(others):
        return jump
    return jump.replace(f"-A {table.hook} ", f"-I {table.hook} {end + 1} ", 1)


def _specification(rule: Rule, comment: str, random_fully: bool) -> str:
    words = []
    if rule.marked:
        words.append(f"-m mark --mark {MARK:#x}/{MARK:#x}")
    words += [_address(option, match) for option, match in (("-s", rule.source), ("-d", rule.destination))]
    words.append(f'-m comment --comment "{comment}" -j {rule.verdict.name}')
    if rule.verdict is Verdict.MASQUERADE and random_fully:
        words.append("--random-fully")
    return " ".join(filter(None, words))


def _address(option: str, match: Match | None) -> str:
    if match is None:
        return ""
    return f"{'! ' if match.inverted else ''}{option} {match.prefix}"


def lines_of(rules: RuleSet, bits: int) -> list[str]:
    """All lines of one family, jumps included: what `iptables -S` shows of ours."""
    wanted = rules.family(bits) or FamilyRules()
    found = []
    for table in TABLES:
        lines = chain_lines(table, wanted, random_fully=rules.random_fully)
        found += [jump_line(table), *lines] if lines else []
    return found
