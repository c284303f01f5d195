"""The end of a certificate, read from its bytes."""

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509

from flannelpy.store.certificate import end_of, first_in_pem
from tests.certificates import Authority


@pytest.mark.parametrize("expired", [False, True])
def test_the_end_is_that_which_a_library_reads(tmp_path: Path, expired: bool) -> None:
    data = Path(Authority(tmp_path, "ca").issue("one", expired=expired).certificate).read_bytes()
    wanted = x509.load_pem_x509_certificate(data).not_valid_after_utc
    assert dt.datetime.fromtimestamp(end_of(first_in_pem(data)), dt.UTC) == wanted


def test_what_is_cut_off_or_no_certificate_is_refused(tmp_path: Path) -> None:
    whole = first_in_pem(Path(Authority(tmp_path, "ca").file).read_bytes())
    for length in range(len(whole) // 2):
        with pytest.raises(ValueError, match=r"."):
            end_of(whole[:length])
    for data in (b"", b"-----BEGIN CERTIFICATE-----"):
        with pytest.raises(ValueError, match="no certificate"):
            first_in_pem(data)
