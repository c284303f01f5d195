"""What is known of a host when it is judged: plain values, gathered by `flannelpy/inspection.py`.

None, or an empty table, means: not known. No check takes that for a fault.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flannelpy.backend import Backend
from flannelpy.backend import Facts as BackendFacts
from flannelpy.model.address import Address, Mac
from flannelpy.model.census import Census
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Link, State
from flannelpy.model.lease import Lease
from flannelpy.model.plan import Op
from flannelpy.model.subnet import Previous
from flannelpy.model.uplink import Interface, Uplink


class Daemon(NamedTuple):
    """The daemon of this host."""

    running: bool
    """A process holds its socket."""
    answers: bool
    pid: int | None = None
    status: Mapping[str, Any] | None = None
    """The document of `flannelpy status`."""
    trouble: str = ""
    """Why it does not answer."""


class Way(NamedTuple):
    """How the kernel would send to an address."""

    device: str
    source: Address | None


class MacPolicy(NamedTuple):
    """The MACAddressPolicy of the .link file that udev takes for a device (systemd.link(5))."""

    policy: str
    """Such as "persistent": it gives the device a MAC of its own; "none": it does not."""
    file: str


class Host(NamedTuple):
    """This host."""

    privileged: bool
    features: Mapping[str, str | None]
    """What was tried in a scratch namespace -> why it does not work, None = it does."""
    sysctls: Mapping[str, str]
    """`net/ipv4/ip_forward` -> its text."""
    interfaces: tuple[Interface, ...]
    links: Mapping[str, Link]
    subnet_file: str
    env: Previous
    """What subnet.env says."""
    env_problem: str | None
    """Why subnet.env is not (all) used; None if it is, or if there is none."""
    has_env: bool
    has_kubelet: bool = False
    rules: tuple[str, ...] = ()
    """What would be done about masquerade and forward rules, in words."""
    rules_trouble: str | None = None
    """Why rules that stand do not help, or cannot be looked at."""
    mac_policy: MacPolicy | None = None
    """What udev does to the MAC of our device; None: it is not known, or there is no udev."""
    ways: Mapping[Address, Way | None] = {}
    """To the public IPs of peers (not all of very many); None = no route."""


class Member(NamedTuple):
    """One member of etcd, asked over HTTP."""

    endpoint: str
    trouble: str | None
    """Why it does not answer."""
    health: str | None = None
    """Why it says that it is not well; None = it is, or does not say."""
    clock_ahead: float | None = None
    """Seconds that its clock is ahead of ours; its clock tells whole seconds."""
    expires: float | None = None
    """When its certificate ends, seconds since 1970."""


class Store(NamedTuple):
    """The datastore, as this host sees it."""

    place: str
    config_place: str
    trouble: str | None
    """Why it cannot be read."""
    refused: bool
    """It answers, and does not let us in: waiting does not help."""
    seconds: float | None
    """What one linearizable read took."""
    members: tuple[Member, ...]
    census: Census | None
    ca_file: str = ""
    cert_file: str = ""
    expires: float | None = None
    """When our client certificate ends."""


class Overlay(NamedTuple):
    """The network, our part in it, and what the kernel has of it."""

    config: NetworkConfig
    backend: Backend
    uplink: Uplink | None
    uplink_reason: str
    """Why it is this one, or why there is none."""
    facts: BackendFacts | None
    own: Lease | None
    leases: tuple[Lease, ...]
    observed: State | None
    confirmed: tuple[Op, ...] = ()
    """What separates the kernel from what should be, seen twice."""
    refused: Mapping[str, str] = {}
    """Peers that cannot be programmed, and why."""


class Path(NamedTuple):
    """The way to one peer in one family, probed. Times in seconds, sizes of whole IP packets in bytes."""

    name: str
    """The peer's subnet."""
    remote: Address
    """Its public IP."""
    mac: Mac | None
    """The VTEP MAC in its lease."""
    port: int | None
    """Of the encapsulation; None without one."""
    needed: int
    """What the underlay must carry: the overlay's MTU and what goes around it."""
    mtu: int
    """The overlay's."""
    device: str = ""
    """Packets for the peer's subnet leave by it: the tunnel's, or the uplink."""
    underlay: float | None = None
    """Round trip of an ICMP echo between the public IPs."""
    underlay_udp: bool = False
    """A datagram to a closed port is answered by an ICMP error."""
    underlay_full: bool | None = None
    """An echo of `needed` bytes comes back whole."""
    underlay_fits: int = 0
    """The largest one that does, where it does not."""
    out_full: bool | None = None
    """A datagram of `needed` bytes arrives (its ICMP error is small): the fault is on the way back."""
    tunnel: float | None = None
    """Round trip of an echo that we wrapped ourselves, by what the lease says."""
    tunnel_by_broadcast: Mac | None = None
    """Who answers it when it is sent to every MAC."""
    refused: bool = False
    """Nobody listens on the encapsulation port."""
    arrives: Mapping[str, bool] = {}
    """Kind of datagram -> whether the peer's kernel has seen it, by an error that it must answer with."""
    overlay: float | None = None
    """Round trip of an echo through the kernel's own tables. Without a tunnel: to the next hop, which says
    that it has the address, or that it would forward the packet."""
    overlay_full: bool | None = None
    """One of `mtu` bytes comes back."""
    udp_plain: bool = False
    """A datagram whose checksum we made is answered across the overlay (without a tunnel: by the host),"""
    udp_offloaded: bool = False
    """and one whose checksum the kernel leaves to the device."""
    clock_ahead: float | None = None
    """Seconds that the peer's clock is ahead of ours, by ICMP timestamps; None: no answer, or IPv6."""


class Facts(NamedTuple):
    """All of it."""

    now: float
    """Seconds since 1970."""
    daemon: Daemon
    host: Host
    store: Store | None
    overlay: Overlay | None
    overlay_trouble: str = ""
    """Why nothing is known of the network."""
    from_memory: bool = False
    """Config and leases are the saved ones: the store does not answer."""
    paths: tuple[Path, ...] | None = None
    """None: not asked for."""
