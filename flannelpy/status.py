"""What `flannelpy status` shows of a running daemon, as values for JSON. Pure.

The keys are an interface: programs read them. Times are seconds since 1970, durations seconds.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flannelpy import __version__
from flannelpy.backend import Backend, Facts
from flannelpy.health import Health, Trip
from flannelpy.model.address import format_address
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease
from flannelpy.model.probe import MEANING
from flannelpy.model.subnet import pool_size
from flannelpy.model.uplink import Uplink
from flannelpy.verdict import Verdict

_LISTED = 50
"""Peers with a trouble that are in the document; all of them are in `peers`."""


class Node(NamedTuple):
    """A node as it is now."""

    config: NetworkConfig
    backend: Backend
    facts: Facts
    own: Lease | None
    leases: Mapping[str, Lease]
    """Every record that counts, our own among them."""
    held: tuple[Lease, ...]


def document(node: Node | None, health: Health, verdict: Verdict) -> dict[str, Any]:
    """The whole but for the peers one by one; without a node, which a start has not yet, less."""
    metrics, repair = health.metrics, health.metrics.last_repair
    return {
        "version": __version__,
        "state": verdict.state,
        "faults": list(verdict.faults),
        "flaws": list(verdict.flaws),
        "summary": health.summary,
        "started": metrics.started,
        "uplink": node and _uplink(node.facts.uplink),
        "network": node and _network(node),
        "lease": node and node.own and _lease(node.own, health),
        "store": {
            "trouble": health.store_trouble,
            "since": health.store_trouble_since if health.store_trouble else None,
        },
        "peers": node and _peers(node, health),
        "peer_filter": health.peer_filter,
        "unexplained_packets": metrics.stranger_packets + metrics.natted_packets,
        "strangers": health.strangers,
        "repairs": {
            "count": sum(metrics.heal_times.values()),
            "operations": {f"{kind} ({noticed})": n for (kind, noticed), n in metrics.repairs.items()},
            "last": repair and {**repair._asdict(), "at": metrics.last_repair_at},
        },
    }


def peers(node: Node | None, health: Health) -> list[dict[str, Any]]:
    """Every peer: those with a trouble first, else in the order of their keys."""
    if node is None:
        return []
    known = {**node.leases, **{lease.key: lease for lease in node.held}}
    if node.own is not None:
        known.pop(node.own.key, None)
    troubled = _troubled(node, health)
    return [
        *(_peer(key, lease, *troubled[key], health.trips.get(key)) for key, lease in _named(known, troubled)),
        *(
            _peer(key, known[key], "programmed", None, health.trips.get(key))
            for key in sorted(known.keys() - troubled.keys())
        ),
    ]


def _named(known: Mapping[str, Lease], keys: Iterable[str]) -> Iterable[tuple[str, Lease | None]]:
    return ((key, known.get(key)) for key in sorted(keys))


def _uplink(uplink: Uplink) -> dict[str, Any]:
    return {
        "name": uplink.name,
        "mtu": uplink.mtu,
        "addresses": _texts((uplink.address, uplink.address6)),
        "public_ips": _texts((uplink.public_ip, uplink.public_ipv6)),
    }


def _network(node: Node) -> dict[str, Any]:
    config, backend = node.config, node.backend
    return {
        "networks": [str(net) for net in (config.network, config.network6) if net],
        "backend": config.backend_type,
        "devices": list(backend.own(node.own, node.facts).links) if node.own else [],
        "mtu": backend.mtu(node.facts),
        "pool": [size for size in pool_size(config) if size],
    }


def _lease(own: Lease, health: Health) -> dict[str, Any]:
    return {
        "key": own.key,
        "subnets": [str(subnet) for subnet in own.subnets()],
        "expires": health.lease_expires,
        "trouble": health.lease_trouble,
    }


def _peers(node: Node, health: Health) -> dict[str, Any]:
    troubled = _troubled(node, health)
    known = {**node.leases, **{lease.key: lease for lease in node.held}}
    return {
        "leases": len(node.leases) - (node.own is not None and node.own.key in node.leases),
        "programmed": health.peers - len(health.missing),
        "missing": len(health.missing),
        "refused": len(health.refused),
        "unreadable": len(health.unreadable),
        "held": health.held,
        "unreached": len({key for key, _address in health.unreached}),
        "troubled": [
            _peer(key, lease, *troubled[key], health.trips.get(key))
            for key, lease in _named(known, list(troubled)[:_LISTED])
        ],
    }


def _troubled(node: Node, health: Health) -> dict[str, tuple[str, str | None]]:
    """Key -> (state, reason) of the peers that are not as they should be; the worst state counts."""
    held = {lease.key: ("held", "it has no record in the store's new history") for lease in node.held}
    layers = {key: layer for (key, _address), layer in health.unreached.items()}
    return {
        **{key: ("unreached", f"{layer}: {MEANING[layer]}") for key, layer in layers.items()},
        **held,
        **{key: ("unreadable", reason) for key, reason in health.unreadable.items()},
        **{key: ("refused", reason) for key, reason in health.refused.items()},
        **dict.fromkeys(health.missing, ("missing", "the kernel has not all that it needs")),
    }


def _peer(key: str, lease: Lease | None, state: str, reason: str | None, trip: Trip | None) -> dict[str, Any]:
    attrs = lease and lease.attrs
    return {
        "key": key,
        "subnets": [str(subnet) for subnet in lease.subnets()] if lease else [],
        "public_ips": _texts((attrs.public_ip, attrs.public_ipv6)) if attrs else [],
        "state": state,
        "reason": reason,
        "rtt": trip and trip.overlay,
        "underlay_rtt": trip and trip.underlay,
    }


def _texts(addresses: Iterable[bytes | None]) -> list[str]:
    return [format_address(address) for address in addresses if address is not None]
