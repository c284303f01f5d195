"""What the kernel holds, or should hold, for the overlay: tables keyed by the kernel's own keys.

Desired and observed state are the same type, so one diff serves start, repair, `--dry-run` and `cleanup`.
Devices are named, not numbered: an index is only known once a device exists, and `kernel/` translates.
How a route is encoded (a nexthop object or a plain gateway) is no part of the model.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

from flannelpy.model.address import Address, Mac, Prefix, format_address, format_mac, is_link_local

ROUTE_PROTOCOL = 70
"""The `protocol` of our routes and nexthop objects (`ip route show proto 70`): ours without any memory."""

PROTOCOL_KERNEL = 2
PROTOCOL_BOOT = 3
"""RTPROT_BOOT: what flannel (and `ip route add`) writes; see include/uapi/linux/rtnetlink.h."""


BLACKHOLE = ""
"""The device of a route that leads nowhere: `ip route add blackhole ...`."""


class Vxlan(NamedTuple):
    """What a VXLAN device is made with and cannot change later (IFLA_VXLAN_*)."""

    vni: int
    uplink: str | None
    """The lower device's name; None when it is gone or was never set."""
    local: Address | None
    """The source address of the outer packets."""
    port: int
    """The UDP destination port; 0 = the kernel's default, 8472."""
    learning: bool = False
    gbp: bool = False


class Link(NamedTuple):
    """One of our devices."""

    name: str
    kind: str
    """"vxlan", "tun"; what `ip -d link` shows."""
    mac: Mac
    mtu: int
    up: bool
    vxlan: Vxlan | None = None

    @property
    def key(self) -> str:
        """The kernel's key."""
        return self.name

    def __str__(self) -> str:
        return f"device {self.name}"


class DeviceAddress(NamedTuple):
    """An address on one of our devices."""

    device: str
    prefix: Prefix

    @property
    def key(self) -> tuple[str, Prefix]:
        """The kernel's key."""
        return (self.device, self.prefix)

    def __str__(self) -> str:
        return f"address {self.prefix} on {self.device}"


class Tunnel(NamedTuple):
    """What carries the packets of one of our TUN devices: a forwarder process with a UDP socket."""

    device: str
    local: Address
    """The uplink's address: datagrams are sent from it and received on it."""
    port: int
    """The UDP port, ours and every peer's."""
    mtu: int
    """The largest packet that fits into a datagram, for our ICMP errors."""
    sources: tuple[Address, ...]
    """The addresses that our own ICMP errors come from, one of each family."""
    open: bool = False
    """Let in datagrams from anywhere, as flannel does."""
    uplink: str = ""
    """The device that the datagrams leave by."""
    fast: bool = False
    """What is certain is carried by programs in the kernel, the rest by the forwarder."""

    @property
    def key(self) -> str:
        """One per device."""
        return self.device

    def __str__(self) -> str:
        return f"forwarder of {self.device} on UDP {format_address(self.local)} port {self.port}"


class Forward(NamedTuple):
    """Where a tunnel sends the packets for a subnet."""

    device: str
    subnet: Prefix
    remote: Address
    """The outer destination address."""
    fast: bool = False
    """Whether the peer's kernel takes the datagrams: then inner checksums may be unfinished on a veth."""

    @property
    def key(self) -> tuple[str, Prefix]:
        """The forwarder's key."""
        return (self.device, self.subnet)

    def __str__(self) -> str:
        return f"forwarding of {self.subnet} -> {format_address(self.remote)} on {self.device}"


class FdbEntry(NamedTuple):
    """Where a VXLAN device sends frames for a MAC; `bridge fdb`."""

    device: str
    mac: Mac
    remote: Address
    """The outer destination address."""
    others: tuple[Address, ...] = ()
    """Observed only: more remotes under the same MAC (`bridge fdb append`), which we never make."""
    permanent: bool = True

    @property
    def key(self) -> tuple[str, Mac]:
        """The kernel's key."""
        return (self.device, self.mac)

    def __str__(self) -> str:
        return f"FDB entry {format_mac(self.mac)} -> {format_address(self.remote)} on {self.device}"


class Neighbour(NamedTuple):
    """Which MAC an overlay address has; `ip neigh`."""

    device: str
    address: Address
    mac: Mac
    permanent: bool = True

    @property
    def key(self) -> tuple[str, Address]:
        """The kernel's key."""
        return (self.device, self.address)

    def __str__(self) -> str:
        return f"neighbour {format_address(self.address)} -> {format_mac(self.mac)} on {self.device}"


