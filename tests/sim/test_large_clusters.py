"""A few histories of 200 nodes."""

import os

import pytest

from tests.sim.test_small_clusters import report
from tests.sim.world import simulate


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hundred_nodes(seed: int) -> None:
    outcome = simulate(seed, nodes=200, rounds=1, faults=30)
    if outcome.violations:
        rerun = f"SIM_LARGE_SEED={seed} pytest tests/sim -k large_replay"
        pytest.fail(report(outcome, rerun), pytrace=False)


@pytest.mark.skipif("SIM_LARGE_SEED" not in os.environ, reason="set SIM_LARGE_SEED to a seed that failed")
def test_large_replay() -> None:
    outcome = simulate(int(os.environ["SIM_LARGE_SEED"]), nodes=200, rounds=1, faults=30, journal=True)
    print("\n".join(outcome.log))
    assert not outcome.violations
