"""kubeconfig files: cluster, user and context; users by token, certificate or an exec plugin.

A file is foreign, but an operator's: an exec plugin runs the program that it names, never through a shell.
The format: https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/
"""

import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from flannelpy.errors import StoreError
from flannelpy.store.kube_access import (
    Access,
    Blob,
    Credentials,
    Files,
    Identity,
    decode_base64,
    proxy_for,
    read_file,
    server_of,
)

_EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
_EXEC_SECONDS = 60.0
_EARLY_SECONDS = 30.0
"""So much before its end a credential is replaced."""
_MAX_OUTPUT = 1 << 20


def from_kubeconfig(path: str, url: str, environ: Mapping[str, str]) -> Access:
    """The current context of a kubeconfig; a `url` replaces its server. StoreError."""
    config = _Section(_parse(path), path)
    context_name = config.text("current-context")
    context = config.named("contexts", context_name, "context")
    cluster = config.named("clusters", context.text("cluster"), "cluster")
    user = config.named("users", context.text("user", needed=False), "user")
    server = server_of(url, "--kube-api-url") if url else server_of(cluster.text("server"), cluster.where)
    if not url or server.secure:
        server = server._replace(name=cluster.text("tls-server-name", needed=False))
    proxy_url = cluster.text("proxy-url", needed=False)
    proxy = server_of(proxy_url, f"proxy-url in {path}") if proxy_url else proxy_for(server, environ)
    return Access(
        server._replace(proxy=proxy),
        cluster.blob("certificate-authority"),
        insecure=cluster.value("insecure-skip-tls-verify") is True,
        identity=_identity(user),
        place=f"{path} (context {context_name})",
    )


def _parse(path: str) -> Any:
    text = read_file(path).decode("utf-8", "replace")
    try:
        return json.loads(text)  # every JSON file is YAML, too, and needs no library
    except ValueError:
        pass
    import yaml  # 15 ms

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise StoreError(f"{path} is not YAML{line}; check --kubeconfig-file") from None


class _Section:
    """An object of the file; errors name it."""

    def __init__(self, raw: Any, path: str, where: str = "") -> None:
        self.path = path
        self.where = f"{where} in {path}" if where else path
        if not isinstance(raw, dict):
            raise StoreError(f"{self.where} is not an object; check --kubeconfig-file")
        self._raw = raw

    def value(self, key: str) -> Any:
        return self._raw.get(key)

    def text(self, key: str, *, needed: bool = True) -> str:
        value = self._raw.get(key)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or (needed and not value):
            raise StoreError(f"{self.where} has no {key}, or it is no text; check --kubeconfig-file")
        return value

    def named(self, kind: str, name: str, key: str) -> "_Section":
        """One of a list of named objects; without a name an empty one."""
        if not name:
            return _Section({}, self.path, key)
        for one in self._raw.get(kind) or ():
            if isinstance(one, dict) and one.get("name") == name:
                return _Section(one.get(key) or {}, self.path, f"{key} {name}")
        raise StoreError(f"{self.path} has no {key} {ascii(name)[:64]}; check --kubeconfig-file")

    def blob(self, key: str) -> Blob:
        """PEM: as base64, or in a file whose path may be relative to this one's folder."""
        data = self.text(f"{key}-data", needed=False)
        if data:
            return Blob(data=decode_base64(data, f"{key}-data of {self.where}"))
        return Blob(path=self.file(key))

    def file(self, key: str) -> str:
        path = self.text(key, needed=False)
        return os.path.join(os.path.dirname(self.path), path) if path else ""  # noqa: PTH118, PTH120