class Route(NamedTuple):
    """A route of the main table."""

    destination: Prefix
    device: str
    """BLACKHOLE = packets are dropped."""
    gateway: Address | None
    onlink: bool = False
    """The gateway counts as on-link, whatever the addresses say (RTNH_F_ONLINK)."""
    protocol: int = ROUTE_PROTOCOL
    metric: int = 0
    """0 for IPv4; for IPv6 the kernel's default is 1024."""
    extra: bytes = b""
    """Observed only: attributes that we never set (a source address, ...), as the kernel sent them."""

    @property
    def key(self) -> tuple[Prefix, int]:
        """The kernel's key."""
        return (self.destination, self.metric)

    def __str__(self) -> str:
        if self.device == BLACKHOLE:
            return f"blackhole route {self.destination}"
        via = f" via {format_address(self.gateway)}" if self.gateway else ""
        return f"route {self.destination}{via} dev {self.device}"


Item: TypeAlias = Link | DeviceAddress | Tunnel | FdbEntry | Neighbour | Forward | Route


def default_metric(destination: Prefix) -> int:
    """The metric that a route without one gets: 0 (IPv4) or 1024 (IPv6, IP6_RT_PRIO_USER)."""
    return 0 if destination.bits == 32 else 1024


class State:
    """One table per kind of object, keyed by the kernel's own key."""

    __slots__ = ("_by_type", "addresses", "fdb", "forwards", "links", "neighbours", "routes", "tunnels")

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.links: dict[str, Link] = {}
        self.addresses: dict[tuple[str, Prefix], DeviceAddress] = {}
        self.tunnels: dict[str, Tunnel] = {}
        self.fdb: dict[tuple[str, Mac], FdbEntry] = {}
        self.neighbours: dict[tuple[str, Address], Neighbour] = {}
        self.forwards: dict[tuple[str, Prefix], Forward] = {}
        self.routes: dict[tuple[Prefix, int], Route] = {}
        self._by_type: dict[type, dict[Any, Any]] = {
            Link: self.links,
            DeviceAddress: self.addresses,
            Tunnel: self.tunnels,
            FdbEntry: self.fdb,
            Neighbour: self.neighbours,
            Forward: self.forwards,
            Route: self.routes,
        }
        self.add(items)

    def table(self, item: Item) -> dict[Any, Any]:
        """The table that an object belongs to."""
        return self._by_type[type(item)]

    def add(self, items: Iterable[Item]) -> None:
        """Put objects in; a later one replaces an earlier one with the same key."""
        by_type = self._by_type
        for item in items:
            by_type[type(item)][item.key] = item

    def discard(self, item: Item) -> None:
        """Take out whatever has this object's key."""
        self._by_type[type(item)].pop(item.key, None)

    def update(self, other: "State") -> None:
        """Put in all of another state."""
        for kind, table in other._by_type.items():  # noqa: SLF001
            self._by_type[kind].update(table)

    def items(self) -> Iterator[Item]:
        """Every object, table by table."""
        return chain.from_iterable(table.values() for table in self._by_type.values())

    def __len__(self) -> int:
        return sum(map(len, self._by_type.values()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._by_type == other._by_type

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"State({[str(item) for item in self.items()]})"


class Scope(NamedTuple):
    """What counts as ours, recognisable without memory."""

    devices: frozenset[str]
    """Everything on these is ours, except what the kernel itself makes."""
    networks: tuple[Prefix, ...]
    """Elsewhere: routes with our protocol number to a destination inside one of these."""
    takeover: tuple[Prefix, ...] = ()
    """Once at start: `proto boot` routes via a gateway inside these, a flannel's, count as ours too."""
    takeover_lengths: tuple[int, ...] = ()
    """... if the destination has exactly one of these lengths (a subnet's)."""
    takeover_blackholes: tuple[Prefix, ...] = ()
    """... and blackhole routes to exactly these: our subnet, as flannel makes them."""
    uplink: str = ""
    """Not ours: only watched."""

    def owns(self, item: Item) -> bool:
        """Whether an object that was found is ours."""
        if isinstance(item, Link):
            return item.name in self.devices
        if item.device in self.devices:
            return True
        return (
            isinstance(item, Route)
            and item.protocol == ROUTE_PROTOCOL
            and any(network.contains(item.destination) for network in self.networks)
        )


class Appeared(NamedTuple):
    """The kernel announced an object, new or changed."""

    item: Item


class Vanished(NamedTuple):
    """The kernel announced that an object is gone."""

    item: Item


class Shaken(NamedTuple):
    """Something happened after which everything must be looked at: the kernel does not announce it all."""

    cause: str


Notice: TypeAlias = Appeared | Vanished | Shaken


def is_kernels_own(prefix: Prefix) -> bool:
    """Link-local and IPv6 multicast: what the kernel makes by itself on any device."""
    return prefix.length > 0 and (is_link_local(prefix.address) or prefix.address[:1] == b"\xff")
