"""Probes of peers: who may be asked, and which layer is at fault when the answer fails. Pure.

The kernel of a peer answers an echo request to its tunnel device's address, whoever runs there. The peer's
public IP is asked beside it: what is lost on the way below is no fault of the overlay. Without a tunnel
(host-gw) the first address of the peer's subnet is asked, with a hop limit of one: whether a bridge there has
it or nobody, only the peer itself can answer.
"""

from collections.abc import Iterable
from typing import NamedTuple

from flannelpy.model.address import Address
from flannelpy.model.lease import Lease

UNDERLAY, ENCAPSULATION, ROUTING = "underlay", "encapsulation", "routing"
MTU, UNDERLAY_MTU, CHECKSUM = "mtu", "underlay mtu", "checksum"

MEANING = {
    UNDERLAY: "its public IP does not answer either: the host is down, or the way to it",
    ENCAPSULATION: "its public IP answers: is the encapsulation's UDP port open on the way, both ways?",
    ROUTING: "its public IP answers: does the network let packets of pods pass (a cloud's check of source and"
    " destination), and does the host forward?",
    MTU: "full-size packets are lost, though its public IP gets them: is its MTU smaller than ours?",
    UNDERLAY_MTU: "full-size packets are lost, below the overlay too: the way there has a smaller MTU",
    CHECKSUM: "packets that are summed by the network card are lost, others pass: its transmit checksum"
    " offload is broken, ours or that of a host below (ethtool -K ... tx-checksum-ip-generic off)",
}
"""For the log and for status."""


class Target(NamedTuple):
    """One family of a peer."""

    key: str
    overlay: Address
    """The base address of its subnet, which its tunnel device has; the first one without a tunnel."""
    underlay: Address
    """Its public IP."""
    is_routed: bool = False
    """There is no tunnel: the peer is the next hop."""


class Heard(NamedTuple):
    """What a probe found: round trip times in seconds; None = not asked, or no answer."""

    overlay: float | None
    overlay_full: float | None = None
    underlay: float | None = None
    underlay_full: float | None = None
    only_summed_here: bool = False
    """Datagrams whose checksum is left to the card got no answer, those that were summed here did."""


def targets(leases: Iterable[Lease], own: Lease, *, routed: bool = False) -> list[Target]:
    """The other nodes, in the families that we have too; `routed`: there are no tunnels."""
    found = []
    for lease in leases:
        if lease.key == own.key or lease.attrs == own.attrs:
            continue
        for subnet, ours, underlay in (
            (lease.subnet, own.subnet, lease.attrs.public_ip),
            (lease.subnet6, own.subnet6, lease.attrs.public_ipv6),
        ):
            if subnet is not None and ours is not None and underlay is not None:
                overlay = subnet.nth(1) if routed else subnet.address
                found.append(Target(lease.key, overlay, underlay, routed))
    return found


def fault(target: Target, heard: Heard) -> str | None:
    """The layer that fails; None if the peer is reached whole."""
    if heard.overlay is None:
        if heard.underlay is None:
            return UNDERLAY
        return ROUTING if target.is_routed else ENCAPSULATION
    if heard.overlay_full is None:
        return UNDERLAY_MTU if heard.underlay_full is None else MTU
    return CHECKSUM if heard.only_summed_here else None
