"""Probes of peers: who may be asked, and which layer is at fault when the answer fails. Pure.

The kernel of a peer answers an echo request to its tunnel device's address, whoever runs there. Behind a lost
one, the peer's public IP is asked the same way: what is lost on the way below is no fault of the overlay.
"""

from collections.abc import Iterable
from typing import NamedTuple

from flannelpy.model.address import Address
from flannelpy.model.lease import Lease

UNDERLAY, ENCAPSULATION, MTU, UNDERLAY_MTU = "underlay", "encapsulation", "mtu", "underlay mtu"

MEANING = {
    UNDERLAY: "its public IP does not answer either: the host is down, or the way to it",
    ENCAPSULATION: "its public IP answers: is the encapsulation's UDP port open on the way, both ways?",
    MTU: "full-size packets are lost, though its public IP gets them: is its MTU smaller than ours?",
    UNDERLAY_MTU: "full-size packets are lost, below the overlay too: the way there has a smaller MTU",
}
"""For the log and for status."""


class Target(NamedTuple):
    """One family of a peer."""

    key: str
    overlay: Address
    """The base address of its subnet, which its tunnel device has."""
    underlay: Address
    """Its public IP."""


class Heard(NamedTuple):
    """Round trip times of a probe, in seconds; None = not asked, or no answer."""

    overlay: float | None
    overlay_full: float | None = None
    underlay: float | None = None
    underlay_full: float | None = None


def targets(leases: Iterable[Lease], own: Lease) -> list[Target]:
    """The other nodes, in the families that we have too."""
    found = []
    for lease in leases:
        if lease.key == own.key or lease.attrs == own.attrs:
            continue
        for subnet, ours, underlay in (
            (lease.subnet, own.subnet, lease.attrs.public_ip),
            (lease.subnet6, own.subnet6, lease.attrs.public_ipv6),
        ):
            if subnet is not None and ours is not None and underlay is not None:
                found.append(Target(lease.key, subnet.address, underlay))
    return found


def fault(heard: Heard) -> str | None:
    """The layer that fails; None if the peer is reached whole."""
    if heard.overlay is None:
        return UNDERLAY if heard.underlay is None else ENCAPSULATION
    if heard.overlay_full is None:
        return UNDERLAY_MTU if heard.underlay_full is None else MTU
    return None
