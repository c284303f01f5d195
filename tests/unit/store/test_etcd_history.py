"""How far a watch has come, when it doubts etcd's history, how it waits."""

import asyncio
from random import Random
from types import SimpleNamespace

import pytest

from flannelpy.store import Head
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import _advanced, clean_prefix
from flannelpy.store.etcd_reason import bounded, call_reason, connect_reason
from flannelpy.store.retry import Retry


def response(revision: int, *events: int) -> pb.WatchResponse:
    return pb.WatchResponse(
        header=pb.ResponseHeader(cluster_id=1, raft_term=3, revision=revision),
        events=[pb.Event(kv=pb.KeyValue(mod_revision=event)) for event in events],
    )


def test_events_lead_to_the_last_of_them_and_notifications_to_their_header() -> None:
    head = Head(cluster=1, term=2, revision=10)
    assert _advanced(head, response(5000, 11, 12)) == Head(1, 3, 12)
    assert _advanced(head, response(40)) == Head(1, 3, 40)
    assert _advanced(head, response(4)) == Head(1, 3, 10)


@pytest.mark.parametrize(
    ("head", "doubtful"),
    [
        (Head(1, 2, 10), False),
        (Head(1, 9, 99), False),
        (Head(2, 2, 10), True),
        (Head(1, 2, 9), True),
        (Head(1, 1, 10), True),
    ],
)
def test_another_cluster_or_an_older_state_is_doubtful(head: Head, *, doubtful: bool) -> None:
    assert head.contradicts(Head(1, 2, 10)) is doubtful


def test_waits_double_up_to_five_seconds_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    reports: list[str | None] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr("flannelpy.store.retry.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario() -> None:
        retry = Retry(Random(1), reports.append)
        for _ in range(9):
            await retry.failed("no")
        retry.succeeded()
        now[0] = 1.0
        await retry.failed("dropped at once: still the same trouble")
        retry.succeeded()
        now[0] = 60.0
        await retry.failed("once in a while")
        # Members that fail in different ways take turns; then one of them stays alone.
        for reason in ("a", "b", "a", "b", "b"):
            now[0] += 1
            await retry.failed(reason)
        retry.succeeded()
        now[0] = 100.0
        await retry.failed("the watch is lost: it stopped answering")

    asyncio.run(scenario())
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 0.1]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, longest, strict=True))
    assert len(set(waits)) == len(waits)
    dropped = "dropped at once: still the same trouble"
    hung = "the watch is lost: it stopped answering"
    assert reports == ["no", None, dropped, None, "a", "b", None, hung]


def test_prefixes_are_used_as_flannel_does() -> None:
    prefixes = ["/coreos.com/network", "/coreos.com//network/", "coreos.com/network", "/", ""]
    assert [clean_prefix(prefix) for prefix in prefixes] == [
        "/coreos.com/network", "/coreos.com/network", "coreos.com/network", "", "",
    ]  # fmt: skip


def test_reasons_are_short_and_on_one_line() -> None:
    long = "failed to connect to all addresses; last error: UNKNOWN: " + "a\nb\x1b[0m " * 500
    assert len(connect_reason(long, "ca", secure=False)) <= 160
    assert connect_reason(long, "ca", secure=False).isprintable()
    ended = "client.crt, which ended at 2026-01-01T00:00:00Z"
    assert ended in connect_reason("Socket closed", "ca", secure=True, ended=ended)
    assert ended not in connect_reason("Connection refused", "ca", secure=True, ended=ended)
    assert bounded("x" * 160) == "x" * 160
    assert call_reason("DEADLINE_EXCEEDED", "Deadline Exceeded") == "no answer in time"
    assert call_reason("UNAVAILABLE", "etcdserver: no leader") == "no leader"
    assert call_reason("UNAVAILABLE", "Socket closed") == "connection lost"
    assert call_reason("UNAVAILABLE", "recvmsg:Connection timed out") == "it stopped answering"
    assert call_reason("UNAVAILABLE", "") == "unavailable"
    assert call_reason("INTERNAL", "Internal error from Core") == "it ended the call at once"
