"""What this host does with the overlay's packets beside routing them: masquerade and forward rules. Pure.

    config, own lease, wishes -> RuleSet -> text for iptables-restore   (model/iptables.py)
                                         -> messages to nf_tables      (kernel/nftables.py)

A rule says nothing about the program that sets it; both ways to set it mean the same. Words of a rule that
flannel's users know (chains, comments) stand where they are written.
"""

from enum import Enum
from typing import NamedTuple

from flannelpy.model.address import Prefix, parse_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import BLACKHOLE, Route
from flannelpy.model.lease import Lease

MARK = 0x4000
"""kube-proxy's bit in a packet's mark: it masquerades such a packet itself."""

BLACKHOLE_METRIC = 0x7FFFFFFF
"""Behind every other route to the same subnet: that of the bridge of the pods has 0, or 256 with IPv6."""

_MULTICAST = {32: parse_prefix("224.0.0.0/4"), 128: parse_prefix("ff00::/8")}


class Verdict(Enum):
    """What happens to a packet that a rule matches."""

    ACCEPT = "accept"
    RETURN = "return"
    MASQUERADE = "masquerade"


class Match(NamedTuple):
    """Addresses inside a block; or, inverted, outside of it."""

    prefix: Prefix
    inverted: bool = False


class Rule(NamedTuple):
    """All that is given must match; a rule with nothing given matches every packet."""

    verdict: Verdict
    source: Match | None = None
    destination: Match | None = None
    marked: bool = False
    """The packet's mark has the bit MARK."""


class FamilyRules(NamedTuple):
    """The rules of one family, in order; empty = not asked for."""

    masquerade: tuple[Rule, ...] = ()
    """For packets that leave this host."""
    forward: tuple[Rule, ...] = ()
    """For packets that pass through it."""


class RuleSet(NamedTuple):
    """What should stand. A family that is None is left alone, except for what is ours and of no use now."""

    ipv4: FamilyRules | None
    ipv6: FamilyRules | None
    random_fully: bool = True
    """Masquerade with source ports at random: two connections that start at once never get the same."""

    def family(self, bits: int) -> FamilyRules | None:
        """The rules for addresses of 32 or 128 bits."""
        return self.ipv4 if bits == 32 else self.ipv6

    def __bool__(self) -> bool:
        """Whether any rule is asked for."""
        return any(part is not None and any(part) for part in (self.ipv4, self.ipv6))


class Wishes(NamedTuple):
    """What the flags ask for."""

    masquerade: bool
    forward: bool
    random_fully: bool = True


def rules(config: NetworkConfig, own: Lease, wishes: Wishes) -> RuleSet:
    """The rules for a node with this lease."""
    return RuleSet(
        _family(config.network, own.subnet, wishes) if config.enable_ipv4 else None,
        _family(config.network6, own.subnet6, wishes) if config.enable_ipv6 else None,
        wishes.random_fully,
    )


def blackholes(own: Lease) -> tuple[Route, ...]:
    """Routes that end what is sent to an unused address of our subnet; else it would go round in circles.

    (flannel's has no metric: it cannot be set where a bridge is, and cuts off a bridge that comes later.)
    """
    return tuple(Route(subnet, BLACKHOLE, None, metric=BLACKHOLE_METRIC) for subnet in own.subnets())


def _family(network: Prefix | None, subnet: Prefix | None, wishes: Wishes) -> FamilyRules | None:
    if network is None or subnet is None:
        return None
    return FamilyRules(
        _masquerade(network, subnet) if wishes.masquerade else (),
        _forward(network) if wishes.forward else (),
    )


def _masquerade(network: Prefix, subnet: Prefix) -> tuple[Rule, ...]:
    """Pods talk to pods, and hosts to the pods of this one, with their own addresses; to the world with ours.

    Rule by rule: kube-proxy's packets are kube-proxy's; from our pods into the network, and back, as they
    are; to our pods from outside as they are (a node port shows the client); what leaves the network is
    masqueraded, not multicast; and so is what comes from outside and goes on to another node's pods, so that
    the answer comes back this way.
    """
    inside, outside = Match(network), Match(network, inverted=True)
    ours = Match(subnet)
    not_multicast = Match(_MULTICAST[network.bits], inverted=True)
    return (
        Rule(Verdict.RETURN, marked=True),
        Rule(Verdict.RETURN, ours, inside),
        Rule(Verdict.RETURN, inside, ours),
        Rule(Verdict.RETURN, outside, ours),
        Rule(Verdict.MASQUERADE, inside, not_multicast),
        Rule(Verdict.MASQUERADE, outside, inside),
    )


def _forward(network: Prefix) -> tuple[Rule, ...]:
    return (
        Rule(Verdict.ACCEPT, source=Match(network)),
        Rule(Verdict.ACCEPT, destination=Match(network)),
    )
