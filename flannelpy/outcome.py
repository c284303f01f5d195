"""What the reconciler's passes did and found, told in the log, the counts and the state of health."""

import logging
from collections.abc import Sequence
from typing import Protocol

from flannelpy.health import Health
from flannelpy.metrics import Repair
from flannelpy.model.kernel import DeviceAddress, Link, Tunnel
from flannelpy.model.lease import LeaseUpdate, Snapshot
from flannelpy.model.plan import Op, Put, Remove

log = logging.getLogger("flannelpy.reconcile")  # the loop's own words

_QUIET = 6
"""Up to so many operations, one peer's, are not worth a line in the log of a large cluster."""
_NAMED = 20
"""Bad records that are named one by one when they come at once."""
_OWN = (Link, DeviceAddress, Tunnel)
"""What a node needs for itself, whoever its peers are."""


class Failure(Protocol):
    """An operation that the kernel refused; its text says which and why."""

    @property
    def op(self) -> Op:
        """What was refused."""
        ...


class Outcomes:
    """Says each thing once; owned by one reconciler."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._said: dict[str, str] = {}
        self._refused: set[str] = set()

    def applied(
        self,
        ops: Sequence[Op],
        done: int,
        failures: Sequence[Failure],
        cause: str,
        healed: float | None,
    ) -> None:
        """A plan was carried out; `healed` since the damage that it puts right, None = nobody's doing."""
        metrics = self._health.metrics
        metrics.passes += 1
        metrics.operations += done
        metrics.failures += len(failures)
        if not ops:
            return
        text = summary(ops, len(failures), len(ops) - done - len(failures))
        if healed is not None:
            metrics.note_repair(Repair(text, cause, healed), map(_kind, ops))
            log.warning("repaired in %.0f ms: %s (%s)", healed * 1000, text, cause)
        else:
            level = logging.INFO if len(ops) > _QUIET else logging.DEBUG
            log.log(level, "%s: %s", cause, text)

    def all_done(self) -> None:
        """A full pass was refused nothing."""
        self._refused = set()
        self._health.own_trouble = None

    def refused(self, failures: Sequence[Failure], retry: float) -> None:
        """The kernel refused these, which is tried again in `retry` seconds; said once for each."""
        own = [one for one in failures if isinstance(one.op, Put) and isinstance(one.op.item, _OWN)]
        if own:
            self._health.own_trouble = f"the kernel refused: {own[0]}"
        texts = [str(failure) for failure in failures]
        new = [text for text in texts if text not in self._refused]
        self._refused = set(texts)
        for text in new[:5]:
            log.warning("the kernel refused: %s; trying again in %.2g s", text, retry)
        if len(new) > 5:
            log.warning("the kernel refused %d more operations", len(new) - 5)

    def not_compared(self, error: Exception, retry: float) -> None:
        """A pass broke off."""
        self._health.own_trouble = f"cannot reconcile: {error}"
        log.warning("cannot reconcile: %s; trying again in %.2g s", error, retry)

    def note_unreadable(self, update: LeaseUpdate) -> None:
        """Which records of the store could not be read."""
        health = self._health
        if isinstance(update, Snapshot):
            health.unreadable = dict(update.unreadable)
        else:
            for key in [*(lease.key for lease in update.put), *update.gone]:
                health.unreadable.pop(key, None)
            health.unreadable.update(update.unreadable)

    def name_troubles(self, refused: dict[str, str]) -> None:
        """One line for each record that is not programmed for a new reason; a flood of them is cut short."""
        health = self._health
        health.refused = refused
        reasons = {key: f"is unreadable: {reason}" for key, reason in health.unreadable.items()}
        reasons.update({key: f"is not programmed: {reason}" for key, reason in refused.items()})
        new = [key for key, reason in reasons.items() if self._said.get(key) != reason]
        self._said = reasons
        health.metrics.refusals += len(new)
        for key in new[:_NAMED]:
            log.warning("lease %s %s", key, reasons[key])
        if len(new) > _NAMED:
            log.warning(
                "and %d more leases, such as %s, which %s", len(new) - _NAMED, new[-1], reasons[new[-1]]
            )


def summary(ops: Sequence[Op], refused: int = 0, put_off: int = 0) -> str:
    """One sentence: what was to be done, and how much of it was not."""
    if len(ops) == 1 and not refused:
        return str(ops[0])
    counts: dict[str, int] = {}
    for op in ops:
        verb = "removed" if isinstance(op, Remove) else "changed" if op.was is not None else "added"
        word = f"{verb} {_WORDS[type(op.item).__name__]}"
        counts[word] = counts.get(word, 0) + 1
    text = ", ".join(f"{count} {word}" for word, count in counts.items())
    text += f"; {refused} refused" if refused else ""
    return text + (f", {put_off} put off because of that" if put_off else "")


def _kind(op: Op) -> str:
    verb = "remove" if isinstance(op, Remove) else "change" if op.was is not None else "add"
    return f"{verb} {type(op.item).__name__}"


_WORDS = {
    "Link": "device(s)",
    "DeviceAddress": "address(es)",
    "Tunnel": "forwarder(s)",
    "FdbEntry": "FDB entries",
    "Neighbour": "neighbours",
    "Forward": "forwarding entries",
    "Route": "routes",
}
