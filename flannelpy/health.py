"""What the daemon knows about itself, in plain values; other parts only read it."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Health:
    """Counts since the start, and states as they are now."""

    ready: bool = False
    store_trouble: str | None = None
    """Why the store cannot be reached or used right now; None = all is well."""
    peers: int = 0
    """Peers that are programmed, or will be with the next pass."""
    refused: dict[str, str] = field(default_factory=dict)
    """Key -> why (a part of) this peer is not programmed."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Key -> why this record of the store could not be read."""
    refusals: int = 0
    """How often a record was refused or unreadable for a new reason."""
    passes: int = 0
    """Passes of the reconciler, partial ones included."""
    operations: int = 0
    """Operations that the kernel carried out."""
    failures: int = 0
    """Operations that the kernel refused."""
