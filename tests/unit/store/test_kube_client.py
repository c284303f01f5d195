"""What needs no server: kubeconfig files, URLs, proxies, lists in pieces, refusals."""

import asyncio
import base64
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannelpy.errors import StoreError
from flannelpy.store.kube_access import by_url, in_cluster, server_of
from flannelpy.store.kube_client import ListReader, refusal
from flannelpy.store.kube_config import from_kubeconfig
from flannelpy.store.kube_connection import Head

YAML = """
current-context: a
contexts:
- name: a
  context: {cluster: c, user: u}
clusters:
- name: c
  cluster:
    server: https://[2001:db8::1]:6443/base/
    certificate-authority: ca.pem
    tls-server-name: kubernetes
    proxy-url: http://proxy.example:3128
users:
- name: u
  user: {token: abc}
"""


def kubeconfig(tmp_path: Path, text: str) -> str:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    return str(path)


def with_user(tmp_path: Path, user: Any) -> str:
    return kubeconfig(tmp_path, YAML.replace("{token: abc}", json.dumps(user)))


def test_a_kubeconfig(tmp_path: Path) -> None:
    access = from_kubeconfig(kubeconfig(tmp_path, YAML), "", {})
    server = access.server
    assert (server.host, server.port, server.secure, server.path) == ("2001:db8::1", 6443, True, "/base")
    assert server.name == "kubernetes"
    assert server.proxy is not None
    assert server.proxy.url == "http://proxy.example:3128"
    assert access.ca.path == str(tmp_path / "ca.pem")
    assert asyncio.run(access.identity.current()).token == "abc"  # noqa: S105


def test_the_url_flag_replaces_the_server(tmp_path: Path) -> None:
    access = from_kubeconfig(kubeconfig(tmp_path, YAML), "https://other:1", {})
    assert access.server.host == "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not YAML"),
        ("a: !!python/object/apply:os.system [true]", "not YAML"),
        ("[]", "not an object"),
        ("{}", "current-context"),
        (YAML.replace("cluster: c,", "cluster: d,"), "no cluster 'd'"),
        (YAML.replace("user: u}", "user: v}"), "no user 'v'"),
        (YAML.replace("https://[2001:db8::1]:6443/base/", "ftp://x"), "must be the URL of an API server"),
        (YAML.replace("{token: abc}", "{token: 5}"), "token"),
        (YAML.replace("{token: abc}", "{auth-provider: {name: gcp}}"), "use exec instead"),
        (YAML.replace("{token: abc}", "{client-certificate-data: '!'}"), "not base64"),
        (
            YAML.replace("{token: abc}", "{exec: {apiVersion: client.authentication.k8s.io/v1alpha1}}"),
            "v1beta1",
        ),
    ],
)
def test_broken_kubeconfigs_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(StoreError) as caught:
        from_kubeconfig(kubeconfig(tmp_path, text), "", {})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def plugin(tmp_path: Path, version: str, body: str) -> str:
    script = tmp_path / "plugin"
    script.write_text(f"#!{sys.executable}\nimport json, os, pathlib, sys\n{body}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return with_user(tmp_path, {"exec": {
        "apiVersion": f"client.authentication.k8s.io/{version}", "command": "./plugin", "args": ["x; false"],
        "env": [{"name": "WHO", "value": "me"}], "interactiveMode": "Never",
    }})  # fmt: skip


COUNTING = """
count = pathlib.Path(sys.argv[0] + ".count")
number = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (number + 1))
assert sys.argv[1] == "x; false" and os.environ["WHO"] == "me"
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
status = {"token": f"t{number}", "expirationTimestamp": EXPIRES}
print(json.dumps({"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": status}))
"""


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_an_exec_plugin_is_kept_until_it_expires_or_is_refused(tmp_path: Path, version: str) -> None:
    async def tokens(end: str) -> list[str]:
        path = plugin(tmp_path, version, COUNTING.replace("EXPIRES", repr(end)))
        identity = from_kubeconfig(path, "", {}).identity
        found = [(await identity.current()).token, (await identity.current()).token]
        identity.reject()
        return [*found, (await identity.current()).token]

    assert asyncio.run(tokens("2099-01-01T00:00:00Z")) == ["t0", "t0", "t1"]
    assert asyncio.run(tokens("2020-01-01T00:00:00Z")) == ["t2", "t3", "t4"]


