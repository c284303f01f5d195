"""Secrets are taken out of text, whatever it is; what is none stays."""

import json

import pytest

from flannelpy.doctor.scrub import HIDDEN, scrub

SECRET = "s3cr3t-Value"  # noqa: S105  # planted


@pytest.mark.parametrize(
    "text",
    [
        f"FLANNELD_ETCD_PASSWORD={SECRET}",
        f'Environment="FLANNELD_ETCD_PASSWORD={SECRET}"',
        f"--etcd-password={SECRET} --v=1",
        f"--etcd-password {SECRET} --v=1",
        f'{{"password": "{SECRET}"}}',
        f"token: {SECRET}",
        f"AWS_SECRET={SECRET}",
        f"https://user:{SECRET}@etcd:2379/x",
        f"Authorization: Bearer {SECRET}",
        f"authorization=Basic {SECRET}",
        f"curl -H 'bearer {SECRET}'",
        f"-----BEGIN EC PRIVATE KEY-----\n{SECRET}\n-----END EC PRIVATE KEY-----\n",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
        f"wg psk={SECRET}",
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzM2NyM3QifQ." + SECRET,
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    done = scrub(text)
    assert SECRET not in done
    assert HIDDEN in done
    assert scrub(done) == done


@pytest.mark.parametrize(
    "text",
    [
        "no password in its first line; check --etcd-password-file",
        "--etcd-password-file=/etc/flannelpy/password",
        "10.5.1.0/24 via 10.5.1.0 dev flannel.1 proto 70 onlink",
        json.dumps({"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}),
        "https://etcd:2379,https://[fd00::1]:2379",
        "the key in /etc/key.pem does not belong to the certificate",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert scrub(text) == text


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    assert scrub("a hunter2x b", ["hunter2x"]) == f"a {HIDDEN} b"
    # A short one would take half of the words away.
    assert scrub("an x in next x", ["x"]) == f"an {HIDDEN} in next {HIDDEN}"
    assert scrub("anything", ["", " "]) == "anything"
