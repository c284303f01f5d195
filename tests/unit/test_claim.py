"""Holding a claim: echoes of our own writes, losses, other histories, a store that refuses for good."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from random import Random

import pytest

from flannelpy import claim as module
from flannelpy.claim import Claim, Telling
from flannelpy.errors import StoreError
from flannelpy.health import Health
from flannelpy.model import identity
from flannelpy.model.config import NetworkConfig
from flannelpy.model.identity import Identity
from flannelpy.model.lease import Delta, Lease, LeaseUpdate, Snapshot
from flannelpy.model.subnet import Previous
from flannelpy.store import Head, Marks, Offer, Running
from tests.builders import config, lease

OWN = lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:01")

US = Identity("here", "b" * 36, "ours", 1000, 1)


class ScriptedStore:
    """A store whose answers a test decides; every write is announced before it is answered, as etcd may."""

    config_place = "here"

    def __init__(self) -> None:
        self.revision = 10
        self.acquired = 0
        self.renewed = 0
        self.announce: Callable[[LeaseUpdate], None] = lambda _update: None
        self.ours = True
        self.errors: list[StoreError] = []
        self.head: Head | None = None
        self.configs: list[str | None] = []
        self.signed: dict[str, str] = {}
        self.replaced: str | None = None
        self.written: list[Lease] = []
        self.running: Running | None = None
        self.health = Health()

    def remember(self, head: Head, marks: Marks) -> None:
        raise NotImplementedError

    async def sign(self, own: Lease, identity: str) -> None:
        self.signed[own.key] = identity

    async def signature(self, key: str) -> str | None:
        return self.signed.get(key)

    async def acquire(
        self, config: NetworkConfig, offer: Offer, previous: Previous, running: Running | None = None
    ) -> Lease:
        self.running = running
        if self.errors:
            raise self.errors.pop()
        self.acquired += 1
        self.ours = True
        return self._write(OWN)

    async def renew(self, own: Lease) -> Lease | None:
        if not self.ours:
            return None
        self.renewed += 1
        renewed = self._write(own)
        await asyncio.sleep(0.01)  # the old etcd lease is retired before the answer comes
        return renewed

    def _write(self, own: Lease) -> Lease:
        self.revision += 1
        written = own._replace(revision=self.revision)
        self.announce(Delta((written,), (), self.revision))
        return written

    async def watch_config(self) -> AsyncGenerator[str | None, None]:
        while True:
            while self.configs:
                yield self.configs.pop(0)
            await asyncio.sleep(0.01)

    def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def claim_on(store: ScriptedStore, moved: list[Lease]) -> Claim:
    telling = Telling(moved.append, lambda: None, store.written.append)
    return Claim(
        store, config(), lambda _r, _o: OWN.attrs, Previous(), 60, Random(1), store.health, US, telling
    )


def run(test: Callable[[Claim, ScriptedStore, list[Lease]], Awaitable[None]]) -> None:
    """Run a test with a claim that was taken and is being kept."""

    async def main() -> None:
        store, moved = ScriptedStore(), list[Lease]()
        claim = claim_on(store, moved)
        store.announce = claim.notice
        await claim.take()
        keeper = asyncio.create_task(claim.keep())
        try:
            await test(claim, store, moved)
            assert not keeper.done()
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what it waits for has no event
            await asyncio.sleep(0.005)


def test_the_echo_of_a_renewal_is_no_loss() -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        claim._renew_at = 0.0
        claim._wake.set()
        await until(lambda: store.renewed == 1)
        await asyncio.sleep(0.2)
        assert (store.renewed, store.acquired, moved) == (1, 1, [])

    run(test)


@pytest.mark.parametrize(
    "loss",
    [
        Delta((), (OWN.key,), 50),
        Delta((OWN._replace(revision=50, etcd_lease_id=9),), (), 50),
        Snapshot((), 50),
        Snapshot((), 3),  # an emptied or restored etcd counts from the start
        Snapshot((OWN._replace(revision=2),), 3),
    ],
    ids=["deleted", "overwritten", "absent", "emptied", "restored"],
)
def test_a_loss_is_taken_back_once(loss: LeaseUpdate) -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        store.ours = False
        store.revision = loss.revision
        claim.notice(loss)
        await until(lambda: store.acquired == 2)
        await asyncio.sleep(0.1)
        assert (store.acquired, len(moved)) == (2, 1)

    run(test)


@pytest.mark.parametrize("is_deleted", [True, False])
def test_what_happens_to_a_new_record_before_its_answer_comes_is_noticed(
    monkeypatch: pytest.MonkeyPatch, *, is_deleted: bool
) -> None:
    monkeypatch.setattr(module, "_RECLAIM_SECONDS", (0.05, 0.05))
    elsewhere = lease("10.5.9.0/24", "192.0.2.1", mac="02:00:00:00:00:01")

    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        async def acquire(*_words: object) -> Lease:
            store.acquired += 1
            written = store._write(elsewhere)
            if store.acquired == 2:
                store.revision += 1
                theirs = written._replace(revision=store.revision, etcd_lease_id=0)
                claim.notice(Delta((), (elsewhere.key,), store.revision) if is_deleted
                             else Delta((theirs,), (), store.revision))  # fmt: skip
            return written

        store.acquire = acquire  # type: ignore[assignment]
        store.ours = False
        claim.notice(Delta((), (OWN.key,), 50))
        await until(lambda: store.acquired == 3)
        await asyncio.sleep(0.2)
        assert store.acquired == 3
        assert [one.key for one in moved] == [elsewhere.key] * 2

    run(test)


def test_an_unreadable_record_of_ours_in_a_listing_is_no_loss() -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        claim.notice(Snapshot((), 50, ((OWN.key, "not JSON"),)))
        await asyncio.sleep(0.1)
        assert store.acquired == 1

    run(test)


def test_a_running_node_never_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01, 0.02))

    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        store.ours = False
        store.errors = [
            StoreError("the pool is full"),
            StoreError("permission denied"),
            StoreError("away", transient=True),
        ]
        claim.notice(Delta((), (OWN.key,), 50))
        await until(lambda: store.acquired == 2)

    run(test)


def test_a_start_ends_with_what_waiting_cannot_cure() -> None:
    async def main() -> None:
        store = ScriptedStore()
        store.errors = [StoreError("wrong password")]
        claim = claim_on(store, [])
        with pytest.raises(StoreError, match="wrong password"):
            await claim.take()

    asyncio.run(main())


def test_changed_attributes_are_written_and_repeated_for_flannels_sake() -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        claim.publish()
        await until(lambda: store.renewed == 1 and len(moved) == 1)
        assert len(claim._repeats) == 2
        claim._repeats = [asyncio.get_running_loop().time()]
        claim._wake.set()
        await until(lambda: store.renewed == 2)
        assert len(moved) == 1

    run(test)


THEIRS = OWN._replace(etcd_lease_id=9, attrs=lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:02").attrs)


@pytest.mark.parametrize(
    ("since", "gives_way"), [(500, True), (2000, False), (None, False)], ids=["older", "younger", "unknown"]
)
def test_another_machine_with_our_public_ip_is_named_and_not_fought(
    since: int | None, gives_way: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SIGN_SECONDS", 0.0)

    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        await until(lambda: OWN.key in store.signed)
        assert identity.parse(store.signed[OWN.key]) == US
        for revision in (50, 60):  # it comes back: the second time we wait before we take it back again
            store.ours = False
            if since is not None:
                store.signed[OWN.key] = identity.render(Identity("twin", "c" * 36, "theirs", since, 1))
            store.revision = revision
            claim.notice(Delta((THEIRS._replace(revision=revision),), (), revision))
            await asyncio.sleep(0.1)
        assert store.acquired == (1 if gives_way else 2)
        conflict = store.health.conflict or ""
        assert "192.0.2.1" in conflict
        assert "host here" in conflict
        assert ("host twin" if since else "unknown") in conflict
        assert "02:00:00:00:00:02" in conflict
        if gives_way:  # until it is gone
            claim.notice(Delta((), (OWN.key,), 70))
            await until(lambda: store.acquired == 2)
            assert store.health.conflict is None

    run(test)
    assert sum("another machine has our public IP" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(
    ("host", "boot", "since", "started", "level"),
    [
        ("here", "b", 1000, 500, None),  # a restart
        ("here", "c", 400, 999_000, None),  # a reboot
        ("former", "c", 400, 999_000, logging.INFO),  # renamed, installed anew, or a clone
        ("here", "c", 1100, 1_100_000, logging.ERROR),  # a clone that booted later
        ("here", "c", 400, 1_500_000, logging.ERROR),  # its daemon started while we were up
    ],
)
def test_a_start_says_whose_record_it_takes_over(
    host: str, boot: str, since: int, started: int, level: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flannelpy")

    async def main() -> None:
        store = ScriptedStore()
        claim = claim_on(store, [])
        them = Identity(host, boot * 36, "theirs", since, started, "eth7 192.0.2.1")
        store.replaced = identity.render(them)
        await claim.take()
        assert bool(store.health.conflict) is (level == logging.ERROR)

    asyncio.run(main())
    said = [record for record in caplog.records if "written" in record.getMessage()]
    assert [record.levelno for record in said] == ([] if level is None else [level])
    for record in said:
        assert f"host {host}, uplink eth7 192.0.2.1 (boot {boot * 8})" in record.getMessage()
        assert "host here" in record.getMessage()
    assert ("--public-ip" in caplog.text) is (level == logging.ERROR)


def test_a_record_without_an_etcd_lease_is_an_operators(caplog: pytest.LogCaptureFixture) -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        store.ours = False
        claim.notice(Delta((THEIRS._replace(revision=50, etcd_lease_id=0),), (), 50))
        await until(lambda: store.acquired == 2)

    run(test)
    assert "another machine" not in caplog.text


def test_a_new_history_is_written_to_only_with_our_config(caplog: pytest.LogCaptureFixture) -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        store.ours = False
        store.configs = [None, "{", '{"Network":"10.9.0.0/16"}']
        claim.notice(Snapshot((), 3, new_history=True))
        await until(lambda: not store.configs)
        await asyncio.sleep(0.05)
        assert store.acquired == 1
        store.configs = ['{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"},"SubnetMin":"10.5.9.0"}']
        await until(lambda: store.acquired == 2)
        assert store.running is not None
        assert store.running.own.key == OWN.key

    run(test)
    assert caplog.text.count("not written into the store's new history yet") == 3


def test_in_a_new_history_a_record_that_is_as_we_wrote_it_is_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peers may know somebody else's, of the history that ended, and take ours for older."""
    monkeypatch.setattr(module, "_REPEAT_SECONDS", (0.05, 0.1))

    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        assert claim.own is not None
        claim.notice(Snapshot((claim.own,), 50, new_history=True))
        await until(lambda: store.renewed == 2)
        assert (store.acquired, moved) == (1, [])

    run(test)


def test_an_answer_of_a_history_that_ended_meanwhile_is_none() -> None:
    async def test(claim: Claim, store: ScriptedStore, moved: list[Lease]) -> None:
        async def renew(own: Lease) -> Lease:
            written = store._write(own)
            # Restored: the record is as we wrote it before. Then the answer comes.
            claim.notice(Snapshot((own,), written.revision, new_history=True))
            return written

        store.renew = renew  # type: ignore[method-assign]
        store.configs = ['{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}']
        claim._renew_at = 0.0
        claim._wake.set()
        await until(lambda: store.acquired == 2)
        assert len(moved) == 1

    run(test)


def test_a_lease_from_memory_is_written_as_soon_as_the_store_answers() -> None:
    async def main() -> None:
        store, moved = ScriptedStore(), list[Lease]()
        claim = claim_on(store, moved)
        claim.resume(OWN._replace(revision=5), 100.0)
        assert (store.acquired, claim.own) == (0, OWN._replace(revision=5))
        keeper = asyncio.create_task(claim.keep())
        await until(lambda: store.renewed == 1 and len(store.written) == 1)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(main())
