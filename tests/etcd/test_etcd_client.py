"""Connecting to etcd: which member, over TLS, with a password, and what is said when it does not work."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from flannelpy.errors import StoreError
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from flannelpy.store.etcd_endpoint import Tls
from flannelpy.store.etcd_files import Login
from tests.certificates import Authority, Issued
from tests.etcd.conftest import Start
from tests.etcd.proxy import Proxy
from tests.etcd.store_contract import NOTHING, V4, Updates, offer
from tests.etcd_process import EtcdProcess, free_port

pytestmark = pytest.mark.etcd


@contextlib.asynccontextmanager
async def client(
    *endpoints: str,
    tls: Tls | None = None,
    login: Login | None = None,
    call_timeout: float = 5.0,
    connect_timeout: float = 5.0,
) -> AsyncIterator[EtcdClient]:
    made = EtcdClient(endpoints, tls, login, call_timeout=call_timeout, connect_timeout=connect_timeout)
    try:
        yield made
    finally:
        await made.close()


def answer(*endpoints: str, tls: Tls | None = None, login: Login | None = None) -> str:
    """Empty if a Range works, else the error."""

    async def scenario() -> str:
        async with client(*endpoints, tls=tls, login=login) as etcd:
            try:
                await etcd.range(b"/x")
            except StoreError as error:
                return f"{'transient' if error.transient else 'permanent'}: {error}"
            return ""

    text = asyncio.run(scenario())
    assert len(text) < 400
    assert text.isprintable()
    return text


@pytest.fixture
def silent() -> Iterator[str]:
    """The endpoint of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


# --- members ---


def test_the_first_member_that_is_ready_serves(shared_etcd: EtcdProcess, silent: str) -> None:
    refused = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    assert answer(refused, silent, shared_etcd.endpoint) == ""
    assert time.monotonic() - start < 2


def test_each_unreachable_member_is_named_with_its_reason(silent: str) -> None:
    async def scenario() -> None:
        refused = f"http://127.0.0.1:{free_port()}"
        async with client(refused, silent, "unix:///nowhere/etcd.sock", connect_timeout=0.5) as etcd:
            with pytest.raises(StoreError) as raised:
                await etcd.range(b"/x")
            assert raised.value.transient
            assert f"{refused}: connection refused" in str(raised.value)
            assert f"{silent}: no answer within 0.5 s" in str(raised.value)
            assert "unix:///nowhere/etcd.sock: there is no such socket" in str(raised.value)

    asyncio.run(scenario())


def test_a_slow_handshake_is_waited_for(shared_etcd: EtcdProcess) -> None:
    async def scenario() -> None:
        async with Proxy(shared_etcd.port) as proxy, client(proxy.endpoint) as etcd:
            proxy.delay = 0.7
            await etcd.range(b"/x")

    asyncio.run(scenario())


def test_a_slow_network_is_waited_for_longer_and_longer(shared_etcd: EtcdProcess) -> None:
    """0.3 s in each direction are more than the 0.4 s that a connection, and a call, get at first."""

    async def scenario() -> None:
        async with (
            Proxy(shared_etcd.port) as proxy,
            client(proxy.endpoint, call_timeout=0.4, connect_timeout=0.4) as etcd,
        ):
            proxy.latency = 0.3
            reasons = []
            async with asyncio.timeout(20):
                while True:
                    try:
                        await etcd.range(b"/x")
                        break
                    except StoreError as error:
                        reasons.append(str(error))
            assert 0 < len(reasons) <= 4
            assert all("no answer" in reason for reason in reasons)
            proxy.latency = 0
            proxy.lose_everything()
            start = time.monotonic()
            await etcd.range(b"/x")
            assert time.monotonic() - start < 0.4 + 0.4, "as short as ever after an answer"

    asyncio.run(scenario())


def test_reads_move_to_another_member_when_one_is_lost(start_etcd: Start) -> None:
    servers = [start_etcd(), start_etcd()]

    async def scenario() -> None:
        # Two clusters that pretend to be one: the answers tell them apart.
        clusters = []
        for server in servers:
            async with client(server.endpoint) as direct:
                clusters.append((await direct.range(b"/x")).header.cluster_id)
        async with client(*(server.endpoint for server in servers), call_timeout=1) as etcd:
            current = clusters.index((await etcd.range(b"/x")).header.cluster_id)
            servers[current].pause()
            assert (await etcd.range(b"/x")).header.cluster_id == clusters[1 - current]

    asyncio.run(scenario())


