"""What host-gw needs in the kernel: one plain route per peer and family, as pure functions."""

from collections.abc import Iterator, Sequence

from flannelpy.backend import Facts, PeerItems
from flannelpy.model.address import Address, Prefix, format_address
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Item, Route, State, default_metric
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.uplink import Uplink

_REMEDY = "put the nodes in one L2 network, or use vxlan with DirectRouting"


class HostGwBackend:
    """The host-gw backend of one network; all methods are pure (see `flannelpy.backend.Backend`)."""

    name = "host-gw"
    devices: tuple[str, ...] = ()
    follows_peers = True
    wants_on_link = True
    wants_fast_path = False

    def __init__(self, config: NetworkConfig) -> None:
        self._v4 = config.enable_ipv4
        self._v6 = config.enable_ipv6

    def attrs(
        self, facts: Facts, remembered: Lease | None, others: Sequence[Lease]
    ) -> tuple[LeaseAttrs, tuple[str, ...]]:
        """Our public IPs, which are the uplink's own addresses; ValueError if they are not."""
        _refuse_translation(facts.uplink)
        uplink = facts.uplink
        public_ip = uplink.public_ip if self._v4 else None
        public_ipv6 = uplink.public_ipv6 if self._v6 else None
        return LeaseAttrs(public_ip, public_ipv6, self.name), ()

    def own(self, own: Lease, facts: Facts) -> State:
        """Nothing: there is no device."""
        return State()

    def peer(self, lease: Lease, facts: Facts) -> PeerItems:
        """A route per family, via the peer's public IP; none where the kernel needs a gateway to reach that.

        Such a route would be refused, or would send pods' packets to a router that does not know them.
        """
        if lease.attrs.backend_type != self.name:
            return PeerItems(
                (), f"its backend type is {lease.attrs.backend_type[:40]!r}, ours is {self.name!r}"
            )
        device = facts.uplink.name
        items: list[Item] = []
        reasons: list[str] = []
        remedy = ""
        for subnet, public_ip in self._halves(lease):
            if public_ip is None:
                reasons.append(f"it has no public IP for {subnet}")
            elif public_ip not in facts.on_link:
                reasons.append(f"its public IP {format_address(public_ip)} is not on-link on {device}")
                remedy = f": {_REMEDY}"
            else:
                items.append(Route(subnet, device, public_ip, metric=default_metric(subnet)))
        if not items and not reasons:
            reasons.append("it has no subnet of a family that is enabled here")
        return PeerItems(tuple(items), "; ".join(reasons) + remedy if reasons else None)

    def mtu(self, facts: Facts) -> int:
        """The uplink's: nothing is put around a packet. ValueError if the uplink cannot serve host-gw."""
        _refuse_translation(facts.uplink)
        return facts.uplink.mtu

    def _halves(self, lease: Lease) -> Iterator[tuple[Prefix, Address | None]]:
        """(subnet, public IP) of each enabled family that the lease has."""
        if self._v4 and lease.subnet is not None:
            yield lease.subnet, lease.attrs.public_ip
        if self._v6 and lease.subnet6 is not None:
            yield lease.subnet6, lease.attrs.public_ipv6


def _refuse_translation(uplink: Uplink) -> None:
    """Raise ValueError unless the public IPs are the uplink's: peers use them as gateways on their own link.

    flannel refuses it too, but looks at IPv4 only.
    """
    for flag, public, own in (
        ("--public-ip", uplink.public_ip, uplink.address),
        ("--public-ipv6", uplink.public_ipv6, uplink.address6),
    ):
        if public is not None and own is not None and public != own:
            raise ValueError(
                f"{flag} {format_address(public)} is not the address {format_address(own)} of {uplink.name},"
                f" and host-gw cannot cross address translation: leave out {flag}, name the interface or the"
                " address with --iface, or use vxlan"
            )
