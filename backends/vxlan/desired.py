"""What a VXLAN overlay needs in the kernel: pure functions of leases and facts."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from flannelpy.backend import Facts, PeerItems
from flannelpy.backends.vxlan.config import VxlanConfig, device_names, parse
from flannelpy.model.address import Address, Mac, Prefix, format_mac, host, parse_mac
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import (
    DeviceAddress,
    FdbEntry,
    Item,
    Link,
    Neighbour,
    Route,
    State,
    Vxlan,
    default_metric,
)
from flannelpy.model.lease import Lease, LeaseAttrs

_OVERHEAD = {4: 50, 16: 70}
"""Bytes around a pod's packet: Ethernet 14, VXLAN 8, UDP 8, and the outer IP header 20 or 40."""

_MIN_MTU = {4: 68, 16: 1280}
"""The smallest MTU that the inner family works with (RFC 791, RFC 8200)."""


class _Half(NamedTuple):
    """One family of the overlay: the two differ only in these values."""

    device: str
    family: str
    """"v4" or "v6"."""
    width: int
    """Bytes of an address, of the overlay and of the underlay alike."""

    def subnet(self, lease: Lease) -> Prefix | None:
        return lease.subnet if self.width == 4 else lease.subnet6

    def public_ip(self, attrs: LeaseAttrs) -> Address | None:
        return attrs.public_ip if self.width == 4 else attrs.public_ipv6

    def data(self, attrs: LeaseAttrs) -> Any:
        return attrs.backend_data if self.width == 4 else attrs.backend_v6_data


class VxlanBackend:
    """The vxlan backend of one network; all methods are pure (see `flannelpy.backend.Backend`)."""

    name = "vxlan"
    follows_peers = True
    wants_fast_path = False

    def __init__(self, config: NetworkConfig) -> None:
        self._options: VxlanConfig = parse(config)
        vni = self._options.vni
        self._halves: tuple[_Half, ...] = tuple(
            _Half(
                device,
                "v4" if device.startswith("flannel.") else "v6",
                4 if device.startswith("flannel.") else 16,
            )
            for device in device_names(vni, config)
        )
        # The other family's device is ours too: it is removed when its family is switched off.
        self.devices: tuple[str, ...] = (f"flannel.{vni}", f"flannel-v6.{vni}")
        self.wants_on_link = self._options.direct_routing

    def attrs(
        self, facts: Facts, remembered: Lease | None, others: Sequence[Lease]
    ) -> tuple[LeaseAttrs, tuple[str, ...]]:
        """Our public IPs, VNI and MACs; a MAC stays the same over restarts and reboots."""
        warnings: list[str] = []
        data: dict[str, Any] = {}
        taken = _macs(others)
        for half in self._halves:
            mac = self._choose_mac(half, facts, remembered, taken, warnings)
            taken.add(mac)
            data[half.family] = {"VNI": self._options.vni, "VtepMAC": format_mac(mac)}
        attrs = LeaseAttrs(
            facts.uplink.public_ip if "v4" in data else None,
            facts.uplink.public_ipv6 if "v6" in data else None,
            self.name,
            data.get("v4"),
            data.get("v6"),
        )
        return attrs, tuple(warnings)

    def own(self, own: Lease, facts: Facts) -> State:
        """The devices, each with its subnet's base address."""
        state = State()
        for half in self._halves:
            subnet = half.subnet(own)
            mac, _reason = _read_data(half.data(own.attrs), self._options.vni)
            if subnet is None or mac is None:
                raise ValueError(f"own lease {own.key} has no {half.family} part for {half.device}")
            vxlan = self._vxlan(half, facts)
            state.add(
                (
                    Link(half.device, "vxlan", mac, self._device_mtu(half, facts), up=True, vxlan=vxlan),
                    DeviceAddress(half.device, host(subnet.address)),
                )
            )
        return state

    def peer(self, lease: Lease, facts: Facts) -> PeerItems:
        """FDB entry, neighbour and route per family; or one direct route where the underlay allows it."""
        if lease.attrs.backend_type != self.name:
            return PeerItems(
                (), f"its backend type is {lease.attrs.backend_type[:40]!r}, ours is {self.name!r}"
            )
        items: list[Item] = []
        reasons: list[str] = []
        for half in self._halves:
            subnet = half.subnet(lease)
            public_ip = half.public_ip(lease.attrs)
            if subnet is None:
                continue
            if public_ip is None:
                reasons.append(f"it has no public IP for {subnet}")
                continue
            metric = default_metric(subnet)
            if public_ip in facts.on_link:
                items.append(Route(subnet, facts.uplink.name, public_ip, metric=metric))
                continue
            mac, reason = _read_data(half.data(lease.attrs), self._options.vni)
            if mac is None:
                reasons.append(f"{reason} for {subnet}")
                continue
            device = half.device
            items.append(FdbEntry(device, mac, public_ip))
            items.append(Neighbour(device, subnet.address, mac))
            items.append(Route(subnet, device, subnet.address, onlink=True, metric=metric))
        if not items and not reasons:
            reasons.append("it has no subnet of a family that is enabled here")
        return PeerItems(tuple(items), "; ".join(reasons) or None)

    def mtu(self, facts: Facts) -> int:
        """The smallest MTU of the enabled families' devices.

        flannel subtracts 50 for IPv6 too, which is 20 bytes too few: a full packet would not fit.
        """
        return min(self._device_mtu(half, facts) for half in self._halves)

    def _device_mtu(self, half: _Half, facts: Facts) -> int:
        # The kernel clamps a device to what its uplink carries; asking for more would never be satisfied.
        base = min(self._options.mtu or facts.uplink.mtu, facts.uplink.mtu)
        mtu = base - _OVERHEAD[half.width]
        if mtu < _MIN_MTU[half.width]:
            raise ValueError(
                f"MTU {base} leaves {mtu} bytes for packets on {half.device}, at least {_MIN_MTU[half.width]}"
                f" are needed: raise the MTU of {facts.uplink.name} or Backend.MTU"
            )
        return mtu

    def _vxlan(self, half: _Half, facts: Facts) -> Vxlan:
        """What the device is made with; what an existing one of our VNI may have otherwise is taken as it is.

        From one of another VNI, which is made anew, nothing is taken: it was never ours.
        """
        options = self._options
        uplink = facts.uplink
        local = uplink.address if half.width == 4 else uplink.address6
        public_ip = uplink.public_ip if half.width == 4 else uplink.public_ipv6
        wanted = Vxlan(options.vni, uplink.name, local, options.port, options.learning, options.gbp)
        found = facts.links[half.device].vxlan if half.device in facts.links else None
        if found is None or found.vni != options.vni:
            return wanted
        if options.port == 0:  # the kernel's default, which a module parameter may have changed
            wanted = wanted._replace(port=found.port)
        if found.uplink is None:
            wanted = wanted._replace(uplink=None)
        if found.local == public_ip:  # flannel >= 0.27.4 makes it so
            wanted = wanted._replace(local=found.local)
        return wanted

    def _choose_mac(
        self, half: _Half, facts: Facts, remembered: Lease | None, taken: set[Mac], warnings: list[str]
    ) -> Mac:
        """The existing device's MAC, else the one in the lease that we take over, else a hash of who we are.

        A random MAC, as flannel's, is another one after each reboot, and peers keep the old one for a while.
        """
        if half.device in facts.links:
            candidate, origin = facts.links[half.device].mac, f"device {half.device}"
        else:
            kept = _read_data(half.data(remembered.attrs), self._options.vni)[0] if remembered else None
            candidate, origin = kept or b"", f"our lease {remembered.key if remembered else ''}"
        if candidate and candidate not in taken:
            return candidate
        if candidate:
            warnings.append(
                f"VTEP MAC {format_mac(candidate)} of {origin} is in another node's lease too"
                f" (a cloned machine?): {half.device} gets a new one"
            )
        uplink = facts.uplink
        public_ip = uplink.public_ip if half.width == 4 else uplink.public_ipv6
        for counter in range(256):
            mac = _hashed_mac(facts.host_id, public_ip or b"", self._options.vni, half.family, counter)
            if mac not in taken:
                return mac
            warnings.append(
                f"VTEP MAC {format_mac(mac)}, made from our machine-id and public IP, is in another node's"
                " lease already (a cloned machine?): taking the next one"
            )
        raise ValueError(f"no free VTEP MAC for {half.device}")


