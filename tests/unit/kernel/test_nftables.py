"""What nf_tables is told, given what it has; and what is heard of it."""

import os
import random

import pytest

from flannelpy.kernel import codec, nft_codec, nftables, peer_filter
from flannelpy.kernel.iptables import read_version
from flannelpy.kernel.nft_codec import DROP, INET, IPV4, Chain, FoundChain, FoundRule
from flannelpy.kernel.nft_monitor import NftMonitor
from flannelpy.kernel.nftables import Observed, plan
from flannelpy.model.traffic import FamilyRules, RuleSet, Wishes, rules
from tests.builders import DUAL, config, lease

WANTED = rules(config(DUAL), lease("10.5.2.0/24", subnet6="fd00:5:0:2::/64"), Wishes(True, True))
NOTHING = RuleSet(None, None)
FORWARD = FoundChain(IPV4, "filter", "FORWARD", (2, 0), "filter", DROP)


def sent(found: Observed, wanted: RuleSet = WANTED) -> list[int]:
    return [message.type for message in plan(wanted, found, keep_iptables=False).messages]


def as_kernel_has_it(messages: list[codec.Message]) -> Observed:
    """What a kernel says that took in these messages; deletions are not understood."""
    chains = [nft_codec.read_chain(m.body) for m in messages if m.type == nft_codec.NEWCHAIN]
    found = [(m.body[0], nft_codec.read_rule(m.body)) for m in messages if m.type == nft_codec.NEWRULE]
    return Observed(tuple(chains), tuple(found))


def test_a_table_is_made_in_one_go_and_then_left_alone() -> None:
    todo = plan(WANTED, Observed(), keep_iptables=False)
    assert todo.words == ["added table ip flannel-ipv4", "added table ip6 flannel-ipv6"]
    found = as_kernel_has_it(todo.messages)
    assert len(found.rules) == 16
    assert plan(WANTED, found, keep_iptables=False) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_whatever_differs_the_table_is_replaced(seed: int) -> None:
    draw = random.Random(seed)
    whole = as_kernel_has_it(plan(WANTED, Observed(), keep_iptables=False).messages)
    chains, found = list(whole.chains), list(whole.rules)
    match seed:
        case 0:
            del found[draw.randrange(8)]
        case 1:
            found[2], found[3] = found[3], found[2]
        case 2:
            found.insert(0, (IPV4, FoundRule("flannel-ipv4", "forward", 9, (), "")))
        case 3:
            chains[0] = chains[0]._replace(policy=DROP)
        case 4:
            chains.append(FoundChain(IPV4, "flannel-ipv4", "more", None, "", None))
    todo = plan(WANTED, Observed(tuple(chains), tuple(found)), keep_iptables=False)
    assert todo.words == ["replaced table ip flannel-ipv4"]
    assert todo.messages[0].type == nft_codec.DELTABLE


def test_what_is_not_wanted_any_more_is_removed() -> None:
    whole = as_kernel_has_it(plan(WANTED, Observed(), keep_iptables=False).messages)
    assert sent(whole, NOTHING) == [nft_codec.DELTABLE] * 2


def test_accepts_are_added_only_where_forward_drops() -> None:
    whole = as_kernel_has_it(plan(WANTED, Observed(), keep_iptables=False).messages)
    accepting = whole._replace(chains=(*whole.chains, FORWARD._replace(policy=nft_codec.ACCEPT)))
    assert sent(accepting) == []
    dropping = whole._replace(chains=(*whole.chains, FORWARD))
    assert sent(dropping) == [nft_codec.NEWRULE] * 2
    without = WANTED._replace(ipv4=FamilyRules(WANTED.ipv4.masquerade if WANTED.ipv4 else ()))
    assert not any("accepts" in word for word in plan(without, dropping, keep_iptables=False).words)
    assert nftables.droppers(WANTED, dropping, forward_is_served=True) == []
    other = whole._replace(chains=(*whole.chains, FORWARD._replace(family=1, table="strict", name="fwd")))
    assert nftables.droppers(WANTED, other, forward_is_served=True) == ["inet strict fwd"]


