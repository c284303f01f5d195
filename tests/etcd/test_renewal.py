"""What survives what: a keepalive of the etcd lease, or a compare-and-swap with a new one (docs/design/0010).

And what a listing has to show before it is believed.
"""

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.lease import Lease, Snapshot
from flannelpy.model.subnet import encode_attrs
from flannelpy.store import Running
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from tests.etcd.conftest import Start
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import NOTHING, V4, Updates, attrs, offer
from tests.etcd.test_etcd_store import EtcdLab, lab
from tests.etcd_process import RESTORER, EtcdProcess

pytestmark = pytest.mark.etcd


def keepalive_works(etcd: EtcdProcess, lease: Lease) -> bool:
    """Whether etcd prolongs an etcd lease, as a client that only keeps it alive would see it."""
    try:
        return "keepalived" in etcd.ctl("lease", "keep-alive", "--once", f"{lease.etcd_lease_id:x}")
    except subprocess.CalledProcessError:
        return False


def backup(etcd: EtcdProcess) -> Path:
    path = etcd.directory / "backup.db"
    etcd.ctl("snapshot", "save", str(path))
    return path


def restore(etcd: EtcdProcess, path: Path) -> None:
    """Start with the backup's records, as another cluster."""
    assert RESTORER is not None
    etcd.kill()
    data = etcd.directory / "data"
    shutil.rmtree(data)
    peers = etcd.flag("--initial-cluster")
    subprocess.run(
        [RESTORER, "snapshot", "restore", str(path), f"--data-dir={data}", "--name=test",
         f"--initial-cluster={peers}", f"--initial-advertise-peer-urls={peers.partition('=')[2]}",
         "--initial-cluster-token=restored"],
        check=True, capture_output=True, env={"ETCDCTL_API": "3"},
    )  # fmt: skip
    etcd.start()


async def deleted(etcd_lab: EtcdLab, own: Lease, _etcd: EtcdProcess, _saved: Path) -> None:
    await etcd_lab.delete(own.key)


async def overwritten(etcd_lab: EtcdLab, own: Lease, _etcd: EtcdProcess, _saved: Path) -> None:
    await etcd_lab.put(own.key, encode_attrs(attrs(99)).encode())


async def revoked(etcd_lab: EtcdLab, own: Lease, _etcd: EtcdProcess, _saved: Path) -> None:
    await etcd_lab.expire(own.etcd_lease_id)


async def restored(_lab: EtcdLab, _own: Lease, etcd: EtcdProcess, saved: Path) -> None:
    await asyncio.to_thread(restore, etcd, saved)


@pytest.mark.parametrize(
    ("accident", "keepalive_is_content"),
    [(deleted, True), (overwritten, True), (revoked, False), (restored, False)],
    ids=["deleted", "overwritten", "revoked", "restored"],
)
def test_a_renewal_sees_what_a_keepalive_does_not(
    accident: Callable[[EtcdLab, Lease, EtcdProcess, Path], Awaitable[None]],
    start_etcd: Start,
    *,
    keepalive_is_content: bool,
) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab:
            saved = await asyncio.to_thread(backup, etcd)
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            assert await asyncio.to_thread(keepalive_works, etcd, own)
            await accident(etcd_lab, own, etcd, saved)
            assert await asyncio.to_thread(keepalive_works, etcd, own) is keepalive_is_content
            assert await node.renew(own) is None, "the record is not ours any more"
            # The same subnet again, unless somebody has it.
            again = await node.acquire(V4, offer(1), NOTHING, Running(own))
            assert (again.key == own.key) is (accident is not overwritten)

    asyncio.run(scenario())


def test_a_restored_backup_with_an_older_lease_of_ours_does_not_move_us(start_etcd: Start) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab:
            await etcd_lab.put("10.5.7.0-24", encode_attrs(attrs(1)).encode())
            held = await etcd_lab.node().acquire(V4, offer(3), NOTHING)
            saved = await asyncio.to_thread(backup, etcd)
            await etcd_lab.delete("10.5.7.0-24")
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            await asyncio.to_thread(restore, etcd, saved)
            again = await node.acquire(V4, offer(1), NOTHING, Running(own, (held,)))
            assert again.key == own.key != "10.5.7.0-24"

    asyncio.run(scenario())


