"""Checks of this host: privileges, kernel, sysctls, rules, bridges, clocks, subnet.env, uplink. Pure."""

from collections.abc import Iterator

from flannelpy.doctor.facts import Facts, Host, Overlay
from flannelpy.doctor.finding import Finding, error, note, warning
from flannelpy.model.address import Prefix, format_address
from flannelpy.model.peer_filter import COUNT
from flannelpy.model.uplink import Interface

CLOCK_SECONDS = 5.0
"""A clock that is off by less does not matter, and etcd tells whole seconds only."""
_START = "systemctl start flannelpy"
_BRIDGES = ("docker0", "cni0")


def privileges(facts: Facts) -> Iterator[Finding]:
    """Without them most of the rest cannot be looked at."""
    if not facts.host.privileged:
        yield error(
            "privileges",
            "this process has no CAP_NET_ADMIN",
            "neither the daemon nor this command can look at the kernel's tables without it",
            "run it as root (sudo flannelpy doctor)",
        )


def daemon(facts: Facts) -> Iterator[Finding]:
    """Whether there is one, and what it says of itself."""
    found = facts.daemon
    if not found.running:
        yield error(
            "daemon",
            "no flannelpy daemon runs on this host",
            "packets flow as long as nothing changes, but nobody follows the peers, renews the lease or"
            " repairs anything",
            f"{_START}; what keeps it from starting says journalctl -u flannelpy",
        )
    elif not found.answers:
        yield error(
            "daemon",
            f"the daemon (process {found.pid}) does not answer: {found.trouble}",
            "it neither follows the peers nor repairs anything; is it stopped or stuck?",
            f"kill -CONT {found.pid} if it was stopped, else systemctl restart flannelpy",
        )
    elif found.status is not None:
        for fault in found.status["faults"]:
            yield error("daemon", f"the daemon says: {fault}", "the node is not ready", "flannelpy status")


def peer_filter(facts: Facts) -> Iterator[Finding]:
    """A filter that has counted nobody for a day may drop."""
    status = facts.daemon.status or {}
    days = (facts.now - status.get("started", facts.now)) / 86_400
    if status.get("peer_filter") == COUNT and not status.get("unexplained_packets") and days >= 1:
        yield note(
            "peer-filter",
            f"the peer filter counts, and has counted nobody in {days:.0f} day(s)",
            "whoever reaches the encapsulation's port can put packets into the overlay",
            "--peer-filter=enforce (FLANNELD_PEER_FILTER=enforce): it drops what comes from no peer",
        )


_NEEDED = {"vxlan": "vxlan", "udp": "tun"}
_MODULES = {
    "vxlan": "modprobe vxlan; if there is none, install the distribution's extra kernel modules"
    " (linux-modules-extra-*), or carry the whole network by udp (Backend.Type: udp)",
    "tun": "modprobe tun; in a container give it the device (--device /dev/net/tun)",
    "nf_tables": "modprobe nf_tables, or set EnableNFTables to false in the network config",
}


def kernel_features(facts: Facts) -> Iterator[Finding]:
    """What the backend needs, as it was tried in a scratch namespace."""
    config = facts.overlay.config if facts.overlay else None
    needed = {_NEEDED[config.backend_type]} if config and config.backend_type in _NEEDED else set()
    if config and config.enable_nftables:
        needed.add("nf_tables")
    for feature in sorted(needed):
        reason = facts.host.features.get(feature)
        if reason is not None:
            yield error(
                "kernel-feature",
                f"this kernel cannot make what the network needs: {feature}: {reason}",
                "the daemon cannot start",
                _MODULES[feature],
            )
    if facts.host.has_kubelet and "net/bridge/bridge-nf-call-iptables" not in facts.host.sysctls:
        yield warning(
            "bridge-nf",
            "the module br_netfilter is not loaded, and a kubelet runs here",
            "service addresses do not work between pods of one node: kube-proxy's rules do not see them",
            "modprobe br_netfilter; echo br_netfilter > /etc/modules-load.d/br_netfilter.conf",
        )


