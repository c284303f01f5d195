"""Puts together what the commands need that look at a host: beside daemon.py the one place that constructs.

Nothing here changes the host. The same code as the daemon's decides what should be: settings, uplink,
backend, peers, plan.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import NamedTuple

from flannelpy import start, subnet_env
from flannelpy.backend import Backend, load
from flannelpy.backend import Facts as BackendFacts
from flannelpy.beside import find_daemon
from flannelpy.doctor import overlay as checks
from flannelpy.doctor.facts import Daemon, Facts, Host, MacPolicy, Member, Overlay, Store, Way
from flannelpy.doctor.facts import Path as PathFacts
from flannelpy.doctor.paths import destinations, sample
from flannelpy.errors import FlannelpyError, StoreError
from flannelpy.kernel import firewall, look, sniff
from flannelpy.kernel.linux import LinuxKernel
from flannelpy.kernel.paths import probe
from flannelpy.kernel.probe import Prober
from flannelpy.kernel.sniff import Sniffer
from flannelpy.model.address import Address, Prefix
from flannelpy.model.census import Census
from flannelpy.model.config import ConfigError, NetworkConfig, parse_config
from flannelpy.model.lease import Lease
from flannelpy.model.scope import protected_blocks, scope_of
from flannelpy.model.subnet import Previous
from flannelpy.model.traffic import RuleSet, Wishes
from flannelpy.model.traffic import rules as rules_for
from flannelpy.model.uplink import NoUplink, Uplink, Wish, choose
from flannelpy.settings import DEFAULT, Settings
from flannelpy.state_file import Memory

_STORE_SECONDS = 12.0
_SECOND_LOOK = 1.0
"""Seconds after which a difference that a daemon is about to mend is gone."""
_MOST_WAYS = 64
_WAYS_AT_ONCE = 8

Tell = Callable[[str], None]


# --- the whole ---


def inspect(known: Settings, *, most_peers: int, tell: Tell, try_features: bool = True) -> Facts:
    """Everything that the checks look at; probes to at most so many ways (0: none)."""
    tell("the daemon")
    daemon = find_daemon(known.subnet_file)
    privileged = look.has_net_admin()
    tell("kernel features, in a scratch namespace")
    features = look.features() if privileged and try_features else {}
    tell("the store")
    store = read_store(known)
    memory = None
    if store.census is None:
        memory = start.remembered(known, start.origin(known))
    with closing(LinuxKernel(only_look=True)) as kernel:
        tell("the kernel's tables")
        overlay, trouble = _overlay(known, kernel, store.census, memory, privileged=privileged)
        if overlay is not None and overlay.confirmed and daemon.answers:
            # What a daemon is about to mend is no fault.
            time.sleep(_SECOND_LOOK)
            overlay = _second_look(known, kernel, overlay, memory)
        host = _host(known, kernel, overlay, daemon, features, privileged=privileged)
    paths = None
    if most_peers and overlay is not None and privileged:
        paths = probe_paths(overlay, most_peers, tell)
    return Facts(
        time.time(), daemon, host, store, overlay, trouble, from_memory=memory is not None, paths=paths
    )


def probe_paths(overlay: Overlay, most: int, tell: Tell) -> tuple[PathFacts, ...]:
    """The ways to a sample of the peers, a few at a time: silent ones take seconds. Raises FlannelpyError."""
    chosen = sample(destinations(overlay), most)
    found = []
    try:
        with ThreadPoolExecutor(_WAYS_AT_ONCE) as pool:
            for number, path in enumerate(pool.map(probe, chosen), 1):
                tell(f"the ways to peers: {path.name}, {number} of {len(chosen)}")
                found.append(path)
    except OSError as error:
        raise FlannelpyError(f"cannot send probes: {error.strerror}; run this as root") from None
    return tuple(found)


# --- single questions ---


def ways_to(addresses: Sequence[Address]) -> list[Way | None]:
    """How the kernel sends to these."""
    with closing(LinuxKernel(only_look=True)) as kernel:
        names = {one.ifindex: one.name for one in kernel.interfaces()}
        found = [kernel.route_to(address) for address in addresses]
    return [Way(names.get(way[0], "?"), way[1]) if way else None for way in found]


def wanted_rules(known: Settings, facts: Facts) -> RuleSet:
    """The masquerade and forward rules that the daemon was asked for; none without a lease."""
    overlay = facts.overlay
    if overlay is None or overlay.own is None:
        return RuleSet(None, None)
    return rules_for(overlay.config, overlay.own, _wishes(known, facts.daemon))


def sniffer(asked: Sequence[tuple[str, int | None, Prefix | None]]) -> Sniffer:
    """Sees on each device the datagrams to a port, or the packets of a network, or all. FlannelpyError."""
    programs = [
        (device, sniff.udp_to(port) if port else sniff.inside(network) if network else sniff.everything())
        for device, port, network in asked
    ]
    try:
        return Sniffer(programs)
    except OSError as error:
        names = ", ".join(device for device, _port, _network in asked)
        raise FlannelpyError(f"cannot see packets on {names}: {error.strerror}; run this as root") from None


def echo(target: Address, size: int = 84) -> float | None:
    """The round trip of a ping, repeated: the first may wait for neighbour discovery on a bridge."""
    with closing(Prober(len(target))) as prober:
        return prober.echo(target, size) or prober.echo(target, size)


# --- the store ---


def read_store(known: Settings) -> Store:
    """Everything in it about the network, and how its members are.

    A Kubernetes API server is not asked: what the daemon has saved must do.
    """
    if known.kube_subnet_mgr:
        return Store("Kubernetes", known.net_config_path, None, False, None, (), None)
    from flannelpy.store import etcd_health  # slow, and not needed to refuse a wrong command line
    from flannelpy.store.etcd_endpoint import Tls

    tls = Tls(known.etcd_cafile, known.etcd_certfile, known.etcd_keyfile)
    config_place = f"{known.etcd_prefix}/config"
    place = ", ".join(known.etcd_endpoints)
    census, seconds, trouble, refused = asyncio.run(_census(known))
    members = etcd_health.ask_all(known.etcd_endpoints, tls)
    return Store(
        place,
        config_place,
        trouble,
        refused,
        seconds,
        tuple(Member(*one) for one in members),
        census,
        tls.ca_file,
        tls.cert_file,
        etcd_health.client_certificate_ends(tls),
    )


async def _census(known: Settings) -> tuple[Census | None, float | None, str | None, bool]:
    """(what etcd holds, seconds of one read, why it cannot be read, whether it refuses us)."""
    if known.kube_subnet_mgr:
        return None, None, None, False
    from flannelpy.daemon import administration
    from flannelpy.store.etcd_client import RefusedError

    try:
        async with asyncio.timeout(_STORE_SECONDS), administration(known) as admin:
            await admin.config()  # makes the connection
            began = time.monotonic()
            await admin.config()
            seconds = time.monotonic() - began
            return await admin.census(lifetimes=False), seconds, None, False
    except TimeoutError:
        return None, None, f"etcd at {', '.join(known.etcd_endpoints)}: no answer in time", False
    except StoreError as error:
        return None, None, str(error), isinstance(error, RefusedError) and not error.transient
    except FlannelpyError as error:
        return None, None, str(error), False


# --- the overlay ---


class _Network(NamedTuple):
    config: NetworkConfig
    backend: Backend
    leases: tuple[Lease, ...]


def _network(census: Census | None, memory: Memory | None) -> _Network | str:
    """The network as the store, or an earlier life of the daemon, has it; or why there is none."""
    if census is None:
        if memory is None:
            return "the store cannot be read, and nothing is saved from before"
        return _Network(memory.config, load(memory.config), (memory.own, *memory.peers))
    if census.config_text is None:
        return "there is no network config yet"
    try:
        config = parse_config(census.config_text)
        backend = load(config)
    except (ConfigError, LookupError) as error:
        return f"the network config cannot be used: {error}"
    return _Network(config, backend, tuple(entry.lease for entry in census.entries if entry.lease))


def _overlay(
    known: Settings, kernel: LinuxKernel, census: Census | None, memory: Memory | None, *, privileged: bool
) -> tuple[Overlay | None, str]:
    """(the overlay on this host, why nothing is known of it)."""
    network = _network(census, memory)
    if isinstance(network, str):
        return None, network
    previous, _warning = subnet_env.read(known.subnet_file)
    uplink, reason = _uplink(known, kernel, network.config)
    found = Overlay(*network[:2], uplink, reason, None, None, network.leases, None)
    if uplink is None:
        return found, ""
    found = found._replace(own=_own(network, previous, uplink))
    if not privileged:
        return found, ""
    try:
        return _compared(known, kernel, found, previous), ""
    except OSError as error:
        return found, f"the kernel's tables cannot be read: {error.strerror or error}"


def _own(network: _Network, previous: Previous, uplink: Uplink) -> Lease | None:
    subnets = [one for one in (previous.subnet, previous.subnet6) if one]
    return checks.own_of(network.leases, subnets, [uplink.public_ip, uplink.public_ipv6])


def _uplink(known: Settings, kernel: LinuxKernel, config: NetworkConfig) -> tuple[Uplink | None, str]:
    wish = Wish(known.iface, known.iface_regex, known.iface_can_reach, known.public_ip, known.public_ipv6)
    try:
        return choose(
            wish,
            config.enable_ipv4,
            config.enable_ipv6,
            kernel.interfaces(),
            kernel.default_routes(),
            kernel.route_to,
        )
    except NoUplink as error:
        return None, str(error)


def _compared(known: Settings, kernel: LinuxKernel, overlay: Overlay, previous: Previous) -> Overlay:
    """With the kernel's tables, and what the daemon would do about them."""
    uplink, backend = overlay.uplink, overlay.backend
    assert uplink is not None  # noqa: S101  # asked before
    interfaces = kernel.interfaces()
    subnets = overlay.own.subnets() if overlay.own else ()
    scope = scope_of(
        overlay.config,
        subnets,
        previous,
        backend.devices,
        interfaces,
        follows_peers=backend.follows_peers,
    )._replace(takeover=())
    observed = kernel.observe(scope)
    asked = {ip for one in overlay.leases for ip in (one.attrs.public_ip, one.attrs.public_ipv6) if ip}
    on_link = kernel.on_link(asked, uplink.name) if backend.wants_on_link else frozenset()
    hosts = () if known.kube_subnet_mgr else start.literal_hosts(known.etcd_endpoints)
    facts = BackendFacts(
        uplink,
        observed.links,
        protected_blocks(uplink, interfaces, hosts),
        on_link,
        f"{start.origin(known).prefix}|{start.machine_id()}",
    )
    overlay = overlay._replace(facts=facts, observed=observed)
    ops, refused = checks.differences(overlay, observed, blackhole=known.ip_blackhole_route)
    return overlay._replace(confirmed=tuple(ops), refused=refused)