def _identity(user: _Section) -> Identity:
    if user.value("exec") is not None:
        return ExecPlugin(_read_exec(_Section(user.value("exec"), user.path, f"exec of {user.where}")))
    if user.value("auth-provider") is not None:
        raise StoreError(f"{user.where} has an auth-provider, which Kubernetes gave up: use exec instead")
    name = user.text("username", needed=False)
    return Files(
        user.text("token", needed=False),
        user.file("tokenFile"),
        user.blob("client-certificate"),
        user.blob("client-key"),
        f"{name}:{user.text('password', needed=False)}" if name else "",
    )


class _Exec(NamedTuple):
    where: str
    version: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    hint: str


def _read_exec(raw: _Section) -> _Exec:
    version = raw.text("apiVersion")
    if version not in _EXEC_VERSIONS:
        raise StoreError(
            f"{raw.where} has apiVersion {version[:64]}: it must be {' or '.join(_EXEC_VERSIONS)}"
        )
    command = raw.text("command")
    if "/" in command:
        command = raw.file("command")
    arguments = raw.value("args") or []
    pairs = raw.value("env") or []
    if not isinstance(arguments, list) or not isinstance(pairs, list):
        raise StoreError(f"args and env of {raw.where} must be lists")
    environ = {str(one.get("name")): str(one.get("value")) for one in pairs if isinstance(one, dict)}
    hint = raw.text("installHint", needed=False)[:200]
    return _Exec(raw.where, version, (command, *map(str, arguments)), environ, hint)


class ExecPlugin:
    """Runs a program for credentials, and again before they expire or when they are not accepted."""

    def __init__(self, plugin: _Exec) -> None:
        self._plugin = plugin
        self._kept: Credentials | None = None
        self._expires: datetime | None = None

    async def current(self) -> Credentials:
        """See Identity."""
        if self._kept is not None and self._expires is not None:
            left = (self._expires - datetime.now(UTC)).total_seconds()
            if left < _EARLY_SECONDS:
                self._kept = None
        if self._kept is None:
            self._kept, self._expires = self._read(await self._run())
        return self._kept

    def reject(self) -> None:
        """See Identity."""
        self._kept = None

    async def _run(self) -> bytes:
        plugin = self._plugin
        info = {"apiVersion": plugin.version, "kind": "ExecCredential", "spec": {"interactive": False}}
        environ = {**os.environ, **plugin.environ, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *plugin.argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environ
            )
        except (OSError, ValueError) as error:
            hint = f"; {plugin.hint}" if plugin.hint else ""
            reason = getattr(error, "strerror", None) or str(error)
            raise self._error(f"cannot be run: {reason}{hint}") from None
        try:
            async with asyncio.timeout(_EXEC_SECONDS):
                output, complaint = await process.communicate()
        except TimeoutError:
            raise self._error(f"has not ended after {_EXEC_SECONDS:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
        if process.returncode != 0 or len(output) > _MAX_OUTPUT:
            last = (complaint.decode("utf-8", "replace").strip().splitlines() or [""])[-1][:200]
            raise self._error(f"ended with {process.returncode}: {last}")
        return output

    def _read(self, output: bytes) -> tuple[Credentials, datetime | None]:
        try:
            answer = json.loads(output)
            status = answer["status"]
            if answer.get("apiVersion") != self._plugin.version or not isinstance(status, dict):
                raise ValueError  # noqa: TRY301
            texts = [
                status.get(key) or ""
                for key in ("token", "clientCertificateData", "clientKeyData", "expirationTimestamp")
            ]
            token, certificate, key, end = (text.strip() for text in texts)
            expires = datetime.fromisoformat(end) if end else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._error(f"printed no ExecCredential of {self._plugin.version}") from None
        if not token and not (certificate and key):
            raise self._error("gave neither a token nor a certificate with its key")
        if not token.isprintable():
            raise self._error("gave a token that is none")
        if expires is not None and expires.tzinfo is None:
            expires = expires.replace(tzinfo=UTC)
        return Credentials(token, certificate.encode(), key.encode()), expires

    def _error(self, what: str) -> StoreError:
        return StoreError(f"the {self._plugin.where} {what}", transient=True)
