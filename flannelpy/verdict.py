"""What the state of health means: alive or stuck, ready or not, and why. Pure.

An outage of the datastore and records that others wrote wrongly take nobody's readiness away: they would take
it from all nodes at once, and a restart does not help.
"""

import time
from typing import NamedTuple

from flannelpy.health import Health

STUCK_SECONDS = 30.0
"""The reconciler has work and shows no life for so long: a pass over 10,000 peers takes half a second."""
GRACE_SECONDS = 10.0
"""A peer that is missing in the kernel for less is about to be put there."""
_NAMED = 3
"""Keys that are named one by one."""


class Verdict(NamedTuple):
    """What is wrong; the worst comes first."""

    stuck: str | None
    """Why the daemon should be started anew; None = it works."""
    faults: tuple[str, ...]
    """What keeps this node from being ready."""
    flaws: tuple[str, ...]
    """What is wrong although it is ready, or would be."""

    @property
    def ready(self) -> bool:
        """Whether packets of this node's pods find their way."""
        return not self.faults

    @property
    def state(self) -> str:
        """One word."""
        return "not ready" if self.faults else "degraded" if self.flaws else "ready"


def is_stuck(health: Health, now: float) -> bool:
    """Whether the reconciler has stopped; `now` is on the loop's clock."""
    return health.work_since is not None and now - health.work_since > STUCK_SECONDS


def judge(health: Health, now: float, percent: int) -> Verdict:
    """At the time `now` of the loop's clock. More than `percent` of the peers missing is not ready."""
    stuck = None
    if is_stuck(health, now) and health.work_since is not None:
        stuck = f"the reconciler has shown no life for {now - health.work_since:.0f} s although it has work"
    faults = [] if health.ready else [f"not ready yet: {health.summary}"]
    faults += filter(None, (stuck, health.lease_trouble, health.own_trouble, health.rules_trouble))
    flaws: list[str] = []
    missing = [key for key, since in health.missing.items() if now - since >= GRACE_SECONDS]
    if missing:
        text = f"{len(missing)} of {health.peers} peer(s) not in the kernel: {_named(missing)}"
        (faults if len(missing) * 100 > percent * health.peers else flaws).append(text)
    if health.unreached:
        keys = sorted({f"{key} ({layer})" for (key, _address), layer in health.unreached.items()})
        flaws.append(f"{len(keys)} peer(s) not answering (all) probes: {_named(keys)}")
    if health.store_trouble is not None:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(health.store_trouble_since))
        flaws.append(f"{health.store_trouble}; the network goes on with what was known at {since}")
    if health.conflict is not None and health.conflict != health.lease_trouble:
        flaws.append(health.conflict)
    if health.held:
        flaws.append(f"{health.held} peer(s) without a record in the store, held")
    if health.config_pending is not None:
        flaws.append(f"{health.config_pending}; the running one stays until a restart")
    if health.rules_absent is not None:
        flaws.append(health.rules_absent)
    if health.refused:
        flaws.append(f"{len(health.refused)} peer(s) not (all) programmed: {_named(list(health.refused))}")
    if health.unreadable:
        flaws.append(f"{len(health.unreadable)} unreadable record(s): {_named(list(health.unreadable))}")
    return Verdict(stuck, tuple(faults), tuple(flaws))


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
