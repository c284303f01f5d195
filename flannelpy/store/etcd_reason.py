"""gRPC's and etcd's error texts condensed to one reason and, where there is one, the remedy. Pure.

gRPC packs a chain of wrappers, addresses and source lines into one string; a user needs its last link.
"""

import re

from flannelpy.store.retry import STOPPED_ANSWERING

_MAX = 160
_WRAPPERS = re.compile(r"^(rpc error: code = \w+ desc = )?((etcdserver|mvcc|auth): )?")

# (pattern in the text, what a user reads); the first match counts. `{ca}` is the CA file that decides.
_CONNECT = (
    ("Connection refused", "connection refused (is etcd running and listening there?)"),
    ("No such file or directory", "there is no such socket (is etcd running?)"),
    ("Domain name not found", "the name does not resolve (check the spelling and DNS)"),
    ("errors resolving", "the name cannot be resolved (check DNS)"),
    ("DNS resolution failed", "the name cannot be resolved (check DNS)"),
    ("No route to host", "no route to the host (check the network and firewalls)"),
    ("Network is unreachable", "the network is unreachable (check routes)"),
    ("certificate has expired", "its certificate has expired (renew it on the etcd server)"),
    ("certificate is not yet valid", "its certificate is not yet valid (check the clocks)"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by a CA in {ca} (check --etcd-cafile)"),
    ("unable to get local issuer", "its certificate is not signed by a CA in {ca} (check --etcd-cafile)"),
    ("verification check failed", "its certificate is for another name or address (use one that it names)"),
    ("is not in peer certificate", "its certificate is for another name or address (use one that it names)"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS (use http:// if that is wanted)"),
    ("CERTIFICATE_REQUIRED", "it wants a client certificate (give --etcd-certfile and --etcd-keyfile)"),
    ("ALERT_BAD_CERTIFICATE", "it refuses our client certificate (check --etcd-certfile)"),
    ("ALERT_CERTIFICATE_EXPIRED", "it calls our client certificate expired (renew it, check clocks)"),
    ("ALERT_UNKNOWN_CA", "it refuses our client certificate (check --etcd-certfile)"),
    ("Handshake", "the TLS handshake failed (does it speak TLS? if not, use http://)"),
)
_ABOUT_US = ("CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_EXPIRED")
_CLOSED = (
    "Socket closed",
    "Connection reset",
    "Broken pipe",
    "GOAWAY",
    "Stream removed",
    "recvmsg",
    "Connection closed",
)
_HUNG = ("ping timeout", "keepalive", "connection timed out")
"""The last one is TCP's: what gRPC has sent was not acknowledged for 5 s."""
_ENDED = "Internal error from Core"
"""What grpc.aio makes of a call that the server ends before our first message is sent."""
_CLOSED_TLS = "TSI_DATA_CORRUPTED"
_HINTS = {
    False: " (does it want https:// ?)",
    True: " (does it want a client certificate, or another one? check --etcd-certfile)",
}


def connect_reason(details: str, ca: str, *, secure: bool, ended: str = "") -> str:
    """Why an endpoint cannot be connected to, from gRPC's details of the failed connection.

    `ended` describes our client certificate if it is one that has ended: then that is why a server turns us
    away. With TLS 1.3 it does so without a word that gRPC would pass on, after the handshake.
    """
    if ended and any(pattern in details for pattern in (*_ABOUT_US, *_CLOSED, _CLOSED_TLS)):
        return f"it refuses our client certificate, {ended} (renew the file: it is read again by itself)"
    for pattern, reason in _CONNECT:
        if pattern.lower() in details.lower():
            return reason.format(ca=ca)
    if any(pattern in details for pattern in (*_CLOSED, _CLOSED_TLS)):
        return f"it closes the connection{_HINTS[secure]}"
    return bounded(details.rpartition("last error: ")[2])


def call_reason(code: str, details: str) -> str:
    """Why a call failed, from gRPC's status name ("UNAVAILABLE") and details."""
    if code == "DEADLINE_EXCEEDED" and not details.startswith("etcdserver"):
        return "no answer in time"
    if any(text in details.lower() for text in _HUNG):
        return STOPPED_ANSWERING
    if any(pattern in details for pattern in _CLOSED):
        return "connection lost"
    if details == _ENDED:
        return "it ended the call at once"
    return bounded(_WRAPPERS.sub("", details) or code.lower().replace("_", " "))


def bounded(text: str) -> str:
    """One printable line of at most 160 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: _MAX * 4]).split())
    return line if len(line) <= _MAX else line[: _MAX - 3] + "..."
