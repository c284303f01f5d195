"""The list and the watch of all nodes, as leases: what is lost, cut, silent, too old or hostile."""

import asyncio
from contextlib import aclosing

import pytest

from flannelpy.model.address import parse_address
from flannelpy.model.lease import Delta, Snapshot
from flannelpy.store import Head, kube_client, kube_nodes
from tests.etcd_process import wait_until
from tests.kube.api import StandIn
from tests.kube.following import MANY, filled, watching
from tests.kube.test_api import NOTHING, V4, Table, offer, run, store_of


@pytest.mark.parametrize("how", ["event", "status"])
def test_what_happened_is_known_no_more(stand_in: StandIn, how: str) -> None:
    """Both forms of 410; what went and came meanwhile is in the Snapshot."""
    filled(stand_in)
    stand_in.do("options", {"gone_by": how, "silent": True})

    async def scenario() -> None:
        async with watching(stand_in) as (_store, _source, table):
            stand_in.delete_node("big-00003")
            stand_in.do("many", {"first": MANY, "count": 1, "padding": 0})
            stand_in.do("compact")
            stand_in.do("options", {"silent": False})
            stand_in.do("cut", "clean")
            await table.until(lambda t: sum(isinstance(u, Snapshot) for u in t.seen) == 2)
            assert "big-00003" not in table.leases
            assert f"big-{MANY:05}" in table.leases
            assert len(table.leases) == MANY + 1

    run(scenario)


@pytest.mark.parametrize("how", ["mid", "clean"])
def test_a_watch_that_is_cut_goes_on_where_it_was(stand_in: StandIn, how: str) -> None:
    filled(stand_in)

    async def scenario() -> None:
        async with watching(stand_in) as (_store, _source, table):
            for number in range(3):
                stand_in.do("cut", how)
                stand_in.delete_node(f"big-{number:05}")
                await table.until(lambda t, n=number: f"big-{n:05}" not in t.leases)  # type: ignore[misc]
        assert sum(isinstance(update, Snapshot) for update in table.seen) == 1
        assert stand_in.requests()["list"] == 1

    run(scenario)


