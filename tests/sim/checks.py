"""What must hold, worked out from the records and the machines, not by the daemon's own functions."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flannelpy.model.address import Address, Prefix, host, parse_mac
from flannelpy.model.kernel import (
    ROUTE_PROTOCOL,
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
from flannelpy.model.lease import Lease
from flannelpy.model.plan import Op, Put, Remove
from tests.sim.keys import overlap as overlap
from tests.sim.member import Member

DEVICES = {32: "flannel.1", 128: "flannel-v6.1"}
OVERHEAD = {32: 50, 128: 70}


class Shape(NamedTuple):
    """What kind of network it is."""

    families: tuple[int, ...]
    backend: str
    direct: bool


def broken_by(op: Op, state: State) -> str | None:
    """A route that is present and cannot deliver after this operation, which is at fault."""
    item = op.item
    if item.__class__ is Link or getattr(item, "device", "") not in DEVICES.values():
        return None
    match op:
        case Put(item=Route() as route):
            return _undeliverable(route, state)
        case Put(item=Neighbour(address=gateway)) | Remove(item=Neighbour(address=gateway)):
            return _routes_via({gateway}, state)
        case Remove(item=FdbEntry(device=device, mac=mac)):
            lost = {n.address for n in state.neighbours.values() if (n.device, n.mac) == (device, mac)}
            return _routes_via(lost, state) if lost else None
    return None


def _routes_via(gateways: set[Address], state: State) -> str | None:
    for route in state.routes.values():
        if route.gateway in gateways and route.device in DEVICES.values():
            reason = _undeliverable(route, state)
            if reason:
                return reason
    return None


def _undeliverable(route: Route, state: State) -> str | None:
    neighbour = state.neighbours.get((route.device, route.gateway or b""))
    if neighbour is None:
        return f"{route} has no neighbour"
    if (route.device, neighbour.mac) not in state.fdb:
        return f"{route}: {neighbour} has no FDB entry"
    return None


def problems(
    me: Member, leases: dict[Member, Lease], leftovers: Iterable[Lease], shape: Shape
) -> Iterator[str]:
    """What is not as it should be on one machine once all is calm."""
    state = me.kernel.state
    own = leases[me]
    wanted = State(_own_items(me, own, shape))
    for peer, lease in leases.items():
        if peer is not me:
            wanted.add(peer_items(me, peer, lease, shape))
    for item in wanted.items():
        found = state.table(item).get(item.key)
        if found != item:
            yield f"{me} has {found!r}, not {item!r}"
    excused = tuple(subnet for lease in leftovers for subnet in lease.subnets())
    for item in state.items():
        if _is_ours(item, me) and item.key not in wanted.table(item) and not _belongs(item, excused):
            yield f"{me} has {item!r}, which nobody needs"
    for item in me.foreign.items():
        if state.table(item).get(item.key) != item:
            yield f"{me} lost the foreign {item!r}: {state.table(item).get(item.key)!r}"
    for bits, subnet in _by_family(own, shape):
        shown = Prefix(subnet.nth(1), subnet.length)
        if f"SUBNET={shown}\n" not in me.env:
            yield f"{me} has the IPv{4 if bits == 32 else 6} subnet {subnet}, subnet.env says {me.env!r}"


def _is_ours(item: Item, me: Member) -> bool:
    if item.key in me.foreign.table(item):
        return False
    if isinstance(item, Link):
        return item.name in DEVICES.values()
    return item.device in DEVICES.values() or (isinstance(item, Route) and item.protocol == ROUTE_PROTOCOL)


def _belongs(item: Item, subnets: tuple[Prefix, ...]) -> bool:
    """Whether it may be there for a record that a node left behind when its address changed."""
    if isinstance(item, FdbEntry):
        return bool(subnets)
    if isinstance(item, Neighbour):
        return any(subnet.has(item.address) for subnet in subnets)
    return isinstance(item, Route) and item.destination in subnets


def _by_family(lease: Lease, shape: Shape) -> Iterator[tuple[int, Prefix]]:
    for bits in shape.families:
        subnet = lease.subnet if bits == 32 else lease.subnet6
        assert subnet is not None
        yield bits, subnet


def _mac(lease: Lease, bits: int) -> bytes:
    data = lease.attrs.backend_data if bits == 32 else lease.attrs.backend_v6_data
    return parse_mac(data["VtepMAC"])


def _own_items(me: Member, own: Lease, shape: Shape) -> Iterator[Item]:
    if shape.backend != "vxlan":
        return
    for bits, subnet in _by_family(own, shape):
        device = DEVICES[bits]
        vxlan = Vxlan(1, "eth0", me.address(bits), 0)
        yield Link(device, "vxlan", _mac(own, bits), me.uplink().mtu - OVERHEAD[bits], True, vxlan)
        yield DeviceAddress(device, host(subnet.address))


def peer_items(
    me: Member, peer: Member, lease: Lease, shape: Shape, *, as_told: bool = False
) -> Iterator[Item]:
    """Where the peer really is now, or is by its lease, under the MAC that it told."""
    for bits, subnet in _by_family(lease, shape):
        told = lease.attrs.public_ip if bits == 32 else lease.attrs.public_ipv6
        metric, there = default_metric(subnet), told if as_told and told else peer.address(bits)
        near = me.segment == peer.segment
        if near and (shape.direct or shape.backend == "host-gw"):
            yield Route(subnet, "eth0", there, metric=metric)
        elif shape.backend == "vxlan":
            device, mac = DEVICES[bits], _mac(lease, bits)
            yield FdbEntry(device, mac, there)
            yield Neighbour(device, subnet.address, mac)
            yield Route(subnet, device, subnet.address, onlink=True, metric=metric)
