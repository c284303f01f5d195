"""Certificates and passwords that are replaced while a node runs."""

import asyncio
import contextlib
import datetime as dt
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flannelpy.errors import StoreError
from flannelpy.model.lease import Lease
from flannelpy.store.etcd import EtcdStore
from flannelpy.store.etcd_client import EtcdClient
from flannelpy.store.etcd_endpoint import Tls
from flannelpy.store.etcd_files import Kept, Login, read_password
from tests.certificates import Authority, Issued
from tests.etcd.conftest import Start
from tests.etcd.store_contract import NOTHING, V4, Updates, offer
from tests.etcd.test_renewal import backup, restore
from tests.etcd_process import EtcdProcess

pytestmark = pytest.mark.etcd


class Pki:
    """A server's files and a client's, at paths that stay while what they hold is renewed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = 0
        self.tls = Tls(str(folder / "ca.pem"), str(folder / "client.crt"), str(folder / "client.key"))
        self.flags = [
            f"--cert-file={folder / 'server.crt'}",
            f"--key-file={folder / 'server.key'}",
            f"--trusted-ca-file={folder / 'ca.pem'}",
            "--client-cert-auth",
        ]
        self.ctl_flags = (
            f"--cacert={folder / 'ca.pem'}",
            f"--cert={folder / 'etcdctl.crt'}",
            f"--key={folder / 'etcdctl.key'}",
        )
        self.renew()

    def start(self, start_etcd: Start) -> EtcdProcess:
        """An etcd that has them, and an etcdctl that may ask it."""
        etcd = start_etcd(self.flags, scheme="https")
        etcd.ctl_flags = self.ctl_flags
        return etcd

    def issue(self) -> tuple[str, Issued, Issued]:
        """(CA, server's, client's) of a new authority, beside the ones in use."""
        self._turn += 1
        authority = self._latest = Authority(self._folder / str(self._turn), "ca")
        return authority.file, authority.issue("server"), authority.issue("client")

    def renew_client(self, end: dt.datetime | None = None) -> None:
        """Another certificate for the client, as an agent would write it: the key first."""
        issued = self._latest.issue("client", end=end)
        for source, target in ((issued.key, self.tls.key_file), (issued.certificate, self.tls.cert_file)):
            shutil.copy(source, f"{target}.new")
            Path(f"{target}.new").replace(target)

    def spoil(self) -> None:
        """Half of a CA file, and an empty certificate."""
        Path(self.tls.ca_file).write_bytes(Path(self.tls.ca_file).read_bytes()[:200])
        Path(self.tls.cert_file).write_bytes(b"")

    def renew(self) -> None:
        """A new authority, and everything that it signs."""
        ca, server, client = self.issue()
        shutil.copy(ca, self.tls.ca_file)
        for issued, name in ((server, "server"), (client, "etcdctl"), (client, "client")):
            shutil.copy(issued.certificate, self._folder / f"{name}.crt")
            shutil.copy(issued.key, self._folder / f"{name}.key")


@contextlib.asynccontextmanager
async def watching(
    client: EtcdClient, on_trouble: Callable[[str | None], None] | None = None
) -> AsyncIterator[tuple[EtcdStore, Lease, Updates]]:
    """A node that has a lease and watches."""
    store = EtcdStore(client, "/net", on_trouble=on_trouble)
    try:
        own = await store.acquire(V4, offer(1), NOTHING)
        async with contextlib.aclosing(store.watch()) as source:
            updates = Updates(source)
            await updates.until(lambda u: len(u.seen) > 1)
            yield store, own, updates
    finally:
        await client.close()


def put_peer(etcd: EtcdProcess, number: int) -> None:
    etcd.ctl("put", f"/net/subnets/10.9.{number}.0-24", '{"PublicIP":"192.0.2.1","BackendType":"alloc"}')


def test_a_new_authority_needs_no_restart(
    start_etcd: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of it first: what worked goes on to be used, and that is said once."""
    caplog.set_level(logging.INFO, "flannelpy")
    pki = Pki(tmp_path)
    etcd = pki.start(start_etcd)

    async def scenario() -> None:
        async with watching(EtcdClient([etcd.endpoint], pki.tls)) as (store, own, updates):
            pki.spoil()
            await asyncio.to_thread(etcd.kill)
            following = asyncio.create_task(updates.until(lambda u: "10.9.2.0-24" in u.table, 20))
            for _ in range(3):
                with pytest.raises(StoreError):
                    await store.renew(own)
            complaints = [r.getMessage() for r in caplog.records if "going on with" in r.getMessage()]
            assert len(complaints) == 1
            assert "--etcd-cafile" in complaints[0]
            pki.renew()
            await asyncio.to_thread(etcd.start)
            await asyncio.to_thread(put_peer, etcd, 2)
            await following

    asyncio.run(scenario())
    assert any("read again" in record.getMessage() for record in caplog.records)


