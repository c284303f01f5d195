"""The way of a packet from this host to a pod, step by step: what the kernel has, against the lease. Pure."""

from collections.abc import Iterator
from typing import NamedTuple

from flannelpy.doctor.facts import Overlay, Way
from flannelpy.model.address import Address, Prefix, format_address
from flannelpy.model.kernel import BLACKHOLE, FdbEntry, Forward, Item, Neighbour, Route, State
from flannelpy.model.lease import Lease
from flannelpy.model.traffic import FamilyRules, Match, Rule, RuleSet, Verdict


class Step(NamedTuple):
    """One station. `wrong` says what is not as the lease has it; empty if it is."""

    name: str
    text: str
    wrong: str = ""


class Trace(NamedTuple):
    """The whole way, as far as it can be followed."""

    address: Address
    lease: Lease | None
    steps: tuple[Step, ...]
    devices: tuple[str, ...]
    """Where the packet can be seen, the tunnel first."""


def trace(overlay: Overlay, address: Address, way: Way | None, outer: Way | None, rules: RuleSet) -> Trace:
    """`way`, `outer`: the kernel's routes to the pod and to the peer's public IP; None: there is none."""
    lease = _lease_of(overlay, address)
    if lease is None:
        network = overlay.config.network if len(address) == 4 else overlay.config.network6
        inside = network is not None and network.has(address)
        where = "inside the network, but no lease has it" if inside else f"not inside the network {network}"
        step = Step("lease", f"{format_address(address)} is {where}", "no node serves it")
        return Trace(address, None, (step, *_kernel_way(way, address)), ())
    first = Step("lease", f"{format_address(address)} belongs to {lease.key}, the node {_node(lease)}")
    if overlay.own is not None and lease.key == overlay.own.key:
        here = Step("route", _words(way), "" if way else "no route to our own subnet: is there a bridge?")
        return Trace(address, lease, (first, here, *_rules(rules, overlay, address)), ())
    steps = [first, *_tables(overlay, lease, address, way), *_outer(overlay, lease, outer, len(address))]
    devices = [way.device] if way else []
    if overlay.uplink is not None:
        devices.append(overlay.uplink.name)
    steps += _rules(rules, overlay, address)
    return Trace(address, lease, tuple(steps), tuple(dict.fromkeys(devices)))


def _lease_of(overlay: Overlay, address: Address) -> Lease | None:
    """The earliest lease whose subnet has it: that is the one which nodes serve."""
    found = [one for one in overlay.leases if any(subnet.has(address) for subnet in one.subnets())]
    served = [one for one in found if one.key not in overlay.refused]
    return min(served or found, key=lambda one: (one.created, one.key), default=None)


def _node(lease: Lease) -> str:
    return " and ".join(
        format_address(ip) for ip in (lease.attrs.public_ip, lease.attrs.public_ipv6) if ip is not None
    )


def _kernel_way(way: Way | None, address: Address) -> tuple[Step, ...]:
    return (Step("route", _words(way)),) if way else (Step("route", f"none to {format_address(address)}"),)


def _words(way: Way | None) -> str:
    if way is None:
        return "none"
    source = f", from {format_address(way.source)}" if way.source else ""
    return f"over {way.device}{source}"


# --- the tables ---


def _tables(overlay: Overlay, lease: Lease, address: Address, way: Way | None) -> Iterator[Step]:
    """Route, neighbour and FDB entry, or the forwarder's: each as the kernel has it, against the lease's."""
    observed, facts = overlay.observed or State(), overlay.facts
    if lease.key in overlay.refused:
        yield Step("lease", "it is not programmed", overlay.refused[lease.key])
    if facts is None:
        return
    wanted = [
        item
        for item in overlay.backend.peer(lease, facts._replace(links=observed.links)).items
        if _width(item) == len(address)
    ]
    route = _best(observed, address)
    expected = next((item for item in wanted if isinstance(item, Route)), None)
    text = f"{route} ({_words(way)})" if route else f"none of ours to it ({_words(way)})"
    if route is None and way is not None and expected is None and wanted:
        yield Step("route", _words(way))  # one route to the whole network (udp)
    else:
        yield Step("route", text, _against(route, expected) or _elsewhere(way, route))
    for item in wanted:
        if isinstance(item, Route):
            continue
        found = observed.table(item).get(item.key)
        yield Step(_NAMES[type(item)], str(found or "none"), _against(found, item))


