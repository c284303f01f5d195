"""What the daemon has counted since its start, in plain values; other parts only read them."""

from collections import Counter
from collections.abc import Iterable

from flannelpy.model.plan import Op, Remove


class Metrics:
    """Counts since the start."""

    def __init__(self) -> None:
        self.refusals = 0
        """How often a record was refused or unreadable for a new reason."""
        self.passes = 0
        """Passes of the reconciler, partial ones included."""
        self.operations = 0
        """Operations that the kernel carried out."""
        self.failures = 0
        """Operations that the kernel refused."""
        self.repairs: Counter[str] = Counter()
        """Operations that put right what somebody else had damaged, by kind: "add Route"."""
        self.stranger_packets = 0
        """Encapsulated packets that no lease explains."""
        self.natted_packets = 0
        """Those of peers whose packets come from another address than their public IP."""
        self.last_repair_seconds = 0.0
        """From the kernel's announcement to the end of the last repair."""
        self.longest_repair_seconds = 0.0

    def note_repair(self, ops: Iterable[Op], seconds: float) -> None:
        """Count what a repair did."""
        kinds = []
        for op in ops:
            verb = "remove" if isinstance(op, Remove) else "change" if op.was is not None else "add"
            kinds.append(f"{verb} {type(op.item).__name__}")
        self.count_repairs(kinds, seconds)

    def count_repairs(self, kinds: Iterable[str], seconds: float) -> None:
        """The same for kinds that are named already, as "add Route"."""
        self.repairs.update(kinds)
        self.last_repair_seconds = seconds
        self.longest_repair_seconds = max(self.longest_repair_seconds, seconds)
