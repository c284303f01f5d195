"""When an X.509 certificate ends, which the standard library tells of trusted certificates only."""

import base64
import re
from datetime import UTC, datetime

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _INTEGER, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0x02, 0xA0, 0x17, 0x18


def first_in_pem(data: bytes) -> bytes:
    """The first certificate of a PEM file; ValueError if there is none."""
    found = _PEM.search(data)
    if found is None:
        raise ValueError("it holds no certificate")
    return base64.b64decode(found[1])


def end_of(certificate: bytes) -> float:
    """The end of its validity, seconds since 1970 (RFC 5280, 4.1.2.5). ValueError if it is none."""
    _kind, outer, _rest = _part(certificate)
    _kind, inner, _rest = _part(outer)
    kind, _content, rest = _part(inner)
    if kind == _VERSION:  # then the serial number
        kind, _content, rest = _part(rest)
    for _what in ("signature algorithm", "issuer"):
        kind, _content, rest = _part(rest)
    kind, validity, _rest = _part(rest)
    if kind != _SEQUENCE:
        raise ValueError("it has no validity")
    _kind, _start, rest = _part(validity)
    kind, end, _rest = _part(rest)
    text = end.decode("ascii")
    if kind == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif kind != _GENERALIZED_TIME:
        raise ValueError("its end is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _part(data: bytes) -> tuple[int, bytes, bytes]:
    """The first DER element: (its tag, its content, what follows)."""
    if len(data) < 2:
        raise ValueError("it is cut off")
    tag, length, start = data[0], data[1], 2
    if length & 0x80:
        width = length & 0x7F
        if not 1 <= width <= 4:
            raise ValueError("it is no DER")
        length, start = int.from_bytes(data[2 : 2 + width]), 2 + width
    if start + length > len(data):
        raise ValueError("it is cut off")
    return tag, data[start : start + length], data[start + length :]