def test_a_certificate_whose_key_is_still_the_old_one_is_not_used(tmp_path: Path, start_etcd: Start) -> None:
    pki = Pki(tmp_path)
    etcd = pki.start(start_etcd)
    _, _, other = pki.issue()

    async def scenario() -> None:
        async with watching(EtcdClient([etcd.endpoint], pki.tls)) as (_, _, updates):
            shutil.copy(other.certificate, pki.tls.cert_file)
            following = asyncio.create_task(updates.until(lambda u: "10.9.2.0-24" in u.table, 20))
            await asyncio.to_thread(etcd.restart)
            await asyncio.to_thread(put_peer, etcd, 2)
            await following

    asyncio.run(scenario())


def test_a_client_certificate_that_ends_during_a_connection(
    start_etcd: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """etcd looks at it when a connection begins: the one that stands goes on, the next one needs another."""
    caplog.set_level(logging.INFO, "flannelpy")
    pki = Pki(tmp_path)
    etcd = pki.start(start_etcd)
    end = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(seconds=4)
    pki.renew_client(end)
    troubles: list[str | None] = []
    told = asyncio.Event()

    def tell(trouble: str | None) -> None:
        troubles.append(trouble)
        if trouble and "refuses our client certificate" in trouble:
            told.set()

    async def scenario() -> None:
        client = EtcdClient([etcd.endpoint], pki.tls)
        async with watching(client, tell) as (store, own, updates):
            await asyncio.sleep((end - dt.datetime.now(dt.UTC)).total_seconds() + 1.0)
            await asyncio.to_thread(put_peer, etcd, 2)
            await updates.until(lambda u: "10.9.2.0-24" in u.table)
            renewed = await store.renew(own)
            assert renewed is not None
            assert (troubles, client.requests["watch"]) == ([], 1)

            await asyncio.to_thread(etcd.restart)
            following = asyncio.create_task(updates.until(lambda u: "10.9.3.0-24" in u.table, 20))
            await told.wait()
            with pytest.raises(StoreError, match=f"{pki.tls.cert_file}, which ended at {end:%Y-%m-%dT%H:%M}"):
                await store.renew(renewed)
            assert not following.done()

            pki.renew_client()
            await asyncio.to_thread(put_peer, etcd, 3)
            await following
            assert await store.renew(renewed) is not None
            assert troubles[-1] is None

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert sum("read again after a change" in record.getMessage() for record in caplog.records) == 1


def guarded(start_etcd: Start, password: str, *flags: str) -> EtcdProcess:
    """An etcd that asks root and node for passwords."""
    etcd = start_etcd(flags)
    for command in ("user add root:root", "user grant-role root root", f"user add node:{password}",
                    "role add nodes", "role grant-permission nodes readwrite --prefix=true /net/",
                    "user grant-role node nodes", "auth enable"):  # fmt: skip
        etcd.ctl(*command.split())
    etcd.ctl_flags = ("--user=root:root",)
    return etcd


def test_a_new_password_needs_no_restart(
    start_etcd: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First etcd has the new one, then the file: empty, then whole."""
    etcd = guarded(start_etcd, "old")
    file = tmp_path / "password"
    file.write_text("old\n")

    async def scenario() -> None:
        client = EtcdClient([etcd.endpoint], None, Login("node", password_file=str(file)))
        async with watching(client) as (store, _, updates):
            await asyncio.to_thread(_change_password, etcd, "new")
            await asyncio.to_thread(put_peer, etcd, 2)
            await updates.until(lambda u: "10.9.2.0-24" in u.table)
            with pytest.raises(StoreError, match="check --etcd-username and --etcd-password-file"):
                await store.acquire(V4, offer(1), NOTHING)
            file.write_text("")
            with pytest.raises(StoreError, match="wrong user name"):
                await store.acquire(V4, offer(1), NOTHING)
            assert "holds no password" in caplog.text
            file.write_text("new\n")
            await store.acquire(V4, offer(1), NOTHING)
            assert client.requests["authenticate"] == 3
            await asyncio.to_thread(etcd.restart)
            await asyncio.to_thread(put_peer, etcd, 3)
            await updates.until(lambda u: "10.9.3.0-24" in u.table)

    asyncio.run(scenario())
    assert caplog.text.count("holds no password") == 1


def _change_password(etcd: EtcdProcess, password: str) -> None:
    etcd.ctl("user", "delete", "node")
    etcd.ctl("user", "add", f"node:{password}")
    etcd.ctl("user", "grant-role", "node", "nodes")


def signed_tokens(folder: Path, seconds: int) -> str:
    """The flag by which etcd signs its tokens, with a key made for it, instead of keeping a list of them."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = folder / "jwt.key", folder / "jwt.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return f"--auth-token=jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl={seconds}s"


@pytest.mark.parametrize("kind", ["simple", "jwt"])
def test_a_token_that_ran_out_is_replaced_and_a_watch_outlives_it(
    start_etcd: Start, tmp_path: Path, kind: str
) -> None:
    flag = "--auth-token-ttl=1" if kind == "simple" else signed_tokens(tmp_path, 1)
    etcd = guarded(start_etcd, "secret", flag)

    async def scenario() -> None:
        client = EtcdClient([etcd.endpoint], None, Login("node", "secret"))
        async with watching(client) as (store, own, updates):
            token = client._token
            # Nothing tells a client that its token has run out but a request, which would prolong it.
            await asyncio.sleep(3.5)
            await asyncio.to_thread(put_peer, etcd, 2)
            await updates.until(lambda u: "10.9.2.0-24" in u.table)
            assert await store.renew(own) is not None
            assert client._token != token
            assert client.requests["authenticate"] == 2
            assert client.requests["watch"] == 1

    asyncio.run(scenario())


def test_a_signed_token_outlives_a_restart_of_etcd(start_etcd: Start, tmp_path: Path) -> None:
    """But not a change of users or rights: etcd refuses the older ones then."""
    etcd = guarded(start_etcd, "secret", signed_tokens(tmp_path, 300))

    async def scenario() -> None:
        client = EtcdClient([etcd.endpoint], None, Login("node", "secret"))
        async with watching(client) as (store, own, updates):
            await asyncio.to_thread(etcd.restart)
            await asyncio.to_thread(put_peer, etcd, 2)
            await updates.until(lambda u: "10.9.2.0-24" in u.table)
            own = await store.renew(own) or own
            assert client.requests["authenticate"] == 1
            await asyncio.to_thread(etcd.ctl, "user", "add", "another:secret")
            assert await store.renew(own) is not None
            assert client.requests["authenticate"] == 2
            await asyncio.to_thread(put_peer, etcd, 3)
            await updates.until(lambda u: "10.9.3.0-24" in u.table)

    asyncio.run(scenario())


def test_a_token_of_a_lost_history_is_given_up(start_etcd: Start) -> None:
    """It ends with an index of the log that an etcd restored from a backup waits for, and never reaches."""
    etcd = guarded(start_etcd, "secret")

    async def scenario() -> None:
        client = EtcdClient([etcd.endpoint], None, Login("node", "secret"), call_timeout=1)
        async with watching(client) as (_, own, updates):
            saved = await asyncio.to_thread(backup, etcd)
            for number in range(2, 20):
                await asyncio.to_thread(put_peer, etcd, number)
            await updates.until(lambda u: len(u.table) == 19)
            client._token = None
            await client.range(b"/net/config")
            following = asyncio.create_task(updates.until(lambda u: list(u.table) == [own.key], 20))
            await asyncio.to_thread(restore, etcd, saved)
            await following

    asyncio.run(scenario())


def test_the_first_line_of_a_file_is_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    for content, password in ((b"a b\n", "a b"), (b" x", " x"), ("ü\r\nmore\n".encode(), "ü")):
        file.write_bytes(content)
        assert read_password(str(file)) == password
    for content, words in ((b"", "no password"), (b"\nx", "no password"), (b"\xff\n", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=words) as raised:
            read_password(str(file))
        assert str(file) in str(raised.value)
    with pytest.raises(StoreError, match="No such file"):
        read_password(str(tmp_path / "nowhere"))


def test_a_file_behind_a_link_is_read_again_when_the_link_moves(tmp_path: Path) -> None:
    """As Kubernetes and certbot replace files."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "link"
    link.symlink_to("one")
    kept = Kept([str(link)], lambda: read_password(str(link)))
    assert kept.current() == "one"
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").replace(link)
    assert kept.current() == "two"
    link.unlink()
    assert kept.current() == "two", "what works is kept"