def forwarding(facts: Facts) -> Iterator[Finding]:
    """Whether the kernel passes packets between the tunnel, the bridge and the uplink."""
    overlay = facts.overlay
    if overlay is None:
        return
    for bits, enabled in ((32, overlay.config.enable_ipv4), (128, overlay.config.enable_ipv6)):
        family = "ipv4" if bits == 32 else "ipv6"
        main = "net/ipv4/ip_forward" if bits == 32 else "net/ipv6/conf/all/forwarding"
        values = facts.host.sysctls
        if not enabled or main not in values:
            continue
        names = [main] if values[main] == "0" else []
        if not names and bits == 32:
            on = [one for one in (*_tunnels(overlay), *_pod_bridges(facts.host, overlay)) if one]
            names = [name for one in on if values.get(name := f"net/ipv4/conf/{one}/forwarding") == "0"]
        for name in names:
            dotted = _dotted(name)
            yield error(
                "forwarding",
                f"{dotted} is 0",
                f"this host does not forward {family} packets: pods reach nothing outside of it, and"
                " nothing outside reaches them",
                f"sysctl -w {dotted}=1; echo '{dotted} = 1' > /etc/sysctl.d/90-flannelpy.conf",
            )


def reverse_path(facts: Facts) -> Iterator[Finding]:
    """Strict filtering drops what comes in where the answer would not go out."""
    overlay = facts.overlay
    if overlay is None or overlay.uplink is None:
        return
    name = overlay.uplink.name
    if not _is_strict(facts.host, name):
        return
    elsewhere = {
        address: way.device
        for address, way in facts.host.ways.items()
        if len(address) == 4
        and way is not None
        and way.device != name
        and _on_link(facts.host, name, address)
    }
    if elsewhere:
        address, device = next(iter(elsewhere.items()))
        yield error(
            "rp_filter",
            f"{name} drops what peers send: net.ipv4.conf.{name}.rp_filter is strict, and the way back to"
            f" {_listed([format_address(one) for one in elsewhere])} leaves over {device}",
            "encapsulated packets of these peers are dropped before anybody sees them",
            f"sysctl -w net.ipv4.conf.{name}.rp_filter=2 (and net.ipv4.conf.all.rp_filter=2 or 0),"
            f" or correct the route: ip route get {format_address(address)}",
        )


def uplink(facts: Facts) -> Iterator[Finding]:
    """Whether the overlay runs over the interface that leads to the peers."""
    overlay = facts.overlay
    if overlay is None:
        return
    if overlay.uplink is None:
        yield error(
            "uplink",
            overlay.uplink_reason,
            "the daemon does not know which interface carries the overlay",
            "name it: flannelpy --iface=NAME (or FLANNELD_IFACE=NAME)",
        )
        return
    yield from _moved_address(overlay)
    name = overlay.uplink.name
    others = [way.device for way in facts.host.ways.values() if way is not None and way.device != name]
    near = any(_on_link(facts.host, name, address) for address in facts.host.ways)
    known = [way for way in facts.host.ways.values() if way is not None]
    if others and not near and len(others) == len(known):
        device = max(set(others), key=others.count)
        yield error(
            "uplink",
            f"the overlay runs over {overlay.uplink_reason}, but the way to every peer leaves over {device}",
            "peers are told an address that they do not send from or cannot reach",
            f"start the daemon with --iface={device} (FLANNELD_IFACE={device} in /etc/default/flannelpy)",
        )


def _moved_address(overlay: Overlay) -> Iterator[Finding]:
    uplink, own = overlay.uplink, overlay.own
    assert uplink is not None  # noqa: S101  # asked before
    if own is None:
        return
    pairs = ((own.attrs.public_ip, uplink.public_ip), (own.attrs.public_ipv6, uplink.public_ipv6))
    for told, is_now in pairs:
        if told is not None and is_now is not None and told != is_now:
            yield error(
                "uplink",
                f"our lease {own.key} tells the peers {format_address(told)}, the uplink is"
                f" {overlay.uplink_reason}",
                "peers send to an address that is not the uplink's",
                "systemctl restart flannelpy; if this is the wrong uplink, name the right one with --iface",
            )


def rules(facts: Facts) -> Iterator[Finding]:
    """Masquerade and forward rules, and who drops in spite of them."""
    if facts.host.rules:
        yield error(
            "rules",
            f"masquerade or forward rules are not as they should be: {_listed(list(facts.host.rules))}",
            "packets of pods leave with addresses that nobody answers, or are not forwarded",
            f"{_START}: it sets them at its start, and keeps them",
        )
    if facts.host.rules_trouble:
        yield error(
            "rules",
            facts.host.rules_trouble,
            "packets of pods may be dropped although our rules stand",
            "nft list ruleset | grep -B3 'policy drop'; accept the overlay network in that chain",
        )


