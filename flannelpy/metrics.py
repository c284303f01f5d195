"""What the daemon has counted since its start, in plain values; other parts only read them."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

HEAL_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the classes in which times of repairs are counted."""


RTT_SECONDS = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.5)
"""The same of round trip times."""


class Repair(NamedTuple):
    """Something that somebody else had damaged was put right."""

    what: str
    cause: str
    """What was seen; "resync" if only the comparison of each minute found it."""
    seconds: float
    """From the kernel's announcement to the end."""


class Metrics:
    """Counts since the start."""

    def __init__(self) -> None:
        self.started = time.time()
        """Seconds since 1970."""
        self.refusals = 0
        """How often a record was refused or unreadable for a new reason."""
        self.passes = 0
        """Passes of the reconciler, partial ones included."""
        self.operations = 0
        """Operations that the kernel carried out."""
        self.failures = 0
        """Operations that the kernel refused."""
        self.store_troubles = 0
        """How often the store could not be used, for a new reason."""
        self.repairs: Counter[tuple[str, str]] = Counter()
        """(kind such as "add Route", "announced" or "resync") -> operations that put something right."""
        self.heal_times: Counter[float] = Counter()
        """Upper bound of a class (infinity for the last one) -> repairs that took no longer."""
        self.heal_seconds = 0.0
        """The sum of all times of repairs."""
        self.last_repair: Repair | None = None
        self.last_repair_at = 0.0
        """Seconds since 1970."""
        self.probes: Counter[str] = Counter()
        """"reached" or the layer at fault -> probes of peers."""
        self.rtts: Counter[float] = Counter()
        """Upper bound of a class (infinity for the last one) -> answers that took no longer."""
        self.rtt_seconds = 0.0
        """The sum of all round trip times."""
        self.stranger_packets = 0
        """Encapsulated packets that no lease explains."""
        self.natted_packets = 0
        """Those of peers whose packets come from another address than their public IP."""

    def note_repair(self, repair: Repair, kinds: Iterable[str]) -> None:
        """Count what a repair did: an item of `kinds` for each operation."""
        noticed = "resync" if repair.cause == "resync" else "announced"
        self.repairs.update((kind, noticed) for kind in kinds)
        self.heal_times[_class(repair.seconds, HEAL_SECONDS)] += 1
        self.heal_seconds += repair.seconds
        self.last_repair, self.last_repair_at = repair, time.time()

    def note_probe(self, rtt: float | None, fault: str | None) -> None:
        """Count a probe of a peer: seconds to its answer, and the layer at fault."""
        self.probes[fault or "reached"] += 1
        if rtt is not None:
            self.rtts[_class(rtt, RTT_SECONDS)] += 1
            self.rtt_seconds += rtt


def _class(seconds: float, bounds: Iterable[float]) -> float:
    return next((one for one in bounds if seconds <= one), float("inf"))
