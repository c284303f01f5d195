"""What makes a node ready, degraded or stuck."""

from collections.abc import Callable

import pytest

from flannelpy.endpoints import healthz, readyz
from flannelpy.health import Health
from flannelpy.verdict import GRACE_SECONDS, STUCK_SECONDS, Verdict, judge

NOW = 1000.0


def well() -> Health:
    health = Health()
    health.ready, health.summary, health.peers = True, "10.5.1.0-24 on flannel.1, 20 peers", 20
    return health


def judged(change: Callable[[Health], None], percent: int = 10) -> Verdict:
    health = well()
    change(health)
    return judge(health, NOW, percent)


def setting(**values: object) -> Callable[[Health], None]:
    return lambda health: health.__dict__.update(values)


def test_a_node_that_is_well_says_what_flannel_says() -> None:
    verdict = judged(setting())
    assert verdict == Verdict(None, (), ())
    assert (healthz(verdict).status, healthz(verdict).body) == (200, b"flanneld is running")
    assert (readyz(verdict).status, readyz(verdict).body) == (200, b"flanneld is ready")


def test_a_start_is_not_ready_and_says_what_it_waits_for() -> None:
    health = Health()
    health.summary = "waiting: no network config yet"
    answer = readyz(judge(health, NOW, 10))
    assert answer.status == 503
    assert answer.body == (b"flanneld is not ready yet\nnot ready yet: waiting: no network config yet\n")
    assert healthz(judge(health, NOW, 10)).status == 200


@pytest.mark.parametrize(
    "fault",
    [
        {"lease_trouble": "our lease 10.5.1.0-24 was deleted"},
        {"own_trouble": "the kernel refused: add device flannel.1"},
        {"rules_trouble": "cannot set the rules"},
    ],
)
def test_what_takes_readiness_away(fault: dict[str, str]) -> None:
    verdict = judged(setting(**fault))
    assert verdict.state == "not ready"
    answer = readyz(verdict)
    assert answer.status == 503
    assert answer.body.decode().splitlines()[1:] == list(fault.values())
    assert healthz(verdict).status == 200


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        (
            {"store_trouble": "no member answers", "store_trouble_since": 1_700_000_000.0},
            "no member answers; the network goes on with what was known at 2023-11-14T22:13:20Z",
        ),
        ({"refused": {"10.5.2.0-24": "x"}}, "1 peer(s) not (all) programmed: 10.5.2.0-24"),
        ({"unreadable": dict.fromkeys("abcde", "x")}, "5 unreadable record(s): a, b, c and 2 more"),
        ({"held": 3}, "3 peer(s) without a record in the store, held"),
        ({"config_pending": "another VNI"}, "another VNI; the running one stays until a restart"),
        ({"conflict": "another machine has our public IP"}, "another machine has our public IP"),
        ({"rules_absent": "no forward rules: no iptables"}, "no forward rules: no iptables"),
    ],
)
def test_what_is_wrong_and_leaves_a_node_ready(flaw: dict[str, object], words: str) -> None:
    verdict = judged(setting(**flaw))
    assert (verdict.state, verdict.flaws) == ("degraded", (words,))
    answer = readyz(verdict)
    assert (answer.status, answer.body.decode()) == (200, f"flanneld is ready\n{words}\n")


@pytest.mark.parametrize(
    ("count", "seconds", "percent", "state"),
    [
        (2, GRACE_SECONDS, 10, "degraded"),  # 10 %: no more than that
        (3, GRACE_SECONDS, 10, "not ready"),
        (3, GRACE_SECONDS - 1, 10, "ready"),
        (3, GRACE_SECONDS, 15, "degraded"),
        (1, GRACE_SECONDS, 0, "not ready"),
    ],
)
def test_so_many_peers_may_be_missing_for_so_long(
    count: int, seconds: float, percent: int, state: str
) -> None:
    missing = {f"10.5.{n}.0-24": NOW - seconds for n in range(count)}
    assert judged(setting(missing=missing), percent).state == state


def test_a_reconciler_that_stopped_is_stuck_and_a_busy_one_is_not() -> None:
    for since, stuck in ((None, False), (NOW - STUCK_SECONDS, False), (NOW - STUCK_SECONDS - 1, True)):
        verdict = judged(setting(work_since=since))
        assert (verdict.stuck is not None, verdict.ready) == (stuck, not stuck)
        assert healthz(verdict).status == (503 if stuck else 200)
