"""The ways to peers: where to send probes, and what their answers mean. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flannelpy.doctor.facts import Facts, Overlay, Path
from flannelpy.doctor.finding import Finding, error, warning
from flannelpy.doctor.host import CLOCK_SECONDS
from flannelpy.model.address import Address, Mac, format_address, format_mac
from flannelpy.model.kernel import FdbEntry, Forward, Item, Neighbour, Route
from flannelpy.model.lease import Lease

_OVERHEAD = {("vxlan", 4): 50, ("vxlan", 16): 70, ("tun", 4): 28, ("tun", 16): 48}
"""By kind of device and bytes of an outer address: what stands around a pod's packet (see the backends)."""
OTHER_PORTS = (4789, 8472, 8285, 6081)
"""Where VXLAN might pass instead: the registered port, Linux', flannel's for udp, Geneve's."""


class Destination(NamedTuple):
    """A peer in one family, as probes need it."""

    path: Path
    device: str
    """The tunnel's, or the uplink."""
    uplink: str
    local: Address
    """The outer source address."""
    vni: int | None
    own_mac: Mac
    source: Address
    """Our own address in the overlay,"""
    target: Address
    """and the peer's."""
    direct: bool
    """Nothing is encapsulated; `target` may be nobody's."""


def destinations(overlay: Overlay) -> list[Destination]:
    """Every peer and family, in the order of the keys. Empty without a lease or a device of our own."""
    own, facts = overlay.own, overlay.facts
    if own is None or facts is None or overlay.observed is None:
        return []
    seen = facts._replace(links=overlay.observed.links)
    found = []
    for lease in sorted(overlay.leases, key=lambda one: one.key):
        if lease.key == own.key or lease.key in overlay.refused:
            continue
        items, _reason = overlay.backend.peer(lease, seen)
        found += list(_of_peer(overlay, lease, items))
    return found


