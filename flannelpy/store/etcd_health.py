"""What each member of etcd says over plain HTTP: how it is, and what time it has. Blocking.

etcd serves `/health` beside gRPC on its client port, without authentication; its answers carry the clock
(`Date:`). Its certificate is read without being trusted: whether it is, is for the real connection to say.
"""

import email.utils
import http.client
import json
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from flannelpy.store.certificate import end_of, first_in_pem
from flannelpy.store.etcd_endpoint import Tls, parse_endpoint

SECONDS = 3.0
_LARGEST = 65536
_MOST = 16


class Health(NamedTuple):
    """One member; see `flannelpy.doctor.facts.Member`."""

    endpoint: str
    trouble: str | None
    health: str | None = None
    clock_ahead: float | None = None
    expires: float | None = None


def ask_all(endpoints: Sequence[str], tls: Tls) -> list[Health]:
    """Every member, at the same time; within a few seconds. UNIX sockets have nothing to say."""
    asked = [one for one in map(parse_endpoint, endpoints) if not one.text.startswith("unix:")][:_MOST]
    if not asked:
        return []
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: _ask(one.text, one.target, tls if one.secure else None), asked))


def client_certificate_ends(tls: Tls) -> float | None:
    """When the client certificate ends, seconds since 1970; None if there is none, or it is not readable."""
    if not tls.cert_file:
        return None
    try:
        with open(tls.cert_file, "rb") as file:  # noqa: PTH123
            return end_of(first_in_pem(file.read(1 << 20)))
    except (OSError, ValueError):
        return None


def _ask(text: str, target: str, tls: Tls | None) -> Health:
    place = target.partition(":")[2].removeprefix("//")
    host, _, port = place.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=SECONDS)
    expires = None
    try:
        connection.connect()
        if tls is not None:
            expires = _secure(connection, tls)
        began = time.time()
        connection.request("GET", "/health")
        reply = connection.getresponse()
        body = reply.read(_LARGEST)
        ended = time.time()
    except ssl.SSLError as problem:
        return Health(text, f"TLS: {problem.reason or problem}", expires=expires)
    except (OSError, http.client.HTTPException) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        return Health(text, reason, expires=expires)
    finally:
        connection.close()
    return Health(text, None, _complaint(body), _ahead(reply.getheader("Date"), began, ended), expires)


def _secure(connection: http.client.HTTPConnection, tls: Tls) -> float | None:
    """Speak TLS on it; when the server's certificate ends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls.cert_file:
        with suppress(OSError, ssl.SSLError):
            context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")
    plain: socket.socket = connection.sock
    secured = context.wrap_socket(plain)
    connection.sock = secured
    with suppress(ValueError):
        return end_of(secured.getpeercert(binary_form=True) or b"")
    return None


def _complaint(body: bytes) -> str | None:
    """`{"health":"false","reason":"ALARM NOSPACE"}` -> the reason; None if it is well, or says nothing."""
    try:
        said = json.loads(body)
        if str(said.get("health", "true")).lower() != "false":
            return None
        return str(said.get("reason") or "it does not say why (an alarm, or no leader)")[:120]
    except (ValueError, AttributeError, RecursionError):
        return None


def _ahead(date: str | None, began: float, ended: float) -> float | None:
    """How far its clock is ahead: 0 as long as its second and our moment can be the same."""
    try:
        theirs = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    if theirs > ended:
        return theirs - ended
    return min(0.0, theirs + 1 - began)
