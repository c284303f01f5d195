"""What the udp backend needs: pure functions of leases and facts."""

from collections.abc import Iterator, Sequence
from typing import Any

from flannelpy.backend import Facts, PeerItems
from flannelpy.backends.udp.config import OFF, ON, UdpConfig, parse
from flannelpy.model.address import Address, Prefix, host
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import (
    DeviceAddress,
    Forward,
    Item,
    Link,
    Route,
    State,
    Tunnel,
    default_metric,
)
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.uplink import Uplink

DEVICE = "flannel0"
_OVERHEAD = {4: 28, 16: 48}
"""Bytes around a pod's packet: UDP 8, and the outer IP header 20 or 40."""
_MAX_DATAGRAM = 65535
"""The outer packet may not be larger, whatever the uplink carries (lo: 65536)."""
_MIN_MTU, _MIN_MTU6 = 68, 1280
"""The smallest MTU that the inner family works with (RFC 791, RFC 8200)."""
_TYPES = ("", "udp")
"""flannel's leases name no type."""
_FAST = {"FastPath": True}
"""The `BackendData` of a node whose kernel takes datagrams."""


class UdpBackend:
    """The udp backend of one network; all methods are pure (see `flannelpy.backend.Backend`)."""

    name = "udp"
    devices: tuple[str, ...] = (DEVICE,)
    follows_peers = True
    wants_on_link = False

    def __init__(self, config: NetworkConfig) -> None:
        self._options: UdpConfig = parse(config)
        self._v4 = config.enable_ipv4
        self._v6 = config.enable_ipv6
        # The programs in the kernel know IPv4 around IPv4.
        self.wants_fast_path = config.enable_ipv4 and self._options.fast_path != OFF
        self._networks = tuple(
            network for network in (config.network, config.network6) if network is not None
        )

    def attrs(
        self, facts: Facts, remembered: Lease | None, others: Sequence[Lease]
    ) -> tuple[LeaseAttrs, tuple[str, ...]]:
        """Our public IPs and no backend type, byte for byte what flannel writes for IPv4.

        With a fast path also that we have one, in `BackendData`, which flannel's udp does not look at.
        """
        uplink = facts.uplink
        public_ip = uplink.public_ip if self._v4 else None
        public_ipv6 = uplink.public_ipv6 if self._v6 else None
        data = dict(_FAST) if self._is_fast(facts) else None
        warnings: tuple[str, ...] = ()
        if self._options.fast_path == ON and facts.no_fast_path:
            warnings = (f"FastPath is on, but the forwarder carries everything: {facts.no_fast_path}",)
        return LeaseAttrs(public_ip, public_ipv6, "", data), warnings

    def own(self, own: Lease, facts: Facts) -> State:
        """The device with the base address of each subnet, the forwarder, and the route to each network."""
        bases = tuple(subnet.address for subnet in own.subnets())
        mtu = self.mtu(facts)
        port, is_open, _fast_path = self._options
        uplink, fast = facts.uplink, self._is_fast(facts)
        return State(
            (
                Link(DEVICE, "tun", b"", mtu, up=True),
                *(DeviceAddress(DEVICE, host(base)) for base in bases),
                Tunnel(DEVICE, self._local(uplink), port, mtu, bases, is_open, uplink.name, fast),
                *(Route(network, DEVICE, None, metric=default_metric(network)) for network in self._networks),
            )
        )

    def peer(self, lease: Lease, facts: Facts) -> PeerItems:
        """One entry per subnet. Both families travel over the same underlay: IPv4, where there is any."""
        if lease.attrs.backend_type not in _TYPES:
            return PeerItems(
                (), f"its backend type is {lease.attrs.backend_type[:40]!r}, ours is {self.name!r}"
            )
        remote = lease.attrs.public_ip if self._v4 else lease.attrs.public_ipv6
        if remote is None:
            return PeerItems((), f"it has no public {'IPv4' if self._v4 else 'IPv6'} address")
        fast = self._is_fast(facts) and _says_fast(lease.attrs.backend_data)
        items: list[Item] = [Forward(DEVICE, subnet, remote, fast) for subnet in self._subnets(lease)]
        if not items:
            return PeerItems((), "it has no subnet of a family that is enabled here")
        return PeerItems(tuple(items))

    def mtu(self, facts: Facts) -> int:
        """What fits into one datagram that the uplink carries whole."""
        uplink = facts.uplink
        mtu = min(uplink.mtu, _MAX_DATAGRAM) - _OVERHEAD[len(self._local(uplink))]
        least = _MIN_MTU6 if self._v6 else _MIN_MTU
        if mtu < least:
            raise ValueError(
                f"MTU {uplink.mtu} leaves {mtu} bytes for packets on {DEVICE}, at least {least}"
                f" are needed: raise the MTU of {uplink.name}"
            )
        return mtu

    def _is_fast(self, facts: Facts) -> bool:
        return self.wants_fast_path and not facts.no_fast_path

    def _local(self, uplink: Uplink) -> Address:
        local = uplink.address if self._v4 else uplink.address6
        if local is None:
            raise ValueError(f"{uplink.name} has no {'IPv4' if self._v4 else 'IPv6'} address")
        return local

    def _subnets(self, lease: Lease) -> Iterator[Prefix]:
        if self._v4 and lease.subnet is not None:
            yield lease.subnet
        if self._v6 and lease.subnet6 is not None:
            yield lease.subnet6


def _says_fast(data: Any) -> bool:
    return isinstance(data, dict) and data.get("FastPath") is True
