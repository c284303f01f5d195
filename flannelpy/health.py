"""What the daemon knows about itself, in plain values; other parts only read it."""

from collections import Counter
from collections.abc import Iterable

from flannelpy.model.plan import Op, Remove


class Health:
    """Counts since the start, and states as they are now."""

    def __init__(self) -> None:
        self.ready: bool = False
        self.summary: str = "starting"
        """The node in one line."""
        self.store_trouble: str | None = None
        """Why the store cannot be reached or used right now; None = all is well."""
        self.peers: int = 0
        """Peers that are programmed, or will be with the next pass."""
        self.refused: dict[str, str] = {}
        """Key -> why (a part of) this peer is not programmed."""
        self.unreadable: dict[str, str] = {}
        """Key -> why this record of the store could not be read."""
        self.refusals: int = 0
        """How often a record was refused or unreadable for a new reason."""
        self.passes: int = 0
        """Passes of the reconciler, partial ones included."""
        self.operations: int = 0
        """Operations that the kernel carried out."""
        self.failures: int = 0
        """Operations that the kernel refused."""
        self.repairs: Counter[str] = Counter()
        """Operations that put right what somebody else had damaged, by kind: "add Route"."""
        self.last_repair_seconds: float = 0.0
        """From the kernel's announcement to the end of the last repair."""
        self.longest_repair_seconds: float = 0.0

    def note_repair(self, ops: Iterable[Op], seconds: float) -> None:
        """Count what a repair did."""
        for op in ops:
            verb = "remove" if isinstance(op, Remove) else "change" if op.was is not None else "add"
            self.repairs[f"{verb} {type(op.item).__name__}"] += 1
        self.last_repair_seconds = seconds
        self.longest_repair_seconds = max(self.longest_repair_seconds, seconds)
