"""Three bugs put in on purpose: a simulation that does not find them would find nothing."""

from collections.abc import Iterable

import pytest

from flannelpy import reconcile
from flannelpy.model.kernel import State
from flannelpy.model.lease import Delta, LeaseUpdate
from flannelpy.model.peers import Change, Peers
from flannelpy.model.plan import Op, Put, plan, plan_part
from tests.sim.world import simulate

_ENOUGH = 400
"""Seeds within which each must show."""


def found() -> str:
    """The first violation that a run shows."""
    for seed in range(_ENOUGH):
        violations = simulate(seed).violations
        if violations:
            return violations[0]
    pytest.fail(f"not noticed in {_ENOUGH} seeds")


def test_a_skipped_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refused is left as it is."""
    monkeypatch.setattr(reconcile.Reconciler, "_back_off", lambda _self: None)
    assert found()


def test_a_dropped_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """One change in ten does not reach the peers."""
    seen = 0
    update = Peers.update

    def forgetful(self: Peers, news: LeaseUpdate) -> Change:
        nonlocal seen
        seen += 1
        if isinstance(news, Delta) and seen % 10 == 0:
            return Change(State(), full=False)
        return update(self, news)

    monkeypatch.setattr(Peers, "update", forgetful)
    assert found()


def test_delete_before_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that removes first leads to the same end; on the way a route that is present cannot deliver."""

    def removals_first(ops: list[Op]) -> list[Op]:
        return sorted(ops, key=lambda op: isinstance(op, Put))

    def whole(desired: State, observed: State) -> list[Op]:
        return removals_first(plan(desired, observed))

    def part(desired: Iterable[State], observed: State, touched: State) -> list[Op]:
        return removals_first(plan_part(desired, observed, touched))

    monkeypatch.setattr(reconcile, "plan", whole)
    monkeypatch.setattr(reconcile, "plan_part", part)
    violation = found()
    assert "after remove" in violation
    assert "has no" in violation
