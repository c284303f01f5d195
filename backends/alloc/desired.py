"""What alloc needs in the kernel: nothing, neither for ourselves nor for a peer."""

from collections.abc import Sequence

from flannelpy.backend import Facts, PeerItems
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import State
from flannelpy.model.lease import Lease, LeaseAttrs


class AllocBackend:
    """The alloc backend of one network; all methods are pure (see `flannelpy.backend.Backend`)."""

    name = "alloc"
    devices: tuple[str, ...] = ()
    follows_peers = False
    wants_on_link = False
    wants_fast_path = False

    def __init__(self, config: NetworkConfig) -> None:
        self._v4 = config.enable_ipv4
        self._v6 = config.enable_ipv6

    def attrs(
        self, facts: Facts, remembered: Lease | None, others: Sequence[Lease]
    ) -> tuple[LeaseAttrs, tuple[str, ...]]:
        """Our public IPs and no backend type.

        flannel leaves out the IPv6 one, by which an IPv6-only node recognises its own lease.
        """
        uplink = facts.uplink
        public_ip = uplink.public_ip if self._v4 else None
        public_ipv6 = uplink.public_ipv6 if self._v6 else None
        return LeaseAttrs(public_ip, public_ipv6, ""), ()

    def own(self, own: Lease, facts: Facts) -> State:
        """Nothing."""
        return State()

    def peer(self, lease: Lease, facts: Facts) -> PeerItems:
        """Nothing, whatever the peer's backend type, and that is no refusal."""
        return PeerItems(())

    def mtu(self, facts: Facts) -> int:
        """The uplink's, as in flannel: what carries the packets is not known here."""
        return facts.uplink.mtu