def _second_look(known: Settings, kernel: LinuxKernel, before: Overlay, memory: Memory | None) -> Overlay:
    """Only what is still so, with the store read again."""
    census, _seconds, _trouble, _refused = asyncio.run(_census(known))
    again, _why = _overlay(known, kernel, census, memory, privileged=True)
    if again is None:
        return before
    known_before = {str(op) for op in before.confirmed}
    return again._replace(confirmed=tuple(op for op in again.confirmed if str(op) in known_before))


# --- the host ---


def _host(
    known: Settings,
    kernel: LinuxKernel,
    overlay: Overlay | None,
    daemon: Daemon,
    features: Mapping[str, str | None],
    *,
    privileged: bool,
) -> Host:
    interfaces = tuple(kernel.interfaces())
    names = [one.name for one in interfaces]
    env, problem = subnet_env.read(known.subnet_file)
    words, trouble = _rules(known, overlay, daemon) if privileged else ((), None)
    return Host(
        privileged,
        features,
        look.sysctls(names),
        interfaces,
        kernel.links(names),
        known.subnet_file,
        env,
        problem,
        has_env=os.path.exists(known.subnet_file),  # noqa: PTH110
        has_kubelet=look.has_kubelet(),
        rules=words,
        rules_trouble=trouble,
        mac_policy=_mac_policy(overlay),
        ways=_ways(kernel, overlay),
    )


