"""From any state of iptables one restore leads to the rules that are wanted, and harms nothing of others.

The model of iptables below knows what `iptables-restore --noflush` of our few commands does, and refuses
what the real one refuses.
"""

import re
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from flannelpy.model import iptables
from flannelpy.model.iptables import FILTER, NAT, difference
from flannelpy.model.traffic import FamilyRules, Wishes, rules
from tests.builders import config, lease

HOOKS = {"nat": "POSTROUTING", "filter": "FORWARD"}
FOREIGN = {
    "nat": [
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
        "-A POSTROUTING -j MASQUERADE",
        '-A KUBE-POSTROUTING -m comment --comment "see -j FLANNEL-POSTRTG and \\"flanneld masq\\"" -j RETURN',
    ],
    "filter": [
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j REJECT --reject-with icmp-host-prohibited",
        "-A DOCKER-USER -j RETURN",
        "-A FORWARD -s 10.5.0.0/16 -j ACCEPT",
    ],
}  # fmt: skip
Tables = dict[str, dict[str, list[str]]]


def wanted(subnet: str, *, masquerade: bool, forward: bool) -> FamilyRules:
    found = rules(config(), lease(subnet), Wishes(masquerade, forward)).ipv4
    assert found is not None
    return found


def ours(table: iptables._Table) -> list[str]:
    """Lines that may lie about: ours, of another subnet, of an old flannel, the jump in odd places."""
    found: list[str] = []
    for subnet in ("10.5.2.0/24", "10.5.3.0/24"):
        chain = iptables.chain_lines(table, wanted(subnet, masquerade=True, forward=True), random_fully=True)
        found += chain
        found += [line.replace(table.chain, table.hook) for line in chain]
    return [*found, iptables.jump_line(table), f"-A {table.hook} -j {table.chain}"]


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    state: Tables = {}
    for table in (NAT, FILTER):
        chains: dict[str, list[str]] = {table.hook: [], "KUBE-POSTROUTING": [], "DOCKER-USER": []}
        if draw(st.booleans()):
            chains[table.chain] = []
        for line in draw(st.lists(st.sampled_from([*FOREIGN[table.name], *ours(table)]), max_size=12)):
            name, target = line.split()[1], line.split()[-1]
            if name in chains and (target not in (NAT.chain, FILTER.chain) or target in chains):
                chains[name].append(line)
        if draw(st.booleans()):
            state[table.name] = chains
    return state


def saved(state: Tables) -> str:
    text = "# Generated\n"
    for name, chains in state.items():
        declared = [f":{chain} {'ACCEPT' if chain in HOOKS.values() else '-'} [0:0]" for chain in chains]
        lines = [line for chain in chains.values() for line in chain]
        text += "\n".join([f"*{name}", *declared, *lines, "COMMIT", "# Completed", ""])
    return text


def restored(state: Tables, text: str) -> Tables:
    """What iptables-restore --noflush makes of it; AssertionError where it would refuse."""
    after = {name: {chain: list(lines) for chain, lines in chains.items()} for name, chains in state.items()}
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split()
        if line[0] == "*":
            chains = after.setdefault(line[1:], {HOOKS[line[1:]]: []})
        elif line[0] == ":":
            chains[words[0][1:]] = []
        elif words[0] == "-A":
            chains[words[1]].append(line)
        elif words[0] == "-I":
            rest = line.split(" ", 3)[3]
            assert 1 <= int(words[2]) <= len(chains[words[1]]) + 1
            chains[words[1]].insert(int(words[2]) - 1, f"-A {words[1]} {rest}")
        elif words[0] == "-D":
            chains[words[1]].remove(f"-A{line[2:]}")
        elif words[0] == "-F":
            chains[words[1]].clear()
        elif words[0] == "-X":
            assert not chains[words[1]]
            assert not any(re.search(rf"-j {words[1]}( |$)", one) for all_ in chains.values() for one in all_
                           if '"see' not in one)  # fmt: skip
            del chains[words[1]]
        else:
            assert line == "COMMIT"
    return after


def foreign(state: Tables) -> dict[str, list[str]]:
    kept = {name: [line for lines in chains.values() for line in lines if line in FOREIGN[name]]
            for name, chains in state.items()}  # fmt: skip
    return {name: sorted(lines) for name, lines in kept.items() if lines}


@given(tables(), st.booleans(), st.booleans())
def test_one_restore_is_enough_and_harms_nobody(state: Tables, masquerade: bool, forward: bool) -> None:
    want = wanted("10.5.2.0/24", masquerade=masquerade, forward=forward)
    todo = difference(saved(state), want, random_fully=True)
    assert bool(todo.text) == bool(todo.words)
    after = restored(state, todo.text)
    assert difference(saved(after), want, random_fully=True) == ("", ())
    assert foreign(after) == foreign(state)
    for table, asked in ((NAT, want.masquerade), (FILTER, want.forward)):
        chains = after.get(table.name, {table.hook: []})
        lines = iptables.chain_lines(table, want, random_fully=True)
        assert chains.get(table.chain) == (lines if asked else None)
        jumps = [line for line in chains[table.hook] if line == iptables.jump_line(table)]
        assert len(jumps) == bool(asked)


@given(tables())
def test_a_chain_that_is_right_is_not_touched(state: Tables) -> None:
    """Nor is its jump, if it is reached: connections and counters stay."""
    want = wanted("10.5.2.0/24", masquerade=True, forward=True)
    after = restored(state, difference(saved(state), want, random_fully=True).text)
    for name, position in zip(("nat", "filter"), count()):
        hook = after[name][HOOKS[name]]
        hook.insert(0, "-A FORWARD -p tcp -j ACCEPT" if position else "-A POSTROUTING -p tcp -j RETURN")
    assert difference(saved(after), want, random_fully=True) == ("", ())