_NAMES: dict[type[Item], str] = {Neighbour: "neighbour", FdbEntry: "FDB", Forward: "forwarder"}


def _width(item: Item) -> int:
    if isinstance(item, Neighbour):
        return len(item.address)
    if isinstance(item, FdbEntry):
        return len(item.remote)
    prefix = item.subnet if isinstance(item, Forward) else getattr(item, "destination", None)
    return len(prefix.address) if isinstance(prefix, Prefix) else 0


def _best(observed: State, address: Address) -> Route | None:
    """The longest of our routes that has the address."""
    found = [one for one in observed.routes.values() if one.destination.has(address)]
    return max(found, key=lambda one: (one.destination.length, -one.metric), default=None)


def _against(found: Item | None, wanted: Item | None) -> str:
    return "" if found == wanted or wanted is None else f"it should be: {wanted}"


def _elsewhere(way: Way | None, route: Route | None) -> str:
    """Whether the kernel takes another route than ours: of another table, or with a longer prefix."""
    if way is None:
        return "the kernel has no way there"
    if route is not None and route.device not in (BLACKHOLE, way.device):
        return f"the kernel goes over {way.device} instead: see ip rule, and longer routes of others"
    return ""


# --- around the packet, and the rules ---


def _outer(overlay: Overlay, lease: Lease, outer: Way | None, width: int) -> Iterator[Step]:
    uplink, observed = overlay.uplink, overlay.observed
    if uplink is None or observed is None:
        return
    for link in observed.links.values():
        if link.vxlan is not None and link.vxlan.local is not None and len(link.vxlan.local) == width:
            remote = lease.attrs.public_ip if width == 4 else lease.attrs.public_ipv6
            if remote is not None:
                yield Step(
                    "outer",
                    f"VXLAN with VNI {link.vxlan.vni}, {format_address(link.vxlan.local)} ->"
                    f" {format_address(remote)}, UDP port {link.vxlan.port}, MTU {link.mtu} inside",
                    "" if link.up else f"{link} is down",
                )
    for tunnel in observed.tunnels.values():
        yield Step("outer", f"{tunnel}, MTU {tunnel.mtu} inside")
    wrong = ""
    if outer is None:
        wrong = "the kernel has no way to the peer's public IP"
    elif outer.device != uplink.name:
        wrong = f"the uplink is {uplink.name}: name the right one with --iface"
    yield Step("underlay", _words(outer), wrong)


def _rules(rules: RuleSet, overlay: Overlay, address: Address) -> Iterator[Step]:
    """What the rules do to a packet from a pod of ours, if they stand as they should."""
    family = rules.family(len(address) * 8) or FamilyRules()
    subnet = None
    if overlay.own is not None:
        subnet = overlay.own.subnet if len(address) == 4 else overlay.own.subnet6
    if subnet is None:
        return
    source = subnet.nth(2)
    masquerade = _first(family.masquerade, source, address)
    words = "no masquerade rules are asked for"
    if family.masquerade:
        hit = masquerade is not None and masquerade.verdict is Verdict.MASQUERADE
        words = "masqueraded: it leaves with this host's address" if hit else "leaves with the pod's address"
    forward = _first(family.forward, source, address)
    accepted = "accepted by a forward rule" if forward else "no forward rule of ours accepts it"
    yield Step("rules", f"from a pod of ours: {words}; {accepted}")


def _first(listed: tuple[Rule, ...], source: Address, target: Address) -> Rule | None:
    for rule in listed:
        if not rule.marked and _hits(rule.source, source) and _hits(rule.destination, target):
            return rule
    return None


def _hits(match: Match | None, address: Address) -> bool:
    return match is None or match.prefix.has(address) is not match.inverted