def sample(found: Sequence[Destination], most: int) -> list[Destination]:
    """At most so many, spread evenly."""
    if len(found) <= most:
        return list(found)
    return [found[index * len(found) // most] for index in range(most)]


def _of_peer(overlay: Overlay, lease: Lease, items: Sequence[Item]) -> Iterator[Destination]:
    remotes = {item.mac: item.remote for item in items if isinstance(item, FdbEntry)}
    for item in items:
        if isinstance(item, Neighbour) and item.mac in remotes:
            found = _wrapped(overlay, lease, item.device, item.address, remotes[item.mac], item.mac)
        elif isinstance(item, Forward):
            found = _wrapped(overlay, lease, item.device, item.subnet.address, item.remote, None)
        elif isinstance(item, Route) and item.gateway is not None and not item.onlink:
            found = _direct(overlay, item, item.gateway)
        else:
            continue
        if found is not None:
            yield found


def _wrapped(
    overlay: Overlay, lease: Lease, device: str, target: Address, remote: Address, mac: Mac | None
) -> Destination | None:
    observed, uplink, own = overlay.observed, overlay.uplink, overlay.own
    assert observed is not None and uplink is not None and own is not None  # noqa: S101, PT018
    subnet, theirs = (own.subnet, lease.subnet) if len(target) == 4 else (own.subnet6, lease.subnet6)
    link = observed.links.get(device)
    local = uplink.address if len(remote) == 4 else uplink.address6
    if subnet is None or link is None or local is None:
        return None
    tunnel = observed.tunnels.get(device)
    port = link.vxlan.port if link.vxlan else tunnel.port if tunnel else None
    needed = link.mtu + _OVERHEAD.get((link.kind, len(remote)), 0)
    path = Path(str(theirs), remote, mac, port, min(needed, uplink.mtu), link.mtu, device)
    vni = link.vxlan.vni if link.vxlan else None
    return Destination(path, device, uplink.name, local, vni, link.mac, subnet.address, target, direct=False)


def _direct(overlay: Overlay, route: Route, gateway: Address) -> Destination | None:
    uplink, own = overlay.uplink, overlay.own
    assert uplink is not None and own is not None  # noqa: S101, PT018
    subnet = own.subnet if route.destination.bits == 32 else own.subnet6
    local = uplink.address if len(gateway) == 4 else uplink.address6
    if subnet is None or local is None:
        return None
    path = Path(str(route.destination), gateway, None, None, uplink.mtu, uplink.mtu, uplink.name)
    target = route.destination.nth(1)
    return Destination(path, uplink.name, uplink.name, local, None, b"", subnet.nth(1), target, direct=True)


# --- what the answers mean ---


def paths(facts: Facts) -> Iterator[Finding]:
    """One verdict on each way; what the tables explain already is not said again."""
    overlay = facts.overlay
    if overlay is None or facts.paths is None:
        return
    for path in facts.paths:
        yield from _judge(path, tables_agree=not overlay.confirmed)
    yield from _clocks(facts.paths)


def _judge(path: Path, *, tables_agree: bool) -> Iterator[Finding]:
    who = f"{path.name} at {format_address(path.remote)}"
    if not any((path.underlay, path.underlay_udp, path.tunnel, path.overlay, path.refused)):
        yield _unreachable(path, who)
        return
    if path.port is not None and path.tunnel is None and path.overlay is None:
        yield _no_tunnel(path, who)
        return
    if path.port is not None and path.overlay is None and tables_agree:
        yield _dropped_here(path, who)
        return
    if path.port is None and path.overlay is None and tables_agree:
        yield _not_routed(path, who)
    yield from _sizes(path, who)
    if path.udp_plain and not path.udp_offloaded:
        yield _checksum(path, who)


def _unreachable(path: Path, who: str) -> Finding:
    ip = format_address(path.remote)
    return error(
        "unreachable",
        f"the peer {who} answers nothing at all",
        "its host is down, or the network between the hosts does not carry packets to it",
        f"ping {ip}; ip route get {ip}; if the node is gone for good: flannelpy lease release {path.name}",
    )


def _no_tunnel(path: Path, who: str) -> Finding:
    port, ip = path.port, format_address(path.remote)
    if path.refused:
        return error(
            "port-closed",
            f"the peer {who} refuses UDP port {port}: nothing there takes encapsulated packets",
            "no packet for its pods is unwrapped",
            f"on {ip}: systemctl start flannelpy; ip -d link show type vxlan (is its port {port}?)",
        )
    if path.tunnel_by_broadcast is not None:
        return error(
            "peer-mac",
            f"the device of peer {who} has the MAC {format_mac(path.tunnel_by_broadcast)}, its lease says"
            f" {format_mac(path.mac or b'')}",
            "it takes our frames for somebody else's and drops them",
            f"on {ip}: systemctl restart flannelpy; flannelpy doctor there says why",
        )
    if path.arrives.get("plain") and not path.arrives.get("vxlan"):
        return _eaten(path, who)
    return _blocked(path, who)


def _eaten(path: Path, who: str) -> Finding:
    passing = [name for name in path.arrives if name.isdigit() and path.arrives[name]]
    instead = "carry the network by udp (Backend.Type: udp)"
    if passing:
        instead = f"set Backend.Port to one that passes ({', '.join(passing)})"
    return error(
        "vxlan-eaten",
        f"something on the way to {who} takes VXLAN packets on UDP port {path.port} away; plain datagrams to"
        " that port pass",
        "a virtual switch (VMware NSX, Azure and others) takes them for its own",
        f"{instead}: flannelpy config set, then restart every daemon",
    )


def _blocked(path: Path, who: str) -> Finding:
    port, ip, arrived = path.port, format_address(path.remote), path.arrives.get("vxlan")
    where = f"between here and {ip} (firewalls, security groups), and on {ip}"
    doubt = ""
    if arrived:
        where = f"on {ip} (the datagrams reach it, its own firewall drops them)"
    elif not path.arrives.get("closed"):
        doubt = "; or VXLAN is taken away on the way: run flannelpy capture --peer there to see what arrives"
    return error(
        "port-blocked",
        f"encapsulated packets to {who} (UDP port {port}) are not answered, although the host is there",
        "a firewall drops them: no packet reaches its pods",
        f"let UDP {port} in {where}: nft insert rule inet filter input udp dport {port} accept, or"
        f" iptables -I INPUT -p udp --dport {port} -j ACCEPT{doubt}",
    )


def _dropped_here(path: Path, who: str) -> Finding:
    return error(
        "dropped-here",
        f"what {who} answers comes in on our uplink and goes no further",
        "a rule of this host drops encapsulated packets, or what they hold",
        f"let UDP {path.port} in here: iptables -I INPUT -p udp --dport {path.port} -j ACCEPT; look at"
        " nft list ruleset, and at net.ipv4.conf.*.rp_filter",
    )


def _not_routed(path: Path, who: str) -> Finding:
    ip = format_address(path.remote)
    return error(
        "not-routed",
        f"the peer {who} is there, and packets for its pods do not come to it",
        "no packet reaches its pods: without a tunnel the network itself must carry them",
        "switch off the check of source and destination of both machines in the cloud, or of the virtual"
        f" switch; on {ip}: sysctl net.ipv4.ip_forward must be 1; else use a tunnel (Backend.Type: vxlan)",
    )


def _clocks(paths: Iterable[Path]) -> Iterator[Finding]:
    """Of those that tell the time. One that is alone with its time is wrong; all of them: ours is."""
    told = [path for path in paths if path.clock_ahead is not None]
    wrong = [path for path in told if abs(path.clock_ahead or 0.0) > CLOCK_SECONDS]
    if not wrong:
        return
    first = wrong[0]
    ahead = first.clock_ahead or 0.0
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    ours = len(wrong) == len(told) > 1
    yield warning(
        "clock",
        f"the clock of {format_address(first.remote)}{more} is {abs(ahead):.0f} s"
        f" {'ahead of' if ahead > 0 else 'behind'} ours",
        "certificates, and how long a remembered lease is good for, are judged by the clock",
        "timedatectl set-ntp true (or start chrony) on"
        f" {'this host' if ours else 'the host whose clock is wrong'}",
    )


def _sizes(path: Path, who: str) -> Iterator[Finding]:
    if path.underlay is None or path.underlay_full is not False:
        if path.overlay is not None and path.overlay_full is False:
            yield error(
                "path-mtu",
                f"packets of {path.mtu} bytes do not come back from {who} across the overlay, small ones do",
                "large transfers hang, small answers work",
                f"compare both ends: ip link show; flannelpy doctor, on {format_address(path.remote)}, too",
            )
        return
    way = "on the way back from it" if path.out_full else "on the way to it, or on both"
    fits = path.underlay_fits
    lost = path.overlay_full is False or path.port is None
    yield (error if lost else warning)(
        "path-mtu",
        f"packets of {path.needed} bytes between here and {who} are lost, {fits} fit ({way})",
        "large transfers hang, small answers work"
        if lost
        else "the overlay's packets are fragmented, which is slow and fragile",
        f"raise the MTU of that link to {path.needed}, or lower ours: set Backend.MTU to {fits}"
        " (flannelpy config set), then restart the daemons",
    )


def _checksum(path: Path, who: str) -> Finding:
    device = path.device or "flannel.1"
    return error(
        "checksum",
        f"datagrams whose checksum is left to the network card do not reach {who}; those summed here do",
        "ping works and TCP and UDP hang: the card's transmit checksum offload is broken"
        + (" for wrapped packets" if path.port is not None else ""),
        f"ethtool -K {device} tx-checksum-ip-generic off (at every start of the device), or a newer driver",
    )