ANSWER = "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'status': STATUS}))"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit('log in first')", "ended with 1: log in first"),
        ("print('hello')", "printed no ExecCredential"),
        (ANSWER.replace("STATUS", "{}"), "neither"),
        (ANSWER.replace("STATUS", "{'token': 'a\\nb'}"), "none"),
    ],
)
def test_exec_plugins_that_fail(tmp_path: Path, body: str, words: str) -> None:
    identity = from_kubeconfig(plugin(tmp_path, "v1", body), "", {}).identity
    with pytest.raises(StoreError, match=words):
        asyncio.run(identity.current())


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin",
                     "installHint": "install it"}}  # fmt: skip
    identity = from_kubeconfig(with_user(tmp_path, user), "", {}).identity
    with pytest.raises(StoreError, match=r"No such file.*install it"):
        asyncio.run(identity.current())


def test_in_a_pod(tmp_path: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    access = in_cluster(environ, str(tmp_path))
    assert access.server.url == "https://10.96.0.1:443"
    with pytest.raises(StoreError, match="cannot read"):
        asyncio.run(access.identity.current())
    for text in ("one", "two\n"):
        (tmp_path / "token").write_text(text)
        assert asyncio.run(access.identity.current()).token == text.strip()
    with pytest.raises(StoreError, match="this is no pod"):
        in_cluster({})


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("https://api.example", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("http://api.example", {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://api.example", {"https_proxy": "p:1", "NO_PROXY": ".example"}, None),
        ("https://api.example", {"https_proxy": "p:1", "NO_PROXY": "other, *"}, None),
        ("https://10.9.0.1", {"https_proxy": "p:1", "no_proxy": "10.0.0.0/8"}, None),
        ("https://11.9.0.1", {"https_proxy": "p:1", "no_proxy": "10.0.0.0/8,x"}, "http://p:1"),
    ],
)
def test_proxies(url: str, environ: dict[str, str], proxy: str | None) -> None:
    found = by_url(url, environ).server.proxy
    assert (found and found.url) == proxy


@pytest.mark.parametrize(
    "url", ["", "https://", "https://a:x", "https://a:99999", "https://u:p@a", "https://a/?b"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(StoreError, match="must be the URL"):
        server_of(url, "--kube-api-url")


items = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers(), max_size=3), max_size=5
)


@given(items, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_list_in_pieces(values: list[Any], sizes: list[int]) -> None:
    whole = {"kind": "NodeList", "metadata": {"resourceVersion": "5", "continue": "x"}, "items": values}
    data = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    reader, found = ListReader(), []
    position = 0
    while position < len(data):
        size = sizes[position % len(sizes)]
        found += list(reader.feed(data[position : position + size]))
        position += size
    assert found == json.loads(data)["items"]
    assert reader.page() == ("5", "x")


def test_an_empty_list() -> None:
    reader = ListReader()
    assert list(reader.feed(b'{"metadata":{"resourceVersion":"5"},"items":null}')) == []
    assert reader.page() == ("5", "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"items":[]}',
        b'{"metadata":{},"items":[{"a":1}',
        b'{"metadata":{},"items":[]',
        b'{"metadata":{},"items":[}',
        b'x"items":[]',
        b'{"metadata":{},"items":[' + b'{"a":' * 5000,
    ],
)
def test_lists_that_are_none(data: bytes) -> None:
    reader = ListReader()

    def read() -> None:
        for _one in reader.feed(data):
            continue
        reader.page()

    with pytest.raises(ValueError, match=r"."):
        read()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1000000000000"}, 0),
        ({"retry-after": "3600"}, 60),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "soon"}, 0),
        (
            {"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"},
            9,
        ),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    assert refusal("x", "list", Head(429, headers), {}).retry_after == seconds


def test_a_refusal_is_one_line() -> None:
    data = base64.b64encode(b"x" * 900).decode()
    error = refusal("https://a", "list", Head(403, {}), {"message": f"no\n{data}"})
    assert "apply the ClusterRole" in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 400
