"""Where etcd is and how to trust it: endpoint URLs, and the PEM files of TLS. No gRPC here."""

import os
import socket
import ssl
from typing import NamedTuple

from flannelpy.errors import SettingsError, StoreError

DEFAULT_PORT = 2379
_MAX_FILE = 4 << 20

# The system's trust store as one file: Debian and Alpine, Fedora and RHEL (old, new), SUSE, others.
_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Endpoint(NamedTuple):
    """One member of etcd."""

    text: str
    """As the user knows it: `https://10.0.0.1:2379`."""
    target: str
    """As gRPC knows it: `ipv4:10.0.0.1:2379`, `ipv6:[::1]:2379`, `dns:etcd-1:2379`, `unix:/run/etcd.sock`."""
    secure: bool
    """Whether to speak TLS, verified by the name or address in `text`."""


class Tls(NamedTuple):
    """PEM files; an empty path means: not given."""

    ca_file: str = ""
    """Without it the system's trust store decides."""
    cert_file: str = ""
    key_file: str = ""


class Pem(NamedTuple):
    """What the files of `Tls` hold, as gRPC wants it; None = not given."""

    roots: bytes | None
    key: bytes | None
    chain: bytes | None


def parse_endpoint(text: str) -> Endpoint:
    """`http://`, `https://`, `unix://` or bare `host:port` (= http); port 2379 unless given.

    Raises SettingsError.
    """
    # By hand: urllib.parse costs 5 ms to import, before the node has its lease.
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "http", scheme
    if "@" in rest:
        raise SettingsError(
            "an etcd endpoint must not carry a user name or a password: "
            "use --etcd-username and --etcd-password"
        )
    if scheme == "unix" and rest:
        return Endpoint(f"unix://{rest}", f"unix:{rest}", secure=False)
    if scheme not in ("http", "https"):
        raise _unusable(text)
    shown, target = _address(rest.removesuffix("/"), text)
    return Endpoint(f"{scheme}://{shown}", target, scheme == "https")


def _address(rest: str, text: str) -> tuple[str, str]:
    """`host`, `host:port`, `[IPv6]`, `[IPv6]:port` -> (host and port for people, gRPC target)."""
    if rest.startswith("["):
        host, bracket, port_text = rest[1:].partition("]")
        if not bracket or (port_text and not port_text.startswith(":")):
            raise _unusable(text)
        port = _port(port_text[1:] if port_text else str(DEFAULT_PORT), text)
        if not _is_literal(socket.AF_INET6, host):
            raise _unusable(text)
        return f"[{host}]:{port}", f"ipv6:[{host}]:{port}"
    host, colon, port_text = rest.partition(":")
    port = _port(port_text if colon else str(DEFAULT_PORT), text)
    if _is_literal(socket.AF_INET, host):
        return f"{host}:{port}", f"ipv4:{host}:{port}"
    if not 0 < len(host) <= 253 or not host.isascii() or not all(c.isalnum() or c in "-._" for c in host):
        raise _unusable(text)
    return f"{host}:{port}", f"dns:{host}:{port}"


def _port(digits: str, text: str) -> int:
    if not digits.isascii() or not digits.isdigit() or len(digits) > 5 or not 0 < int(digits) < 65_536:
        raise _unusable(text)
    return int(digits)


def _is_literal(family: int, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except (OSError, ValueError):
        return False
    return True


def _unusable(text: str) -> SettingsError:
    return SettingsError(
        f"etcd endpoint {text[:100]!r} is not usable: "
        f"give http://host:2379, https://host:2379 or unix:///path"
    )


def read_pem(tls: Tls) -> Pem:
    """Read and check the files now, so that a reason can name the file. Raises StoreError, SettingsError."""
    pem = _read_pem(tls)
    # What was checked is what was read only if nobody has written in between.
    if _read_pem(tls) != pem:
        raise StoreError("the certificate files are being written; check that this comes to an end")
    return pem


def _read_pem(tls: Tls) -> Pem:
    if bool(tls.cert_file) != bool(tls.key_file):
        raise SettingsError(
            "a client certificate needs its key: give both --etcd-certfile and --etcd-keyfile, or neither"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca_file = tls.ca_file or system_roots()
    roots = _read(ca_file, "--etcd-cafile") if ca_file else None
    if roots is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (ssl.SSLError, ValueError):
            raise _no_pem(ca_file, "CA certificates", "--etcd-cafile") from None
    if not tls.cert_file:
        return Pem(roots, None, None)
    chain, key = _read(tls.cert_file, "--etcd-certfile"), _read(tls.key_file, "--etcd-keyfile")
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        if "MISMATCH" in str(error):
            raise StoreError(
                f"the key in {tls.key_file} does not belong to the certificate in {tls.cert_file}: "
                f"check --etcd-certfile and --etcd-keyfile"
            ) from None
        raise _no_pem(
            f"{tls.cert_file} or {tls.key_file}", "a certificate and its unencrypted key", "both files"
        ) from None
    return Pem(roots, key, chain)


def _read(path: str, flag: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (pathlib costs 10 ms to import)
            return file.read(_MAX_FILE)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check {flag}") from None


def _no_pem(path: str, content: str, flag: str) -> StoreError:
    return StoreError(f"{path} does not hold {content} in PEM form; check {flag}")


def system_roots() -> str:
    """The file with the CA certificates that this system trusts; empty = none found, gRPC's own list counts.

    Not gRPC's own list in the first place: operators add their CA to the system.
    """
    candidates = (os.environ.get(ssl.get_default_verify_paths().openssl_cafile_env, ""), *_SYSTEM_ROOTS)
    return next((path for path in candidates if path and os.path.isfile(path)), "")  # noqa: PTH113
