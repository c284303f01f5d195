"""What goes wrong between a node and its API server; each by the stand-in, over HTTPS."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flannelpy.errors import StoreError
from flannelpy.store import kube, kube_client
from flannelpy.store.kube import KubeStore
from flannelpy.store.kube_client import KubeClient, KubeError
from flannelpy.store.kube_codec import Families
from flannelpy.store.kube_config import from_kubeconfig
from tests.kube.api import StandIn
from tests.kube.following import MANY, filled, watching
from tests.kube.test_api import NOTHING, V4, Table, offer, run, store_of


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"how": "status", "code": 401}, "answers 401 to our get (our token or certificate is not accepted"),
        (
            {"how": "status", "code": 403, "message": "no\nrights"},
            "apply the ClusterRole of the manifest, and its binding): no rights",
        ),
        ({"how": "status", "code": 409}, "answers 409"),
        ({"how": "status", "code": 429, "headers": {"Retry-After": "3"}}, "too much to do"),
        ({"how": "status", "code": 500}, "answers 500"),
        ({"how": "html"}, "answers 'text/html' instead of JSON"),
        ({"how": "html", "code": 502}, "answers 502"),
        ({"how": "hang"}, "it stopped answering"),
    ],
)
def test_one_clear_line_for_each_trouble(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(kube_client, "_SECONDS", 0.5)
    stand_in.add_node("n1", ("10.244.1.0/24",))
    stand_in.do("answers", [{"verb": "*", "count": 2, **fault}])

    async def scenario() -> None:
        store = store_of(stand_in, "n1")
        with pytest.raises(KubeError) as caught:
            await store.acquire(V4, offer(1), NOTHING)
        assert caught.value.transient
        assert words in str(caught.value)
        assert stand_in.url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.retry_after == (3 if "headers" in fault else 0)
        stand_in.do("answers", [])
        assert (await store.acquire(V4, offer(1), NOTHING)).key == "n1"
        await store.close()

    run(scenario)


@pytest.mark.parametrize("verb", ["list", "watch"])
@pytest.mark.parametrize(
    "fault",
    [
        {"how": "status", "code": 429, "headers": {"Retry-After": "1"}},
        {"how": "status", "code": 500},
        {"how": "html"},
        {"how": "garbage"},
    ],
    ids=["429", "500", "html", "garbage"],
)
def test_a_watch_goes_on_after_trouble(stand_in: StandIn, verb: str, fault: dict[str, Any]) -> None:
    filled(stand_in)

    async def scenario() -> None:
        troubles: list[str | None] = []
        store = store_of(stand_in, "n1", troubles)
        if verb == "watch":
            await store.acquire(V4, offer(1), NOTHING)
        else:
            store._nodes.families = Families(ipv4=True, ipv6=False)
        stand_in.do("answers", [{"verb": verb, "count": 2, **fault}])
        began = time.monotonic()
        async with aclosing(store.watch()) as source:
            table = Table(source)
            await table.until(lambda t: len(t.leases) >= MANY)
            stand_in.delete_node("big-00003")
            await table.until(lambda t: "big-00003" not in t.leases)
        assert troubles[-1] is None
        assert any(troubles)
        if "headers" in fault:
            assert time.monotonic() - began > 2, "Retry-After, twice"
        await store.close()

    run(scenario)


def test_a_token_that_rotates(stand_in: StandIn, tmp_path: Path) -> None:
    filled(stand_in)
    token = tmp_path / "token"
    token.write_text("one")

    async def scenario() -> None:
        troubles: list[str | None] = []
        store = store_of(stand_in, "n1", troubles, tokenFile=str(token))
        stand_in.do("tokens", ["one"])
        own = await store.acquire(V4, offer(1), NOTHING)
        token.write_text("two")
        stand_in.do("tokens", ["two"])
        assert await store.renew(own) == own
        stand_in.do("tokens", ["three"])
        with pytest.raises(KubeError, match="401"):
            await store.renew(own)
        token.write_text("three")
        assert await store.renew(own) == own
        await store.close()

    run(scenario)


def test_an_api_server_that_is_stopped_is_not_stormed(stand_in: StandIn) -> None:
    filled(stand_in)

    async def scenario() -> None:
        troubles: list[str | None] = []
        async with watching(stand_in, troubles) as (store, source, _table):
            before = store._client.requests["watch"]
            stand_in.stop()
            pending = asyncio.ensure_future(anext(source))
            await asyncio.sleep(3)
            assert store._client.requests["watch"] - before <= 10
            assert troubles[-1] is not None
            assert "connection refused" in troubles[-1]
            pending.cancel()
            await asyncio.wait([pending])
        stand_in.start()

    run(scenario)


def test_the_node_of_a_pod(stand_in: StandIn) -> None:
    stand_in.add_node("n1", ("10.244.1.0/24",))
    pod = {"metadata": {"name": "p"}, "spec": {"nodeName": "n1"}}
    stand_in.call("POST", "/api/v1/namespaces/kube-flannel/pods", pod)

    async def scenario(environ: dict[str, str]) -> str:
        client = KubeClient(from_kubeconfig(stand_in.kubeconfig(), "", {}))
        store = KubeStore(client, environ, "flannel.alpha.coreos.com", "/none", set_condition=True)
        try:
            return (await store.acquire(V4, offer(1), NOTHING)).key
        finally:
            await store.close()

    found = asyncio.run(scenario({"POD_NAME": "p", "POD_NAMESPACE": "kube-flannel"}))
    assert found == "n1"
    for environ, words in (
        ({}, "set NODE_NAME"),
        ({"NODE_NAME": "../x"}, "must be the name of a Kubernetes node"),
        ({"POD_NAME": "p/../q", "POD_NAMESPACE": "kube-flannel"}, "must be the names"),
    ):
        with pytest.raises(StoreError, match=words) as caught:
            asyncio.run(scenario(environ))
        assert not caught.value.transient


def test_client_certificates_and_foreign_ones(tmp_path: Path) -> None:
    server = StandIn(tmp_path / "api", client_ca=True)
    try:
        pair = server.authority.issue("client")
        files = {"client-certificate": pair.certificate, "client-key": pair.key}

        async def call(**known: Any) -> Any:
            client = KubeClient(from_kubeconfig(server.kubeconfig(**known), "", {}))
            try:
                return await client.get("/api/v1/nodes")
            finally:
                await client.close()

        assert asyncio.run(call(user=files))["kind"] == "NodeList"
        with pytest.raises(KubeError, match=r"client certificate|closed|lost|reset"):
            asyncio.run(call(user={}))
        with pytest.raises(KubeError, match="its certificate is not accepted"):
            asyncio.run(call(user=files, **{"certificate-authority": None}))
        with pytest.raises(KubeError, match="its certificate is not accepted"):
            asyncio.run(call(user=files, **{"tls-server-name": "other.example"}))
    finally:
        server.stop()


def test_through_a_proxy(stand_in: StandIn) -> None:
    asked: list[bytes] = []
    ended = asyncio.Event()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split(b"\r\n")[0])
        there_in, there_out = await asyncio.open_connection("127.0.0.1", stand_in.port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
            finally:
                sink.close()
                await sink.wait_closed()

        await asyncio.gather(pump(reader, there_out), pump(there_in, writer), return_exceptions=True)
        ended.set()

    async def scenario() -> None:
        proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        cluster: dict[str, Any] = {"proxy-url": f"http://127.0.0.1:{port}"}
        path = stand_in.kubeconfig(**cluster)
        client = KubeClient(from_kubeconfig(path, "", {}))
        assert (await client.get("/api/v1/nodes"))["kind"] == "NodeList"
        await client.close()
        await ended.wait()
        proxy.close()
        await proxy.wait_closed()

    run(scenario)
    assert asked == [f"CONNECT 127.0.0.1:{stand_in.port} HTTP/1.1".encode()]


def test_requests_are_limited(stand_in: StandIn) -> None:
    async def scenario() -> float:
        client = KubeClient(from_kubeconfig(stand_in.kubeconfig(), "", {}))
        began = time.monotonic()
        for _number in range(15):
            await client.get("/api/v1/nodes")
        await client.close()
        return time.monotonic() - began

    assert asyncio.run(scenario()) > 0.9


def test_the_config_is_a_file(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of a link, as kubelet replaces the files of a ConfigMap."""
    monkeypatch.setattr("flannelpy.store.kube._LOOK_SECONDS", 0.01)
    link = tmp_path / "net-conf.json"

    async def scenario() -> None:
        client = KubeClient(from_kubeconfig(stand_in.kubeconfig(), "", {}))
        store = KubeStore(client, {}, "flannel.alpha.coreos.com", str(link), set_condition=True)
        async with asyncio.timeout(10), aclosing(store.watch_config()) as texts:
            assert await anext(texts) is None
            for number, text in enumerate(("one", "two")):
                (tmp_path / str(number)).write_text(text)
                (tmp_path / "new").symlink_to(tmp_path / str(number))
                (tmp_path / "new").rename(link)
                assert await anext(texts) == text
            link.unlink()
            assert await anext(texts) is None
        await store.close()

    run(scenario)


class Remembering(Random):
    """Remembers what was drawn; draws the least."""

    def __init__(self) -> None:
        super().__init__(1)
        self.asked: list[tuple[float, float]] = []

    def uniform(self, a: float, b: float) -> float:
        self.asked.append((a, b))
        return a


@pytest.mark.parametrize(("up_for", "is_spread"), [(20.0, True), (1e6, False)])
def test_machines_that_have_just_booted_do_not_all_list_at_once(
    stand_in: StandIn, up_for: float, *, is_spread: bool
) -> None:
    stand_in.add_node("n1", ("10.244.1.0/24",))
    random = Remembering()

    async def scenario() -> None:
        client = KubeClient(from_kubeconfig(stand_in.kubeconfig("kubeconfig-n1", None), "", {}))
        store = KubeStore(
            client,
            {"NODE_NAME": "n1"},
            "flannel.alpha.coreos.com",
            "/none",
            set_condition=True,
            random=random,
            up_for=lambda: up_for,
        )
        own = await store.acquire(V4, offer(1), NOTHING)
        assert str(own.subnet) == "10.244.1.0/24"
        await store.close()

    asyncio.run(scenario())
    assert ((0.0, kube._SPREAD_SECONDS) in random.asked) is is_spread
