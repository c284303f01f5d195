"""Takes secrets out of text that leaves the host: those that are known, and what looks like one. Pure."""

import re
from collections.abc import Iterable

HIDDEN = "***"
_SHORTEST = 4
"""A known secret with fewer characters is looked for as a whole word only."""
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_USER_INFO = re.compile(r"(?<=//)[^/@\s\"']+@")
_WORDS = r"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|credential|private[_-]?key|api[_-]?key|psk)"
_NAMED = re.compile(rf"""({_WORDS}["']?\s*[=:]\s*["']?)(?!\*\*\*)([^\s"',;&]+)""", re.IGNORECASE)
"""`FLANNELD_ETCD_PASSWORD=x`, `"token": "x"`; not what goes on, as in `--etcd-password-file=x`."""
_FLAG = re.compile(rf"(--?{_WORDS}\s+)(?!\*\*\*|-)(\S+)", re.IGNORECASE)
_HEADER = re.compile(r"(authorization\s*[:=]\s*(?:bearer|basic)?\s*)(\S+)", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)([\w.~+/-]{8,}=*)", re.IGNORECASE)
_JWT = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")


def scrub(text: str, known: Iterable[str] = ()) -> str:
    """The text without them."""
    for secret in sorted({one for one in known if one.strip()}, key=len, reverse=True):
        if len(secret) < _SHORTEST:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
        else:
            text = text.replace(secret, HIDDEN)
    text = _PEM.sub(f"(private key {HIDDEN})", text)
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    text = _HEADER.sub(rf"\g<1>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
    text = _JWT.sub(HIDDEN, text)
    text = _FLAG.sub(rf"\g<1>{HIDDEN}", text)
    return _NAMED.sub(rf"\g<1>{HIDDEN}", text)
