"""What counts as ours on a host, and what no peer may claim: for the daemon and for who looks after it."""

from collections.abc import Iterable, Sequence

from flannelpy.model.address import Address, Prefix, format_address
from flannelpy.model.address import host as host_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.kernel import Scope
from flannelpy.model.leftover import leftover_devices
from flannelpy.model.subnet import Previous
from flannelpy.model.uplink import Interface, Uplink


def scope_of(
    config: NetworkConfig,
    subnets: Sequence[Prefix],
    previous: Previous,
    devices: tuple[str, ...],
    interfaces: Iterable[Interface],
    *,
    follows_peers: bool,
) -> Scope:
    """Of a node with these subnets; `devices` are those of its backend."""
    networks = (config.network, config.network6, previous.network, previous.network6)
    all_subnets = [*subnets, *filter(None, (previous.subnet, previous.subnet6))]
    return Scope(
        frozenset(devices) | leftover_devices(interfaces, all_subnets, devices),
        tuple(network for network in networks if network is not None),
        takeover=tuple(net for net in (config.network, config.network6) if net and follows_peers),
        takeover_lengths=(config.subnet_len, config.subnet6_len),
        takeover_blackholes=tuple(all_subnets),
    )


def protected_blocks(
    uplink: Uplink, interfaces: Iterable[Interface], store_hosts: Iterable[Address]
) -> tuple[tuple[str, Prefix], ...]:
    """What no peer's subnet may contain: the uplink's own addresses, and the datastore."""
    own = [
        (f"{format_address(address.prefix.address)}, an address of {link.name}", address.prefix.address)
        for link in interfaces
        if link.ifindex == uplink.ifindex
        for address in link.addresses
    ]
    store = [(f"{format_address(one)}, where the store is", one) for one in store_hosts]
    return tuple((words, host_prefix(address)) for words, address in (*own, *store))