def test_a_silent_watch_is_given_up(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stands, and nothing comes, not even a bookmark."""
    monkeypatch.setattr(kube_client, "_WATCH_SILENCE_SECONDS", 0.5)
    filled(stand_in)
    stand_in.do("options", {"silent": True})

    async def scenario() -> None:
        async with watching(stand_in) as (_store, _source, table):
            stand_in.delete_node("big-00003")
            stand_in.do("options", {"silent": False, "bookmark_seconds": 0.1})
            stand_in.do("cut", "clean")
            await table.until(lambda t: "big-00003" not in t.leases)

    run(scenario)


def test_pages(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose cache lags behind what we saw is asked for an exact list, in pages."""
    monkeypatch.setattr(kube_nodes, "_PAGE", 7)
    filled(stand_in)

    async def scenario() -> None:
        store = store_of(stand_in, "n1")
        store.remember(Head(0, 0, 10_000), {})
        stand_in.do("answers", [])
        await store.acquire(V4, offer(1), NOTHING)
        async with aclosing(store.watch()) as source:
            first = await anext(source)
            assert isinstance(first, Snapshot)
            assert len(first.leases) == MANY + 1
            assert first.new_history, "the revision is lower than what was seen"
        assert stand_in.requests()["list"] == 1 + -(-(MANY + 1) // 7)
        await store.close()

    run(scenario)


def test_an_api_server_that_is_restored_begins_a_new_history(stand_in: StandIn) -> None:
    filled(stand_in)
    stand_in.do("save")

    async def scenario() -> None:
        store = store_of(stand_in, "n1")
        await store.acquire(V4, offer(1), NOTHING)
        async with aclosing(store.watch()) as source:
            table = Table(source)
            stand_in.do("many", {"first": MANY, "count": 1, "padding": 0})
            stand_in.do("skip", 1000)
            await table.until(lambda t: f"big-{MANY:05}" in t.leases)
            await table.until(lambda t: t.seen[-1].revision > 1000)
            stand_in.do("options", {"gone_by": "status"})
            stand_in.do("restore")
            stand_in.do("compact")
            stand_in.do("answers", [{"verb": "watch", "how": "status", "code": 410}])
            await table.until(lambda t: isinstance(t.seen[-1], Snapshot) and len(t.seen) > 1)
            assert isinstance(table.seen[-1], Snapshot)
            assert table.seen[-1].new_history
        await store.close()

    run(scenario)


def test_most_peers_are_not_given_up_for_a_cache_that_lags(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed once more, and exactly, before that is believed."""
    filled(stand_in)

    async def scenario() -> None:
        store = store_of(stand_in, "n1")
        await store.acquire(V4, offer(1), NOTHING)
        assert stand_in.requests()["list"] == 1
        for number in range(MANY):
            stand_in.delete_node(f"big-{number:05}")
        snapshot = await store._nodes.read_all()
        assert [lease.key for lease in snapshot.leases] == ["n1"]
        assert stand_in.requests()["list"] == 3
        await store.close()

    run(scenario)


def test_heartbeats_tell_nothing(stand_in: StandIn) -> None:
    filled(stand_in)

    async def scenario() -> None:
        async with watching(stand_in) as (_store, _source, table):
            seen = stand_in.do("heartbeats", MANY + 1)["revision"]
            await table.until(lambda t: t.seen[-1].revision >= seen)
            for update in table.seen[1:]:
                assert isinstance(update, Delta)
                assert not update.put

    run(scenario)


def test_hostile_nodes_hide_nobody(stand_in: StandIn) -> None:
    filled(stand_in)
    bad: dict[str, dict[str, str]] = {
        "bad-json": {"backend_data": "{"},
        "bad-deep": {"backend_data": "[" * 100_000},
        "bad-ip": {"public_ip": "$(reboot)\n"},
        "bad-type": {"backend_type": "x" * 10_000},
    }
    for name, annotations in bad.items():
        stand_in.add_node(name, ("10.244.77.0/24",))
        stand_in.annotate(name, **{"kube_subnet_manager": "true", "public_ip": "192.0.2.7", **annotations})

    async def scenario() -> None:
        store = store_of(stand_in, "n1")
        await store.acquire(V4, offer(1), NOTHING)
        async with aclosing(store.watch()) as source:
            first = await anext(source)
            assert isinstance(first, Snapshot)
            assert {key for key, _reason in first.unreadable} == set(bad)
            assert all(len(reason) <= 200 for _key, reason in first.unreadable)
            assert len(first.leases) == MANY + 1
            table = Table(source)
            stand_in.annotate("big-00005", backend_data="{")
            stand_in.annotate("bad-json", backend_data="null")
            await table.until(lambda t: "bad-json" in t.leases)
            told = {key for update in table.seen for key, _reason in update.unreadable}
            assert told == {"big-00005"}
        await store.close()

    run(scenario)


def test_a_node_that_became_unreadable_goes(stand_in: StandIn) -> None:
    """What was known of it stays, over a new listing too, until it is deleted or takes no part any more."""
    filled(stand_in)
    stand_in.do("options", {"gone_by": "status"})

    async def scenario() -> None:
        async with watching(stand_in) as (_store, source, table):
            for name in ("big-00001", "big-00002"):
                stand_in.annotate(name, backend_data="{")
            stand_in.do("compact")
            stand_in.do("skip", 1)
            stand_in.do("answers", [{"verb": "watch", "how": "status", "code": 410}])
            stand_in.do("cut", "clean")
            await table.until(lambda t: sum(isinstance(u, Snapshot) for u in t.seen) == 2)
            assert dict(table.seen[-1].unreadable).keys() == {"big-00001", "big-00002"}
            stand_in.delete_node("big-00001")
            stand_in.annotate("big-00002", kube_subnet_manager=None)
            gone: set[str] = set()
            async with asyncio.timeout(10):
                while gone != {"big-00001", "big-00002"}:
                    update = await anext(source)
                    assert isinstance(update, Delta)
                    gone |= set(update.gone)

    run(scenario)


def test_the_address_of_a_peer_is_followed(stand_in: StandIn) -> None:
    filled(stand_in)

    async def scenario() -> None:
        async with watching(stand_in) as (_store, _source, table):
            stand_in.annotate("big-00001", public_ip="198.51.100.1")
            address = parse_address("198.51.100.1")
            await table.until(lambda t: t.leases["big-00001"].attrs.public_ip == address)

    run(scenario)
    wait_until(lambda: stand_in.requests()["watch"] == 1, "one watch")
