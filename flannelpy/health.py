"""How the daemon is, in plain values; other parts only read them. `verdict` says what they mean."""

from typing import NamedTuple

from flannelpy.metrics import Metrics


class Trip(NamedTuple):
    """Round trips to a peer as they were last probed, in seconds; None = no answer."""

    overlay: float | None
    underlay: float | None


class Health:
    """States as they are now; what is counted is in `metrics`."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ready = False
        """The first pass over the peers is done; it stays so."""
        self.summary = "starting"
        """The node in one line."""
        self.work_since: float | None = None
        """While the reconciler has work: its last sign of life, on the loop's clock; None = it is idle."""
        self.own_trouble: str | None = None
        """Why our own device does not stand, or why nothing can be compared; None = all is well."""
        self.lease_trouble: str | None = None
        """Why our lease is not ours right now; None = it is, as far as we know."""
        self.lease_expires = 0.0
        """When the store forgets our lease unless it is written again, seconds since 1970."""
        self.store_trouble: str | None = None
        """Why the store cannot be reached or used right now; None = all is well."""
        self.store_trouble_since = 0.0
        """When that began, seconds since 1970."""
        self.conflict: str | None = None
        """Who else claims our lease; None = nobody."""
        self.held = 0
        """Peers without a record, kept since the store began a new history."""
        self.config_pending: str | None = None
        """Why the store's network config is not the one that is running; None = it is."""
        self.rules_trouble: str | None = None
        """Why masquerade or forward rules do not stand, or do not help; None = all is well."""
        self.rules_absent: str | None = None
        """Why this host has no forward rules, which nobody asked for by name; None = it has."""
        self.peer_filter: str | None = None
        """Whether the filter drops ("enforce") or counts ("count"); None = it could not drop, or is off."""
        self.strangers: dict[str, int] = {}
        """Sources of encapsulated packets that no lease explains -> packets in the last hour; at most 20."""
        self.peers = 0
        """Peers that are programmed, or will be with the next pass."""
        self.missing: dict[str, float] = {}
        """Key of a peer that the kernel has not whole -> since when, on the loop's clock."""
        self.unreached: dict[tuple[str, bytes], str] = {}
        """(key, overlay address) of a peer that does not answer (all) probes -> the layer at fault."""
        self.trips: dict[str, Trip] = {}
        """Key of a peer -> its round trips, in the family that was probed last."""
        self.refused: dict[str, str] = {}
        """Key -> why (a part of) this peer is not programmed."""
        self.unreadable: dict[str, str] = {}
        """Key -> why this record of the store could not be read."""