@pytest.mark.parametrize("emptied", [True, False], ids=["emptied", "restored"])
def test_a_new_history_is_told_and_not_written_to_before(start_etcd: Start, *, emptied: bool) -> None:
    etcd = start_etcd()

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab:
            await etcd_lab.put("10.5.2.0-24", encode_attrs(attrs(2)).encode())
            saved = await asyncio.to_thread(backup, etcd)
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: bool(u.seen))
                first = updates.seen[0]
                assert isinstance(first, Snapshot)
                assert not first.new_history
                if emptied:
                    await asyncio.to_thread(etcd.restart, forget=True)
                else:
                    await asyncio.to_thread(restore, etcd, saved)
                with pytest.raises(StoreError, match="history is another one") as caught:
                    await node.acquire(V4, offer(1), NOTHING, Running(own))
                assert caught.value.transient
                assert own.key not in await etcd_lab.records()
                await updates.until(lambda u: isinstance(u.seen[-1], Snapshot) and len(u.seen) > 1)
                told = updates.seen[-1]
                assert isinstance(told, Snapshot)
                assert told.new_history
                again = await node.acquire(V4, offer(1), NOTHING, Running(own))
                assert again.key == own.key
                # And the watch goes on in the new history.
                await etcd_lab.put("10.5.9.0-24", encode_attrs(attrs(9)).encode())
                await updates.until(lambda u: "10.5.9.0-24" in u.table)

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", [5, 6])
def test_a_listing_without_most_of_the_peers_is_read_twice(
    shared_etcd: EtcdProcess, prefix: str, lost: int
) -> None:
    async def scenario() -> None:
        async with Proxy(shared_etcd.port) as proxy, lab(shared_etcd.endpoint, prefix) as etcd_lab:
            for number in range(1, 11):
                await etcd_lab.put(f"10.5.{number}.0-24", encode_attrs(attrs(number)).encode())
            client = EtcdClient([proxy.endpoint])
            node = EtcdStore(client, prefix)
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.table) == 10 and len(u.seen) > 1)
                following = asyncio.create_task(updates.until(lambda u: len(u.table) == 10 - lost))
                # The deletions are compacted away while the watch is cut off: only a listing can tell.
                proxy.cut()
                for number in range(1, lost + 1):
                    await etcd_lab.delete(f"10.5.{number}.0-24")
                revision = (await etcd_lab.client.range(b"x")).header.revision
                await asyncio.to_thread(shared_etcd.ctl, "compact", str(revision))
                before = node.requests["range"]
                await proxy.heal()
                await following
                assert isinstance(updates.seen[-1], Snapshot)
                assert node.requests["range"] - before == (2 if lost > 5 else 1)
            await client.close()

    asyncio.run(scenario())


def test_a_start_that_is_given_up_in_the_middle_of_its_write_leaves_one_record(start_etcd: Start) -> None:
    """A daemon goes on from its memory after five seconds; what it asked for may take place all the same."""
    etcd = start_etcd()

    async def scenario() -> None:
        async with Proxy(etcd.port) as proxy, lab(etcd.endpoint) as etcd_lab:
            remembered = await etcd_lab.node().acquire(V4, offer(1), NOTHING)
            before = await etcd_lab.records()
            client = EtcdClient([proxy.endpoint])
            node = EtcdStore(client, "/net")
            await node.signature(remembered.key)  # connected
            proxy.latency = 0.2
            start = asyncio.create_task(node.acquire(V4, offer(1), NOTHING))
            async with asyncio.timeout(10):
                while await etcd_lab.records() == before:
                    pass
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            proxy.latency = 0.0
            assert await node.renew(remembered) is None, "the record was written once more"
            own = await node.acquire(V4, offer(1), NOTHING, Running(remembered))
            assert (own.key, own.attrs) == (remembered.key, remembered.attrs)
            assert set(await etcd_lab.records()) == {own.key}
            assert await node.renew(own) is not None
            await client.close()

    asyncio.run(scenario())


async def _fill(etcd_lab: EtcdLab) -> None:
    for number in range(100):
        await etcd_lab._write(f"filler{number}", bytes(200_000))


def test_a_renewal_that_is_due_while_etcd_is_out_of_space(start_etcd: Start) -> None:
    etcd = start_etcd([f"--quota-backend-bytes={4 << 20}"])

    async def scenario() -> None:
        async with lab(etcd.endpoint) as etcd_lab:
            node = etcd_lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            with pytest.raises(StoreError, match="space"):
                await _fill(etcd_lab)
            for _attempt in range(2):
                with pytest.raises(StoreError, match="compact and defragment etcd, then disarm its alarm"):
                    await node.renew(own)
            assert set(await etcd_lab.records()) == {own.key}
            for number in range(100):
                await etcd_lab._remove(f"filler{number}")
            revision = (await etcd_lab.client.range(b"x")).header.revision
            await asyncio.to_thread(etcd.ctl, "compact", str(revision))
            await asyncio.to_thread(etcd.ctl, "defrag")
            await asyncio.to_thread(etcd.ctl, "alarm", "disarm")
            renewed = await node.renew(own)
            assert renewed is not None
            assert renewed.key == own.key

    asyncio.run(scenario())
