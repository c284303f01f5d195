"""The peer filter as a table of its own in nf_tables: `table inet flannelpy`.

    chain input       UDP to our port, to an address of ours that is armed, not from a peer -> strangers4, 6
    chain strangersN  a VTEP MAC that we know: remember in nattedN, let through
                      else: remember in strangersN, count, and drop if that is asked for

An address is armed for 5 minutes at a time. Whatever happens to the daemon, the filter ends by itself.
"""

from typing import NamedTuple

from flannelpy.kernel import nft_codec, nft_sets
from flannelpy.kernel.codec import Message
from flannelpy.kernel.nfnetlink import NetfilterSocket
from flannelpy.kernel.nft_codec import DROP, INET, IPV4, IPV6, RETURN, Chain, Expression, load, verdict
from flannelpy.model.address import Address
from flannelpy.model.peer_filter import PeerFilter

TABLE = "flannelpy"
ARMED_SECONDS = 300
_SEEN_SECONDS = 3600
_SEEN_SIZE = 512
"""Sources that are remembered at most, of each kind and family: an attacker may invent millions."""
_INPUT = Chain("input", "filter", 1, -10)
_HALVES = ((IPV4, 4, 12, 16), (IPV6, 16, 8, 24))
"""Family, width of an address, where source and destination lie in the header."""
_MAC_OFFSET = 8 + 8 + 6
"""Behind the UDP and VXLAN headers and the inner destination: the inner source MAC (RFC 7348)."""


class Seen(NamedTuple):
    """Sources that no lease explains, and those that carry a peer's MAC: address -> packets."""

    strangers: dict[Address, int]
    natted: dict[Address, int]


class PeerFilterTable:
    """The table in this network namespace. NetlinkError, or OSError at once, without nf_tables."""

    def __init__(self) -> None:
        self._socket = NetfilterSocket()
        if not self.exists() and self._socket.generation() == 0:
            raise OSError("the kernel has no nf_tables")

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def remove(self) -> bool:
        """Take the table away; whether there was one."""
        if not self.exists():
            return False
        self._socket.transact([nft_codec.table_delete(INET, TABLE)])
        return True

    def set(self, wanted: PeerFilter) -> bool:
        """Make the table as wanted and arm it again; whether it had to be made anew. One transaction."""
        generation = self._socket.generation()
        exists = self.exists()
        if exists and self._as_wanted(wanted):
            self._socket.transact(self._update(wanted), generation)
            return False
        removal = [nft_codec.table_delete(INET, TABLE)] if exists else []
        self._socket.transact([*removal, *build(wanted)], generation)
        return True

    def change(self, before: PeerFilter, after: PeerFilter) -> None:
        """Peers came or went: only the difference is told, added before removed."""
        old, new = _members(before), _members(after)
        names = ("vteps", "peers4", "peers6")
        if bool(before.macs) != bool(after.macs):  # the rules differ, too
            self.set(after)
            return
        messages: list[Message] = []
        for name in names:
            messages += nft_sets.elements_put(INET, TABLE, name, new[name] - old[name])
        for name in names:
            messages += nft_sets.elements_delete(INET, TABLE, name, old[name] - new[name])
        if messages:
            self._socket.transact(messages)

    def seen(self) -> Seen:
        """Who sent what is not explained, within the last hour."""
        if not self.exists():
            return Seen({}, {})
        strangers, natted = (
            {**self._elements(f"{kind}4"), **self._elements(f"{kind}6")} for kind in ("strangers", "natted")
        )
        return Seen(strangers, natted)

    def exists(self) -> bool:
        """Whether the table is there."""
        tables = map(nft_codec.read_table, self._socket.dump(nft_codec.tables_dump()))
        return (INET, TABLE) in tables

    def _elements(self, name: str) -> dict[bytes, int]:
        return nft_sets.read_elements(self._socket.dump(nft_sets.elements_dump(INET, TABLE, name)))

    def _as_wanted(self, wanted: PeerFilter) -> bool:
        bodies = self._socket.dump(nft_codec.rules_dump(INET, TABLE))
        found = [nft_codec.read_rule(body) for body in bodies]
        chains = [nft_codec.read_chain(body) for body in self._socket.dump(nft_codec.chains_dump())
                  if TABLE.encode() in body]  # fmt: skip
        base = [chain for chain in chains if chain[:3] == (INET, TABLE, _INPUT.name)]
        if [(chain.hook, chain.policy) for chain in base] != [
            ((_INPUT.hook, _INPUT.priority), _INPUT.policy)
        ]:
            return False
        expected = rules(wanted)
        by_chain = {name: [rule for rule in found if rule.chain == name] for name in expected}
        return len(found) == sum(map(len, expected.values())) and all(
            len(by_chain[name]) == len(steps) and all(map(nft_codec.matches, by_chain[name], steps))
            for name, steps in expected.items()
        )

    def _update(self, wanted: PeerFilter) -> list[Message]:
        """Added before removed; and the arming again, from now on."""
        messages: list[Message] = []
        late: list[Message] = []
        for name, keys in _members(wanted).items():
            if name.startswith("armed"):
                messages.append(nft_sets.elements_flush(INET, TABLE, name))
                messages += nft_sets.elements_put(INET, TABLE, name, keys)
                continue
            present = self._elements(name).keys()
            messages += nft_sets.elements_put(INET, TABLE, name, keys - present)
            late += nft_sets.elements_delete(INET, TABLE, name, present - keys)
        return messages + late


