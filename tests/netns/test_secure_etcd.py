"""Certificates, users and passwords, with a real etcd."""

import json
from collections.abc import Callable
from contextlib import suppress

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab
from flannelpy.cli.processes import LabError, run, stop, wait_ready, wait_until
from tests.certificates import Authority
from tests.netns.nodes import (
    V4,
    assert_fails,
    log_of,
    wait_for_log,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def secure_etcd(lab: Lab, authority: Authority, *, expired: bool = False) -> str:
    """An etcd in the underlay that speaks TLS only; its URL."""
    server = authority.issue("server", address="192.168.77.254", expired=expired)
    url = "https://192.168.77.254:2379"
    urls = [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
    files = [
        f"--data-dir={lab.folder / 'tls'}",
        f"--cert-file={server.certificate}",
        f"--key-file={server.key}",
    ]
    lab.start("etcd-tls", lab.underlay, ["etcd", *urls, *files])
    ctl = [
        "env",
        "ETCDCTL_API=3",
        "etcdctl",
        f"--endpoints={url}",
        "--insecure-skip-tls-verify",
        "--insecure-transport=false",
    ]

    def serves() -> bool:
        with suppress(LabError):
            run(*ctl, "put", f"{ETCD_PREFIX}/config", json.dumps(V4), netns=lab.underlay)
            return True
        return False

    wait_until(serves, "etcd with TLS")
    return url


def test_tls_with_just_a_ca(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    authority = Authority(lab.folder, "ca")
    url = secure_etcd(lab, authority)
    wait_ready(
        [
            lab.start_daemon(
                lab.add_node(), flags=[f"--etcd-endpoints={url}", f"--etcd-cafile={authority.file}"]
            )
        ]
    )


@pytest.mark.parametrize(("expired", "words"), [(False, "certificate"), (True, "expired")])
def test_a_certificate_that_cannot_be_trusted_is_said_and_waited_for(
    make_lab: Callable[..., Lab], expired: bool, words: str
) -> None:
    lab = make_lab()
    authority, stranger = Authority(lab.folder, "ca"), Authority(lab.folder, "stranger")
    url = secure_etcd(lab, authority, expired=expired)
    trusted = authority if expired else stranger
    daemon = lab.start_daemon(
        lab.add_node(), flags=[f"--etcd-endpoints={url}", f"--etcd-cafile={trusted.file}"]
    )
    wait_for_log(daemon, words)
    assert daemon.popen.poll() is None
    assert len(log_of(daemon).splitlines()) < 6, "said once"


def test_a_ca_file_that_cannot_be_read(lab: Lab) -> None:
    flags = ["--etcd-endpoints=https://192.168.77.254:2379", "--etcd-cafile=/nowhere/ca.pem"]
    daemon = lab.start_daemon(lab.add_node(), flags=flags)
    assert_fails(daemon, 6, "/nowhere/ca.pem")


def test_user_and_password(lab: Lab) -> None:
    lab.put_config(V4)
    for command in ("user add root:secret-1", "role add root", "user grant-role root root", "auth enable"):
        lab.etcdctl(*command.split())
    node = lab.add_node()
    wrong = lab.start_daemon(node, flags=["--etcd-username=root", "--etcd-password=secret-2"])
    assert_fails(wrong, 6, "password")
    assert "secret-2" not in log_of(wrong)
    file = lab.folder / "password"
    for flag in ("--etcd-password=secret-1", f"--etcd-password-file={file}"):
        file.write_text("secret-1\n")
        daemon = lab.start_daemon(node, flags=["--etcd-username=root", flag])
        wait_ready([daemon])
        assert "secret-1" not in log_of(daemon)
        stop([daemon])
