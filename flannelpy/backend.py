"""The backend contract: three pure methods, and how a backend is found by its name."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from flannelpy.model.address import Address, Prefix
from flannelpy.model.config import EXAMPLE_CONFIG, NetworkConfig
from flannelpy.model.kernel import Item, Link, State
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.uplink import Uplink


class Facts(NamedTuple):
    """What a backend may know about this host."""

    uplink: Uplink
    links: Mapping[str, Link]
    """The devices of this backend that exist, by name."""
    protected: tuple[tuple[str, Prefix], ...] = ()
    """(words for it, block): no peer's subnet may overlap these, or the node would cut itself off."""
    on_link: AbstractSet[Address] = frozenset()
    """Public IPs of peers that the kernel reaches over the uplink without a gateway; only when asked for."""
    host_id: str = ""
    """Stays the same over a reboot and tells networks apart: etcd prefix and machine id."""
    no_fast_path: str = "nobody has asked for one"
    """Why the kernel cannot carry what a forwarder does; empty = it can. For a backend that wants to know."""


class PeerItems(NamedTuple):
    """What must exist to reach one peer."""

    items: tuple[Item, ...]
    reason: str | None = None
    """Why (a family of) the peer cannot be reached; None when all of it can."""


class Backend(Protocol):
    """How packets get from node to node. Constructed with the network config; ConfigError if it is unusable.

    A ValueError of `attrs`, `own` or `mtu` means: this uplink cannot serve, for the reason that it gives.

    All methods are pure. The desired state is the union of what `own` and each `peer` ask for, so that one
    changed lease costs one call.
    """

    name: str
    devices: tuple[str, ...]
    """The devices that it would make: all of them are ours, present or not."""
    follows_peers: bool
    """Whether peers need anything of this host at all; without, nobody's routes are touched."""
    wants_on_link: bool
    """Whether `Facts.on_link` must be filled."""
    wants_fast_path: bool
    """Whether to try for `Facts.no_fast_path`."""

    def attrs(
        self, facts: Facts, remembered: Lease | None, others: Sequence[Lease]
    ) -> tuple[LeaseAttrs, tuple[str, ...]]:
        """What we tell the peers, and warnings for the log.

        `remembered` is the lease that we are about to take over, `others` are all the other nodes' leases.
        """
        ...

    def own(self, own: Lease, facts: Facts) -> State:
        """What must exist for ourselves: devices and their addresses."""
        ...

    def peer(self, lease: Lease, facts: Facts) -> PeerItems:
        """What must exist to reach one peer. Its FDB entry, neighbour and route, in that order of need."""
        ...

    def mtu(self, facts: Facts) -> int:
        """FLANNEL_MTU: what a packet of a pod may measure, in bytes."""
        ...


_OWN = {
    "vxlan": "flannelpy.backends.vxlan:VxlanBackend",
    "host-gw": "flannelpy.backends.hostgw:HostGwBackend",
    "udp": "flannelpy.backends.udp:UdpBackend",
    "alloc": "flannelpy.backends.alloc:AllocBackend",
}
"""Our own backends: the entry points of pyproject.toml again (a test compares them).

Looking through the metadata of everything that is installed takes 20 ms of a start that takes 150.
"""


def load(config: NetworkConfig) -> Backend:
    """The backend that the config names, ours or a plug-in (entry points, group `flannelpy.backends`).

    Raises LookupError if there is none of that name, and the backend's own ConfigError.
    """
    backend: Backend = _find(config.backend_type)(config)
    return backend


def has(name: str) -> bool:
    """Whether there is a backend of that name here."""
    try:
        _find(name)
    except LookupError:
        return False
    return True


def _find(name: str) -> Any:
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return getattr(import_module(module), attribute)
    from importlib.metadata import entry_points  # slow, and only for plug-ins

    for point in entry_points(group="flannelpy.backends", name=name):
        return point.load()
    remedy = f"; one that works is {EXAMPLE_CONFIG}"
    raise LookupError(f"Backend.Type {name[:40]!r} is not in this version, only {', '.join(_OWN)}{remedy}")