def bridges(facts: Facts) -> Iterator[Finding]:
    """The bridge of Docker or CNI against subnet.env."""
    network, subnet = facts.host.env.network, facts.host.env.subnet
    if network is None or subnet is None:
        return
    served = any(
        subnet.has(address.prefix.address)
        for one in facts.host.interfaces
        if _is_bridge(facts.host, one)
        for address in one.addresses
    )
    for one in facts.host.interfaces:
        if not _is_bridge(facts.host, one):
            continue
        prefixes = [own.prefix for own in one.addresses if own.prefix.bits == 32]
        wrong = [
            prefix for prefix in prefixes if network.has(prefix.address) and not subnet.has(prefix.address)
        ]
        aside = one.name == "docker0" and not served and prefixes
        if wrong or aside:
            yield _bridge(facts.host, one, (wrong or prefixes)[0], subnet, is_wrong=bool(wrong))


def _bridge(host: Host, one: Interface, prefix: Prefix, subnet: Prefix, *, is_wrong: bool) -> Finding:
    docker = "flannelpy docker-opts -c -d /run/flannel/docker; ip link del docker0; systemctl restart docker"
    return (error if is_wrong else warning)(
        "bridge",
        f"{one.name} has {prefix}, and our subnet is {subnet} ({host.subnet_file})",
        "no peer has a route to the pods or containers on it"
        if is_wrong
        else "containers on it are not in the overlay: Docker was started without, or before, subnet.env",
        docker if one.name == "docker0" else f"ip link del {one.name}, then restart the pods of this node",
    )


def subnet_env(facts: Facts) -> Iterator[Finding]:
    """Why there is none; or that it names another subnet than our lease."""
    host, own = facts.host, facts.overlay.own if facts.overlay else None
    if not host.has_env:
        yield error(
            "subnet-env",
            f"there is no {host.subnet_file}: {_why_no_env(facts)}",
            "Docker and CNI wait for it: no pod starts on this node",
            "mend what is named; the daemon writes the file as soon as it has a lease and its device stands",
        )
    elif host.env_problem:
        yield error(
            "subnet-env",
            host.env_problem,
            "Docker and CNI read it: pods get no address, or a wrong one",
            f"rm {host.subnet_file}; systemctl restart flannelpy writes it anew",
        )
    elif own is not None and (own.subnet, own.subnet6) != (host.env.subnet, host.env.subnet6):
        told = " and ".join(str(one) for one in (host.env.subnet, host.env.subnet6) if one)
        yield error(
            "subnet-env",
            f"{host.subnet_file} says {told}, and our lease is {own.key}",
            "pods get addresses of a subnet that is not ours",
            "systemctl restart flannelpy, then restart the pods, or Docker, on this node",
        )


def _why_no_env(facts: Facts) -> str:
    """The first of the causes, in the order of a start."""
    overlay, store = facts.overlay, facts.store
    if not facts.host.privileged:
        return "the daemon has no privileges"
    if not facts.daemon.running:
        return "no daemon runs here"
    if store is not None and store.trouble:
        return f"the store cannot be read: {store.trouble}"
    if facts.overlay_trouble:
        return facts.overlay_trouble
    if overlay is not None and overlay.uplink is None:
        return overlay.uplink_reason
    if facts.daemon.status:
        return f"the daemon is not that far: {facts.daemon.status['summary']}"
    return "the daemon has not written it"


# --- what several of them ask ---


def _is_bridge(host: Host, one: Interface) -> bool:
    link = host.links.get(one.name)
    return one.name in _BRIDGES or (link is not None and link.kind == "bridge")


def _pod_bridges(host: Host, overlay: Overlay) -> list[str]:
    subnet = overlay.own.subnet if overlay.own else None
    return [
        one.name
        for one in host.interfaces
        if subnet and _is_bridge(host, one) and any(subnet.has(own.prefix.address) for own in one.addresses)
    ]


def _tunnels(overlay: Overlay) -> list[str]:
    return [name for name in overlay.backend.devices if overlay.observed and name in overlay.observed.links]


def _is_strict(host: Host, device: str) -> bool:
    """The larger one of the two counts (ip-sysctl.rst)."""
    texts = [host.sysctls.get(f"net/ipv4/conf/{one}/rp_filter", "0") for one in ("all", device)]
    return max(int(text) if text.isdigit() else 0 for text in texts) == 1


def _on_link(host: Host, device: str, address: bytes) -> bool:
    """Whether an address is inside a prefix of that interface."""
    return any(
        own.prefix.bits == len(address) * 8
        and own.prefix.length < own.prefix.bits
        and own.prefix.has(address)
        for one in host.interfaces
        if one.name == device
        for own in one.addresses
    )


def _dotted(name: str) -> str:
    """`net/ipv4/conf/flannel.1/forwarding` as sysctl(8) wants it: a dot in a name becomes a slash."""
    return ".".join(part.replace(".", "/") for part in name.split("/"))


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more
