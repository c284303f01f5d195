"""Checks of the kernel's tables against the leases: the daemon's own plan, read as a diagnosis. Pure.

The plan between desired and observed state names every object that is missing, changed or left over. Here
each becomes a finding; what only follows from another fault (a device with the wrong MAC loses its
neighbours) is left out.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from flannelpy.doctor.facts import Facts, MacPolicy, Overlay
from flannelpy.doctor.finding import Finding, error, warning
from flannelpy.model import census
from flannelpy.model.address import format_address, format_mac
from flannelpy.model.kernel import (
    BLACKHOLE,
    DeviceAddress,
    FdbEntry,
    Forward,
    Item,
    Link,
    Neighbour,
    Route,
    State,
    Tunnel,
)
from flannelpy.model.lease import Lease, Snapshot
from flannelpy.model.peers import Peers
from flannelpy.model.plan import Op, Put, Remove, plan
from flannelpy.model.traffic import blackholes

_NAMED = 3
_SELF = "systemctl restart flannelpy does it, and keeps it so"
_UDEV = (
    "udev may have done it ({file} says MACAddressPolicy={policy}): a file such as"
    " /etc/systemd/network/10-flannel.link with [Match] OriginalName=flannel* and [Link]"
    " MACAddressPolicy=none ends that"
)


def differences(overlay: Overlay, observed: State, *, blackhole: bool) -> tuple[list[Op], dict[str, str]]:
    """(what the daemon would do now, peers that it would refuse and why): its own code, not applied."""
    own, facts, backend = overlay.own, overlay.facts, overlay.backend
    if own is None or facts is None:
        return [], {}
    seen = facts._replace(links=observed.links)
    peers = Peers(overlay.config, own, lambda lease: backend.peer(lease, seen), facts.protected)
    peers.update(Snapshot(overlay.leases, 0))
    try:
        desired = backend.own(own, seen)
    except ValueError as problem:
        return [], {own.key: str(problem)}
    if blackhole:
        desired.add(blackholes(own))
    desired.update(peers.state)
    return plan(desired, observed), peers.refused


def lease(facts: Facts) -> Iterator[Finding]:
    """Whether this host has one, and whether its backend can serve it."""
    overlay = facts.overlay
    if overlay is None or facts.from_memory or facts.store is None or facts.store.census is None:
        return
    if overlay.own is None and facts.daemon.running and overlay.uplink is not None:
        yield error(
            "lease",
            "no lease in the store is this host's",
            "no peer knows of this node's pods",
            "flannelpy status says what the daemon waits for; flannelpy lease list shows who has what",
        )


def tables(facts: Facts) -> Iterator[Finding]:
    """Each difference between the kernel and the leases."""
    if facts.overlay is None:
        return
    ops = _causes(facts.overlay.confirmed)
    by_check: dict[str, list[tuple[Op, str]]] = defaultdict(list)
    for op in ops:
        check, words = _words(op)
        by_check[check].append((op, words))
    for check, found in by_check.items():
        more = f" (and {len(found) - _NAMED} more)" if len(found) > _NAMED else ""
        commands = [command for op, _words in found[:_NAMED] if (command := _command(op))]
        yield error(
            check,
            "; ".join(words for _op, words in found[:_NAMED]) + more,
            _WHY[check],
            "; ".join([*commands, *(_udev(facts.host.mac_policy) if check == "mac" else []), _SELF]),
        )


def _udev(found: MacPolicy | None) -> list[str]:
    return [_UDEV.format_map(found._asdict())] if found and found.policy != "none" else []


def refused(facts: Facts) -> Iterator[Finding]:
    """Leases of peers that no node can make use of."""
    overlay = facts.overlay
    if overlay is None or not overlay.refused:
        return
    by_hand = {one.key for one in overlay.leases if not one.etcd_lease_id and not one.attrs.backend_type}
    named = [pair for pair in overlay.refused.items() if pair[0] not in by_hand]
    told = {key for one in records_told(facts) for key in one}
    for key, reason in [pair for pair in named if pair[0] not in told][:_NAMED]:
        yield warning(
            "peer-refused",
            f"the lease {key} is not programmed: {reason}",
            "no packet of this node reaches the pods of that peer",
            f"flannelpy lease show {key}; restart the daemon there, or flannelpy lease release {key}",
        )


def records_told(facts: Facts) -> Iterator[tuple[str, ...]]:
    """The keys of what the check of the records names already."""
    if facts.store and facts.store.census and facts.overlay:
        for one in census.findings(facts.overlay.config, facts.store.census):
            if one.severity != "note":
                yield one.keys


def _causes(ops: Sequence[Op]) -> list[Op]:
    """Without what only follows from something else among them."""
    rebuilt = {op.item.name for op in ops if isinstance(op.item, Link) and _empties(op)}
    rehomed = {op.item.key for op in ops if isinstance(op, Put) and _other_mac(op)}
    # With the last IPv4 address go the neighbours and the routes.
    bare = {op.item.device for op in ops if isinstance(op, Put) and isinstance(op.item, DeviceAddress)}
    found = []
    for op in ops:
        item = op.item
        if not isinstance(item, Link) and (
            item.device in rebuilt
            or (item.device in rehomed and isinstance(item, Neighbour))
            or (item.device in bare and isinstance(item, Neighbour | Route))
        ):
            continue
        found.append(op)
    return found


def _empties(op: Op) -> bool:
    """Whether what is on the device is gone with it, or with its being up."""
    if isinstance(op, Remove) or not isinstance(op.item, Link):
        return True
    return not isinstance(op.was, Link) or not op.was.up


def _other_mac(op: Put) -> bool:
    return isinstance(op.item, Link) and isinstance(op.was, Link) and op.item.mac != op.was.mac


_WHY = {
    "device": "the overlay has no (usable) device on this host: no packet goes out or comes in",
    "device-mtu": "packets that are too large are lost, or small ones are made for nothing",
    "mac": "peers send frames to the MAC in our lease: this host takes them for others' and drops them",
    "address": "packets of this host into the overlay have no right source address",
    "fdb": "frames for that peer are sent to a wrong host, or to none",
    "neighbour": "packets for that peer are sent to a wrong MAC, or wait for an answer that nobody gives",
    "route": "packets for that peer do not go into the overlay",
    "forwarder": "the forwarder process sends the packets for that peer to a wrong host, or to none",
    "stale": "packets go to where nobody is any more; what is left may also stand in the way of others",
}


def _words(op: Op) -> tuple[str, str]:
    """(the check, what is so)."""
    item = op.item
    if isinstance(op, Remove):
        return "stale", f"left over, no lease asks for it: {item}"
    if isinstance(item, Link):
        return _words_of_link(item, op.was if isinstance(op.was, Link) else None)
    check = _CHECKS[type(item)]
    if op.was is None:
        return check, f"missing: {item}"
    return check, f"wrong: {op.was}, it should be {item}" + _detail(item, op.was)


_CHECKS: dict[type[Item], str] = {
    DeviceAddress: "address",
    FdbEntry: "fdb",
    Neighbour: "neighbour",
    Route: "route",
    Tunnel: "forwarder",
    Forward: "forwarder",
}


def _detail(item: Item, was: Item) -> str:
    """What differs, where the words of both are the same."""
    if str(item) != str(was):
        return ""
    names = [name for name, a, b in zip(item._fields, item, was, strict=True) if a != b]
    return f" (differs in {', '.join(names)})"


def _words_of_link(item: Link, was: Link | None) -> tuple[str, str]:
    if was is None:
        return "device", f"missing: {item}"
    if item.mac != was.mac and item.kind == was.kind:
        return (
            "mac",
            f"{item} has the MAC {format_mac(was.mac)}, our lease tells peers {format_mac(item.mac)}",
        )
    if not was.up:
        return "device", f"{item} is down"
    if item.mtu != was.mtu and (item.kind, item.vxlan) == (was.kind, was.vxlan):
        return "device-mtu", f"{item} has MTU {was.mtu}, it should be {item.mtu}"
    return (
        "device",
        f"{item} is made otherwise: {was.vxlan or was.kind}, it should be {item.vxlan or item.kind}",
    )


def _command(op: Op) -> str:
    """What mends it by hand; empty if nothing short does."""
    item = op.item
    if isinstance(op, Remove):
        return _removal(item)
    if isinstance(item, Link) and isinstance(op.was, Link):
        if item.mac != op.was.mac and item.mac:
            return f"ip link set dev {item.name} address {format_mac(item.mac)}"
        if not op.was.up:
            return f"ip link set dev {item.name} up"
        return f"ip link set dev {item.name} mtu {item.mtu}" if item.mtu != op.was.mtu else ""
    if isinstance(item, DeviceAddress):
        return f"ip address add {item.prefix} dev {item.device}"
    if isinstance(item, FdbEntry):
        remote = format_address(item.remote)
        return f"bridge fdb replace {format_mac(item.mac)} dev {item.device} dst {remote} self permanent"
    if isinstance(item, Neighbour):
        where = f"{format_address(item.address)} lladdr {format_mac(item.mac)} dev {item.device}"
        return f"ip neigh replace {where} nud permanent"
    if isinstance(item, Route) and item.device != BLACKHOLE:
        via = f" via {format_address(item.gateway)}" if item.gateway else ""
        onlink = " onlink" if item.onlink else ""
        return f"ip route replace {item.destination}{via} dev {item.device}{onlink} proto {item.protocol}"
    return ""


def _removal(item: Item) -> str:
    if isinstance(item, Link):
        return f"ip link del dev {item.name}"
    if isinstance(item, DeviceAddress):
        return f"ip address del {item.prefix} dev {item.device}"
    if isinstance(item, FdbEntry):
        return f"bridge fdb del {format_mac(item.mac)} dev {item.device}"
    if isinstance(item, Neighbour):
        return f"ip neigh del {format_address(item.address)} dev {item.device}"
    if isinstance(item, Route):
        kind = "blackhole " if item.device == BLACKHOLE else ""
        device = f" dev {item.device}" if item.device != BLACKHOLE else ""
        return f"ip route del {kind}{item.destination}{device}"
    return ""


def own_of(leases: Sequence[Lease], subnets: Sequence[object], public: Sequence[object]) -> Lease | None:
    """Which lease is this host's: that of the subnet in subnet.env, else that of a public IP of ours."""
    for one in leases:
        if any(subnet in subnets for subnet in one.subnets()):
            return one
    for one in leases:
        if any(ip is not None and ip in public for ip in (one.attrs.public_ip, one.attrs.public_ipv6)):
            return one
    return None