def _members(wanted: PeerFilter) -> dict[str, frozenset[bytes]]:
    """What belongs into which set."""
    found = {"vteps": frozenset(wanted.macs)}
    for _family, width, _source, _destination in _HALVES:
        digit = 4 if width == 4 else 6
        found[f"peers{digit}"] = frozenset(address for address in wanted.peers if len(address) == width)
        found[f"armed{digit}"] = frozenset(address for address in wanted.here if len(address) == width)
    return found


def rules(wanted: PeerFilter) -> dict[str, list[tuple[Expression, ...]]]:
    """The rules of each chain. Pure."""
    found: dict[str, list[tuple[Expression, ...]]] = {_INPUT.name: []}
    mac = (load(2, _MAC_OFFSET, 6), nft_sets.lookup("vteps"))
    for family, width, source, destination in _HALVES:
        digit = 4 if width == 4 else 6
        chain = f"strangers{digit}"
        found[_INPUT.name].append(
            (
                *nft_sets.meta(nft_sets.META_NFPROTO, family),
                *nft_sets.udp_to(wanted.port),
                load(1, destination, width),
                nft_sets.lookup(f"armed{digit}"),
                load(1, source, width),
                nft_sets.lookup(f"peers{digit}", absent=True),
                nft_sets.jump(chain),
            )
        )
        known = [
            (*mac, load(1, source, width), nft_sets.remember(f"natted{digit}")),
            (*mac, nft_sets.COUNTER, verdict(RETURN)),
        ]
        end = (nft_sets.COUNTER, verdict(DROP)) if wanted.enforce else (nft_sets.COUNTER,)
        found[chain] = [
            *(known if wanted.macs else ()),
            # Two rules: a set that is full ends the first one, and must not end the second.
            (load(1, source, width), nft_sets.remember(f"strangers{digit}")),
            end,
        ]
    return found


def build(wanted: PeerFilter) -> list[Message]:
    """The whole table. Pure."""
    messages = [nft_codec.table_put(INET, TABLE, "flannelpy: who may send encapsulated packets")]
    number = 0
    for name, keys in _members(wanted).items():
        number += 1
        width = 6 if name == "vteps" else 4 if name.endswith("4") else 16
        armed = name.startswith("armed")
        messages.append(
            nft_sets.set_put(
                *(INET, TABLE, name, number, width),
                flags=nft_sets.TIMEOUT if armed else 0,
                seconds=ARMED_SECONDS if armed else 0,
            )
        )
        messages += nft_sets.elements_put(INET, TABLE, name, keys)
    for kind in ("strangers", "natted"):
        for digit, width in ((4, 4), (6, 16)):
            number += 1
            messages.append(
                nft_sets.set_put(
                    *(INET, TABLE, f"{kind}{digit}", number, width),
                    flags=nft_sets.TIMEOUT | nft_sets.EVAL,
                    seconds=_SEEN_SECONDS,
                    size=_SEEN_SIZE,
                )
            )
    wanted_rules = rules(wanted)
    messages += [nft_sets.plain_chain_put(INET, TABLE, name) for name in wanted_rules if name != _INPUT.name]
    messages.append(nft_codec.chain_put(INET, TABLE, _INPUT, "counts or drops what no lease explains"))
    for chain, listed in wanted_rules.items():
        messages += [nft_codec.rule_put(INET, TABLE, chain, steps) for steps in listed]
    return messages