def _hashed_mac(host_id: str, public_ip: Address, vni: int, family: str, counter: int) -> Mac:
    """A locally administered unicast MAC that is the same whenever its inputs are."""
    text = f"{host_id}|{public_ip.hex()}|{vni}|{family}|{counter}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return bytes([digest[0] & 0xFE | 0x02]) + digest[1:6]


def _macs(leases: Sequence[Lease]) -> set[Mac]:
    """The VTEP MACs in other nodes' leases, whatever their VNI."""
    found = set()
    for lease in leases:
        for data in (lease.attrs.backend_data, lease.attrs.backend_v6_data):
            text = data.get("VtepMAC") if isinstance(data, dict) else None
            if isinstance(text, str):
                with suppress(ValueError):
                    found.add(parse_mac(text))
    return found


def _read_data(data: Any, vni: int | None) -> tuple[Mac | None, str]:
    """Backend data -> (MAC, "") or (None, reason); `vni` None accepts any."""
    if not isinstance(data, dict):
        return None, "it has no backend data"
    text, found_vni = data.get("VtepMAC"), data.get("VNI")
    if text is None or found_vni is None:  # Go matches keys in any case
        lowered = {key.lower(): value for key, value in data.items()}
        text, found_vni = lowered.get("vtepmac"), lowered.get("vni")
    if vni is not None and (type(found_vni) is not int or found_vni != vni):
        return None, f"its VNI is {str(found_vni)[:20]}, ours is {vni}"
    if not isinstance(text, str):
        return None, "its VtepMAC is missing"
    try:
        mac = parse_mac(text)
    except ValueError as error:
        return None, f"its VtepMAC {error}"
    if mac[0] & 1 or not any(mac):
        return None, f"its VtepMAC {text} is not a unicast address"
    return mac, ""
