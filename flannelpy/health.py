"""How the daemon is, in plain values; other parts only read them."""

from flannelpy.metrics import Metrics


class Health:
    """States as they are now; what is counted is in `metrics`."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ready = False
        self.summary = "starting"
        """The node in one line."""
        self.store_trouble: str | None = None
        """Why the store cannot be reached or used right now; None = all is well."""
        self.peers = 0
        """Peers that are programmed, or will be with the next pass."""
        self.refused: dict[str, str] = {}
        """Key -> why (a part of) this peer is not programmed."""
        self.unreadable: dict[str, str] = {}
        """Key -> why this record of the store could not be read."""
