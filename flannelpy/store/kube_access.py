"""Where the API server is, and who we are for it: what a pod is told, or a kubeconfig.

Certificates and tokens are files that others replace while we run. Nobody tells us, so they are looked at
whenever a connection is made or a token is sent.
"""

import base64
import binascii
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

from flannelpy.errors import StoreError
from flannelpy.files import read_regular

_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_LARGEST = 1 << 20


class Server(NamedTuple):
    """One API server."""

    host: str
    port: int
    secure: bool
    path: str = ""
    """In front of /api, without a slash at its end."""
    name: str = ""
    """Whose certificate it must show; empty: the host's."""
    proxy: "Server | None" = None

    @property
    def url(self) -> str:
        """As text, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


class Blob(NamedTuple):
    """PEM from a file, or as it stands in a kubeconfig."""

    path: str = ""
    data: bytes = b""

    def read(self) -> bytes:
        """The PEM of now; StoreError."""
        return self.data or read_file(self.path)

    def __bool__(self) -> bool:
        return bool(self.path or self.data)


class Credentials(NamedTuple):
    """Who we are: any of these."""

    token: str = ""
    certificate: bytes = b""
    key: bytes = b""
    basic: str = ""
    """user:password"""


class Identity(Protocol):
    """Tells who we are."""

    async def current(self) -> Credentials:
        """The credentials of now; StoreError."""
        ...

    def reject(self) -> None:
        """The API server did not accept them: do not keep them."""
        ...


class Files:
    """Credentials that lie in files, read each time: a token is short, and changes every hour."""

    def __init__(
        self,
        token: str = "",
        token_file: str = "",
        certificate: Blob | None = None,
        key: Blob | None = None,
        basic: str = "",
    ) -> None:
        self._token = token
        self._token_file = token_file
        self._certificate = certificate or Blob()
        self._key = key or Blob()
        self._basic = basic

    async def current(self) -> Credentials:
        """See Identity."""
        token = self._token
        if self._token_file:
            token = read_file(self._token_file).decode("ascii", "replace").strip()
            if not token.isprintable() or " " in token or not token:
                raise StoreError(f"{self._token_file} holds no token", transient=True)
        pair = (self._certificate.read(), self._key.read()) if self._certificate else (b"", b"")
        return Credentials(token, *pair, self._basic)

    def reject(self) -> None:
        """Nothing is kept."""


class Access(NamedTuple):
    """All that is needed to ask."""

    server: Server
    ca: Blob
    """Empty: the system's."""
    insecure: bool
    identity: Identity
    place: str
    """Where this comes from, for messages."""


class TlsContexts:
    """Makes TLS contexts, and keeps the last one while nothing has changed: making one takes 5 ms."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._made: tuple[tuple[bytes, bytes, bytes], ssl.SSLContext] | None = None

    def current(self, credentials: Credentials) -> ssl.SSLContext:
        """For the next connection; StoreError."""
        access = self._access
        ca = access.ca.read() if access.ca else b""
        what = (ca, credentials.certificate, credentials.key)
        if self._made is None or self._made[0] != what:
            self._made = (what, self._make(*what))
        return self._made[1]

    def _make(self, ca: bytes, certificate: bytes, key: bytes) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cadata=ca.decode("ascii", "replace") if ca else None)
        except (ssl.SSLError, ValueError):
            what = self._access.ca.path or "certificate-authority-data"
            raise StoreError(f"{what}, named by {self._access.place}, holds no PEM certificate") from None
        if self._access.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate:
            _load_pair(context, certificate, key, self._access.place)
        return context


def _load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes, place: str) -> None:
    """The ssl module takes them from files only: from one that no disk ever has."""
    try:
        with os.fdopen(os.memfd_create("flannelpy"), "wb", buffering=0) as file:
            file.write(certificate + b"\n" + key)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", "") or getattr(error, "strerror", "")
        raise StoreError(
            f"the client certificate and key of {place} cannot be used: {reason}", transient=True
        ) from None


def in_cluster(environ: Mapping[str, str], folder: str = _SERVICE_ACCOUNT) -> Access:
    """What a pod is told; StoreError where this is no pod."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isascii() or not port.isdigit():
        raise StoreError(
            "where the Kubernetes API server is is not known: this is no pod (KUBERNETES_SERVICE_HOST and"
            " KUBERNETES_SERVICE_PORT are not set); give --kubeconfig-file or --kube-api-url"
        )
    server = Server(host, int(port), secure=True, proxy=None)
    identity = Files(token_file=f"{folder}/token")
    place = f"the service account in {folder}"
    return Access(server, Blob(f"{folder}/ca.crt"), insecure=False, identity=identity, place=place)


def by_url(url: str, environ: Mapping[str, str]) -> Access:
    """An API server that wants to know nothing of us."""
    server = server_of(url, "--kube-api-url")
    server = server._replace(proxy=proxy_for(server, environ))
    return Access(server, Blob(), insecure=False, identity=Files(), place="--kube-api-url")


def server_of(url: str, where: str) -> Server:
    """`https://host:6443/path` -> Server; StoreError names where it stands."""
    text = url if "://" in url else f"http://{url}"
    try:
        parts: SplitResult = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise StoreError(
            f"{where} is {ascii(url)[:80]}: it must be the URL of an API server, https://host:port"
        )
    secure = parts.scheme == "https"
    return Server(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"))


def proxy_for(server: Server, environ: Mapping[str, str]) -> Server | None:
    """HTTPS_PROXY or HTTP_PROXY, unless NO_PROXY names the host."""
    kind = "https_proxy" if server.secure else "http_proxy"
    url = environ.get(kind) or environ.get(kind.upper())
    if not url or server.host in ("localhost", "127.0.0.1", "::1"):
        return None
    for item in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(","):
        name = item.strip().lstrip(".").partition(":")[0]
        if item.strip() == "*" or (name and (server.host == name or server.host.endswith(f".{name}"))):
            return None
        if "/" in item and _is_inside(server.host, item.strip()):
            return None
    return server_of(url, kind.upper())


def _is_inside(host: str, block: str) -> bool:
    from flannelpy.model.address import parse_address, parse_prefix

    with suppress(ValueError):
        return parse_prefix(block).has(parse_address(host))
    return False


def read_file(path: str) -> bytes:
    """A small file; StoreError. It may be there later: secrets are mounted and replaced."""
    try:
        return read_regular(path, _LARGEST)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", transient=True) from None
    except ValueError as error:
        raise StoreError(f"cannot read {path}: {error}") from None


def decode_base64(text: str, where: str) -> bytes:
    """The `-data` fields of a kubeconfig; StoreError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise StoreError(f"{where} is not base64") from None