def _mac_policy(overlay: Overlay | None) -> MacPolicy | None:
    """Of the first device that has a MAC."""
    names = overlay.backend.devices if overlay and overlay.config.backend_type == "vxlan" else ()
    return look.mac_policy(names[0]) if names else None


def _ways(kernel: LinuxKernel, overlay: Overlay | None) -> dict[Address, Way | None]:
    """How the kernel sends to the public IPs of (some) peers."""
    if overlay is None or not overlay.backend.follows_peers:
        return {}
    names = {one.ifindex: one.name for one in kernel.interfaces()}
    own = overlay.own.key if overlay.own else ""
    attrs = [one.attrs for one in overlay.leases if one.key != own and one.key not in overlay.refused]
    asked = [ip for one in attrs for ip in (one.public_ip, one.public_ipv6) if ip][:_MOST_WAYS]
    found: dict[Address, Way | None] = {}
    for address in asked:
        way = kernel.route_to(address)
        found[address] = Way(names.get(way[0], "?"), way[1]) if way else None
    return found


def _rules(known: Settings, overlay: Overlay | None, daemon: Daemon) -> tuple[tuple[str, ...], str | None]:
    """(what is wrong with our rules, why rules do not help)."""
    if overlay is None or overlay.own is None:
        return (), None
    wishes = _wishes(known, daemon)
    wanted = rules_for(overlay.config, overlay.own, wishes)
    if not wanted:
        return (), None
    try:
        words, trouble = asyncio.run(firewall.compare(wanted, use_nftables=overlay.config.enable_nftables))
    except (FlannelpyError, OSError) as error:
        return (), f"the rules cannot be looked at: {error}"
    return tuple(words), trouble


def _wishes(known: Settings, daemon: Daemon) -> Wishes:
    """What the daemon was asked for; without one, what subnet.env and this command line say."""
    masquerade, forward = known.ip_masq, known.iptables_forward_rules
    if not daemon.running:
        values = {}
        with suppress(OSError, ValueError):
            values = subnet_env.variables(subnet_env.content(known.subnet_file))
        masquerade = masquerade or values.get("FLANNEL_IPMASQ", ("", 0))[0] == "true"
        forward = forward and known.sources["iptables-forward-rules"] != DEFAULT
    return Wishes(masquerade, forward, not known.ip_masq_fully_random_disable)
