"""Endpoint URLs and PEM files: what is accepted, and which file or flag an error names."""

from pathlib import Path

import pytest

from flannelpy.errors import SettingsError, StoreError
from flannelpy.store.etcd_endpoint import Endpoint, Tls, parse_endpoint, read_pem
from tests.certificates import Authority


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("http://10.0.0.1:2379", Endpoint("http://10.0.0.1:2379", "ipv4:10.0.0.1:2379", secure=False)),
        ("https://10.0.0.1", Endpoint("https://10.0.0.1:2379", "ipv4:10.0.0.1:2379", secure=True)),
        ("10.0.0.1:4001", Endpoint("http://10.0.0.1:4001", "ipv4:10.0.0.1:4001", secure=False)),
        (" etcd-1.example ", Endpoint("http://etcd-1.example:2379", "dns:etcd-1.example:2379", secure=False)),
        ("https://[fd00::1]:99/", Endpoint("https://[fd00::1]:99", "ipv6:[fd00::1]:99", secure=True)),
        ("[::1]", Endpoint("http://[::1]:2379", "ipv6:[::1]:2379", secure=False)),
        ("unix:///run/etcd.sock", Endpoint("unix:///run/etcd.sock", "unix:/run/etcd.sock", secure=False)),
    ],
)
def test_endpoints(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "", "http://", "ftp://10.0.0.1", "http://10.0.0.1:0", "http://10.0.0.1:65536", "http://10.0.0.1:x",
        "http://10.0.0.1/path", "http://10.0.0.1?q", "http://[fd00::1", "http://[fd00::1]x", "fd00::1",
        "http://[10.0.0.1]", "unix://", "http://a b", "http://h\n:2379", "x" * 5000 + "/",
    ],
)  # fmt: skip
def test_unusable_endpoints(text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_endpoint(text)
    assert len(str(raised.value)) < 250
    assert str(raised.value).isprintable()


def test_a_password_in_an_endpoint_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError) as raised:
        parse_endpoint("http://root:secret@10.0.0.1")
    assert "secret" not in str(raised.value)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki", "ca")


def test_files_that_fit_are_read(authority: Authority) -> None:
    issued = authority.issue("a")
    pem = read_pem(Tls(authority.file, issued.certificate, issued.key))
    assert (pem.roots, pem.chain, pem.key) == tuple(
        Path(file).read_bytes() for file in (authority.file, issued.certificate, issued.key)
    )
    assert read_pem(Tls(authority.file)).chain is None


def test_an_error_names_the_file_and_the_flag(authority: Authority, tmp_path: Path) -> None:
    one, two = authority.issue("one"), authority.issue("two")
    text = tmp_path / "text"
    text.write_text("not PEM")
    cases = [
        (Tls("/nowhere/ca.pem"), ("/nowhere/ca.pem", "No such file", "--etcd-cafile")),
        (Tls(str(tmp_path)), (str(tmp_path), "directory")),
        (Tls(str(text)), (str(text), "CA certificates", "--etcd-cafile")),
        (Tls(authority.file, one.certificate, "/nowhere/key"), ("/nowhere/key", "--etcd-keyfile")),
        (Tls(authority.file, one.certificate, str(text)), (one.certificate, str(text))),
        (Tls(authority.file, one.certificate, two.key), (two.key, "does not belong", one.certificate)),
    ]
    for tls, parts in cases:
        with pytest.raises(StoreError) as raised:
            read_pem(tls)
        assert not raised.value.transient
        assert all(part in str(raised.value) for part in parts), str(raised.value)
    with pytest.raises(SettingsError, match="--etcd-certfile and --etcd-keyfile"):
        read_pem(Tls(cert_file=one.certificate))
