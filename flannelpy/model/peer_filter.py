"""Who may send us encapsulated packets: the peer filter, as values. Pure.

A packet to the encapsulation port is explained if it comes from the public IP of a current lease. With vxlan
also if it carries the VTEP MAC of one: then it is a real peer behind a NAT, which is named but never dropped.
With udp nothing in a packet tells such a peer, and the filter drops nothing: the forwarder lets in only what
peers send from their own subnets, or everything where the network says so.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from flannelpy.model.address import Address, Mac, parse_mac
from flannelpy.model.config import NetworkConfig, Section
from flannelpy.model.kernel import Link
from flannelpy.model.lease import Lease

OFF, COUNT, ENFORCE = "off", "count", "enforce"
"""What --peer-filter says."""


_MAC_LENGTH = 17


class PeerFilter(NamedTuple):
    """What the filter should know."""

    port: int
    """UDP port of the encapsulation."""
    here: frozenset[Address]
    """Our own addresses: only what is sent to these is looked at."""
    peers: frozenset[Address]
    macs: frozenset[Mac]
    """VTEP MACs; empty where packets have none."""
    enforce: bool
    """Drop what is not explained; else count it."""


class Fate(NamedTuple):
    """What becomes of packets that no lease explains."""

    dropped: bool
    """By the filter."""
    droppable: bool
    """Whether they could be, without cutting off a peer behind a NAT."""
    words: str
    """For the log."""


def fate(config: NetworkConfig, *, enforce: bool) -> Fate:
    """With a backend that encapsulates in UDP; `enforce` is what the operator asks for."""
    if config.backend_type == "udp":
        is_open = Section(config.backend, "Backend").boolean("AcceptAnySource", default=False)
        return Fate(False, False, "let in, by AcceptAnySource" if is_open else "dropped by the forwarder")
    return Fate(enforce, True, "dropped" if enforce else "counted")


def port_of(config: NetworkConfig, links: Mapping[str, Link]) -> int | None:
    """The port of a backend that encapsulates in UDP without keys; None for the others.

    `links` are our devices as they are: the kernel's default port may be another than 8472.
    """
    if config.backend_type not in ("vxlan", "udp"):
        return None
    for link in links.values():
        if link.vxlan is not None and link.vxlan.port:
            return link.vxlan.port
    given = next((value for key, value in config.backend.items() if key.lower() == "port"), None)
    return given or (8472 if config.backend_type == "vxlan" else 8285)


def peer_filter(port: int, here: Iterable[Address], leases: Iterable[Lease], *, enforce: bool) -> PeerFilter:
    """The filter for a node with these addresses, among these leases (its own may be among them)."""
    peers: set[Address] = set(here)
    macs: set[Mac] = set()
    for lease in leases:
        public_ip, public_ipv6, _type, data, data6 = lease.attrs
        if public_ip:
            peers.add(public_ip)
        if public_ipv6:
            peers.add(public_ipv6)
        if data:
            macs.update(_macs(data))
        if data6:
            macs.update(_macs(data6))
    return PeerFilter(port, frozenset(here), frozenset(peers), frozenset(macs), enforce)


def _macs(data: Any) -> tuple[Mac, ...]:
    if not isinstance(data, dict):
        return ()
    if "VtepMAC" in data and len(data) == 2:  # as everybody writes it: all leases are read after each change
        return _mac(data["VtepMAC"])
    return tuple(
        mac
        for key, value in data.items()
        if isinstance(key, str) and key.lower() == "vtepmac"
        for mac in _mac(value)
    )


def _mac(value: Any) -> tuple[Mac, ...]:
    return _parsed(value) if isinstance(value, str) and len(value) == _MAC_LENGTH else ()


@lru_cache(maxsize=1 << 14)
def _parsed(text: str) -> tuple[Mac, ...]:
    try:
        return (parse_mac(text),)
    except ValueError:
        return ()