def test_a_closed_client_says_so(shared_etcd: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(shared_etcd.endpoint) as etcd:
            watch = etcd.watch(b"/x")
            async with contextlib.aclosing(watch):
                assert (await anext(watch)).created
                waiting = asyncio.ensure_future(anext(watch))
                await asyncio.sleep(0)
                await etcd.close()
                with pytest.raises(StoreError):
                    await waiting
            with pytest.raises(StoreError, match="closed"):
                await etcd.range(b"/x")

    asyncio.run(scenario())


def test_a_watch_that_cannot_even_be_asked_for_is_given_up(
    shared_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a channel closes in the wrong moment, grpc.aio may leave a write waiting for ever."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("grpc.aio._call.StreamStreamCall.write", never)

    async def scenario() -> None:
        async with client(shared_etcd.endpoint, call_timeout=0.3) as etcd, asyncio.timeout(5):
            with pytest.raises(StoreError, match="no answer in time"):
                await anext(etcd.watch(b"/x"))

    asyncio.run(scenario())


def test_a_cancelled_watch_ends_at_once(shared_etcd: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(shared_etcd.endpoint) as etcd:
            updates = Updates(EtcdStore(etcd, "/nothing-here").watch())
            await updates.until(lambda u: len(u.seen) > 1)
            task = asyncio.create_task(updates.until(lambda u: False, 60))
            await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(1):
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(scenario())


# --- TLS ---


class _Tls(NamedTuple):
    good: EtcdProcess
    expired: EtcdProcess
    misnamed: EtcdProcess
    picky: EtcdProcess
    """Wants client certificates."""
    authority: Authority
    stranger: Authority
    client: Issued


@pytest.fixture(scope="session")
def tls(start_shared: Start, etcd_directory: Path) -> _Tls:
    authority = Authority(etcd_directory / "pki", "ca")

    def serve(issued: Issued, flags: Sequence[str] = ()) -> EtcdProcess:
        files = [f"--cert-file={issued.certificate}", f"--key-file={issued.key}"]
        return start_shared(flags=[*files, *flags], scheme="https")

    good = authority.issue("good")
    return _Tls(
        serve(good),
        serve(authority.issue("expired", expired=True)),
        serve(authority.issue("misnamed", address="127.0.0.9")),
        serve(good, ["--client-cert-auth", f"--trusted-ca-file={authority.file}"]),
        authority,
        Authority(etcd_directory / "strangers", "other-ca"),
        authority.issue("client"),
    )


def test_a_ca_alone_is_enough(tls: _Tls) -> None:
    assert answer(tls.good.endpoint, tls=Tls(tls.authority.file)) == ""


def test_without_a_ca_file_the_system_decides(tls: _Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not signed by a CA in" in answer(tls.good.endpoint)
    monkeypatch.setenv("SSL_CERT_FILE", tls.authority.file)
    assert answer(tls.good.endpoint) == ""


def test_a_client_certificate_is_shown(tls: _Tls) -> None:
    files = Tls(tls.authority.file, tls.client.certificate, tls.client.key)
    assert answer(tls.picky.endpoint, tls=files) == ""
    assert "client certificate" in answer(tls.picky.endpoint, tls=Tls(tls.authority.file))


def test_what_is_wrong_with_tls_is_said(tls: _Tls, shared_etcd: EtcdProcess) -> None:
    trusted = Tls(tls.authority.file)
    wrong_ca = answer(tls.good.endpoint, tls=Tls(tls.stranger.file))
    assert f"{tls.good.endpoint}: its certificate is not signed by a CA in {tls.stranger.file}" in wrong_ca
    assert "its certificate has expired" in answer(tls.expired.endpoint, tls=trusted)
    assert "its certificate is for another name or address" in answer(tls.misnamed.endpoint, tls=trusted)
    plain = shared_etcd.endpoint.replace("http:", "https:")
    assert "does it speak TLS?" in answer(plain, tls=trusted)
    assert "https://" in answer(tls.good.endpoint.replace("https:", "http:"))


def test_each_member_is_verified_by_itself(tls: _Tls, shared_etcd: EtcdProcess) -> None:
    """A bad certificate excludes its member; TLS and plaintext may be mixed."""
    trusted = Tls(tls.authority.file)
    assert answer(tls.misnamed.endpoint, tls.good.endpoint, tls=trusted) == ""
    assert answer(tls.misnamed.endpoint, shared_etcd.endpoint, tls=trusted) == ""


# --- passwords ---


PASSWORD = "correct horse"  # noqa: S105
MADE_UP = "made.up"


@pytest.fixture(scope="module")
def guarded(start_shared: Start) -> EtcdProcess:
    """An etcd with passwords: root, and node, who may only use /net/. Its tokens live for three seconds."""
    etcd = start_shared(flags=["--auth-token-ttl=3"])
    for command in (
        "user add root:root",
        "role add nodes",
        "role grant-permission nodes readwrite --prefix=true /net/",
        "user grant-role root root",
        "auth enable",
    ):
        etcd.ctl(*command.split())
    etcd.ctl_flags = ("--user=root:root",)
    etcd.ctl("user", "add", f"node:{PASSWORD}")
    etcd.ctl("user", "grant-role", "node", "nodes")
    return etcd


def test_a_user_of_the_prefix_can_do_all_that_a_node_does(guarded: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(guarded.endpoint, login=Login("node", PASSWORD)) as etcd:
            store = EtcdStore(etcd, "/net")
            own = await store.acquire(V4, offer(1), NOTHING)
            renewed = await store.renew(own)
            assert renewed is not None
            async with contextlib.aclosing(store.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: len(u.seen) > 1)
                assert etcd.requests["authenticate"] == 1
            assert await store.acquire(V4, offer(1), NOTHING) is not None
            assert f"{own.etcd_lease_id:016x}" not in guarded.ctl("lease", "list")

    asyncio.run(scenario())


def test_a_stale_token_is_replaced(guarded: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(guarded.endpoint, login=Login("node", PASSWORD)) as etcd:
            troubles: list[str | None] = []
            store = EtcdStore(etcd, "/net", on_trouble=troubles.append)
            await etcd.range(b"/net/config")
            etcd._token = MADE_UP
            await etcd.range(b"/net/config")
            assert etcd.requests["authenticate"] == 2
            etcd._token = MADE_UP
            put = pb.RequestOp(request_put=pb.PutRequest(key=b"/net/x", value=b"y"))
            assert (await etcd.txn([], [put])).succeeded
            assert etcd.requests["authenticate"] == 3
            async with contextlib.aclosing(store.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: bool(u.seen))
                etcd._token = MADE_UP
                await updates.until(lambda u: len(u.seen) > 1)
            assert etcd.requests["authenticate"] == 4
            assert troubles == []

    asyncio.run(scenario())


def test_what_is_wrong_with_the_password_is_said(guarded: EtcdProcess, shared_etcd: EtcdProcess) -> None:
    wrong = answer(guarded.endpoint, login=Login("node", "incorrect"))
    assert wrong.startswith(f"permanent: etcd at {guarded.endpoint}: wrong user name or password for 'node'")
    assert "incorrect" not in wrong
    assert "give --etcd-username" in answer(guarded.endpoint)
    denied = answer(guarded.endpoint, login=Login("node", PASSWORD))
    assert denied.startswith("permanent: ")
    assert "permission denied for user 'node'" in denied
    assert answer(shared_etcd.endpoint, login=Login("node", "unused")) == "", "no passwords there"


def test_a_refused_password_is_not_sent_again_and_again(guarded: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(guarded.endpoint, login=Login("node", "incorrect")) as etcd:
            for _ in range(5):
                with pytest.raises(StoreError, match="wrong user name"):
                    await etcd.range(b"/net/config")
            assert etcd.requests == {"authenticate": 1}

    asyncio.run(scenario())


def test_a_permanent_error_ends_the_first_read_of_the_config(guarded: EtcdProcess) -> None:
    async def scenario() -> None:
        async with client(guarded.endpoint, login=Login("node", "incorrect")) as etcd:
            with pytest.raises(StoreError, match="wrong user name"):
                await anext(EtcdStore(etcd, "/net").watch_config())

    asyncio.run(scenario())


def test_unreachable_is_no_error_for_a_watch(shared_etcd: EtcdProcess, prefix: str) -> None:
    async def scenario() -> None:
        troubles: asyncio.Queue[str | None] = asyncio.Queue()
        async with Proxy(shared_etcd.port) as proxy, client(proxy.endpoint) as etcd:
            proxy.cut()
            texts = EtcdStore(etcd, prefix, on_trouble=troubles.put_nowait).watch_config()
            async with contextlib.aclosing(texts), asyncio.timeout(10):
                waiting = asyncio.ensure_future(anext(texts))
                assert "connection refused" in str(await troubles.get())
                await proxy.heal()
                assert await waiting is None
            async with asyncio.timeout(5):
                assert await troubles.get() is None, "over, though nobody waits for more"

    asyncio.run(scenario())