def test_bytes_that_make_no_sense_are_no_exception() -> None:
    draw = random.Random(1)
    messages = plan(WANTED, Observed(), keep_iptables=False).messages
    for _number in range(2000):
        body = bytearray(draw.choice(messages).body)
        for _change in range(draw.randrange(1, 5)):
            body[draw.randrange(4, len(body))] = draw.randrange(256)
        data = bytes(body[: draw.randrange(4, len(body) + 1)])
        rule = nft_codec.read_rule(data)
        nft_codec.matches(rule, ())
        nftables.is_ours(rule)
        nft_codec.read_chain(data)
        nft_codec.read_table(data)
        nft_codec.read_generation(data)


# --- announcements ---


def datagram(*messages: tuple[int, bytes], port: int = 4711) -> bytes:
    parts = [codec.HEADER.pack(16 + len(body), kind, 0, 0, port) + body + b"\0" * (-len(body) & 3)
             for kind, body in messages]  # fmt: skip
    return b"".join(parts)


END = (
    nft_codec.NEWGEN,
    bytes(4) + codec.attr(1, (7).to_bytes(4)) + codec.attr(2, (99).to_bytes(4)) + codec.attr(3, b"nft\0"),
)


def removal(chain: str) -> tuple[int, bytes]:
    message = nft_codec.rules_delete(IPV4, "filter", chain, 3)
    return nft_codec.DELRULE, message.body


@pytest.fixture
def monitor() -> NftMonitor:
    made = NftMonitor.__new__(NftMonitor)  # without a socket
    made._port, made._seen = 1234, ""
    return made


def test_a_cause_names_the_object_and_who_did_it(monitor: NftMonitor) -> None:
    told = monitor.take(datagram(removal("KUBE-SVC-1"), removal("FLANNEL-FWD"), END))
    assert told == "rule in ip filter FLANNEL-FWD was removed by nft (process 99)"


def test_a_transaction_may_come_in_pieces(monitor: NftMonitor) -> None:
    assert monitor.take(datagram(removal("FORWARD"))) == ""
    assert monitor.take(datagram(removal("KUBE-SVC-1"))) == ""
    assert monitor.take(datagram(END)).startswith("rule in ip filter FORWARD was removed")
    assert monitor.take(datagram(END)) == ""


@pytest.mark.parametrize("chain", ["KUBE-FORWARD", "FORWARD2", "INPUT"])
def test_other_chains_are_no_news(monitor: NftMonitor, chain: str) -> None:
    assert monitor.take(datagram(removal(chain), END)) == ""


def test_our_own_changes_are_no_news(monitor: NftMonitor) -> None:
    assert monitor.take(datagram(removal("FLANNEL-FWD"), END, port=1234)) == ""
    assert monitor.take(os.urandom(200) + b"FLANNEL-") == ""


def test_the_peer_filter_is_no_cause_for_a_look_at_the_rules(monitor: NftMonitor) -> None:
    """It has a socket of its own, and the log named us as those who had damaged the rules."""
    words = "chain inet filter input was changed by nft (process 99)"
    for table, cause in ((peer_filter.TABLE, ""), ("filter", words)):
        made = nft_codec.chain_put(INET, table, Chain("input", "filter", 1, -150), "")
        assert monitor.take(datagram((nft_codec.NEWCHAIN, made.body), END)) == cause


@pytest.mark.parametrize(
    ("text", "version", "legacy"),
    [
        ("iptables v1.8.9 (nf_tables)", (1, 8, 9), False),
        ("ip6tables v1.8.9 (legacy)", (1, 8, 9), True),
        ("iptables v1.4.21", (1, 4, 21), True),
        ("iptables v1.8 (nf_tables)", (1, 8, 0), False),
        ("what?", (0,), True),
    ],
)
def test_version_of_iptables(text: str, version: tuple[int, ...], legacy: bool) -> None:
    assert read_version(text) == (version, legacy)
