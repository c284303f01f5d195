"""HTTP/1.1 to the API server: one connection, one request after the other. h11 speaks the protocol."""

import asyncio
import base64
import socket
import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import NamedTuple

import h11

from flannelpy.errors import StoreError
from flannelpy.store.kube_access import Server
from flannelpy.store.retry import STOPPED_ANSWERING

Headers = Sequence[tuple[str, str]]

_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 16
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000))
"""A peer that is gone without a word is noticed within 25 s."""


class Head(NamedTuple):
    """The beginning of an answer."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""


class Connection:
    """One connection. Raises StoreError(transient=True) with one reason for all that goes wrong on it."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)

    @property
    def reusable(self) -> bool:
        """Whether another request can follow."""
        return self._http.our_state is h11.IDLE and not self._reader.at_eof()

    async def send(self, method: str, target: str, headers: Headers, body: bytes, seconds: float) -> Head:
        """Send a request -> the beginning of its answer."""
        host = f"[{self._server.host}]" if ":" in self._server.host else self._server.host
        all_headers = [("Host", f"{host}:{self._server.port}"), *headers]
        if body:
            all_headers.append(("Content-Length", str(len(body))))
        request = h11.Request(method=method, target=target, headers=all_headers)
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(self._http.send(request) or b"")
                if body:
                    self._writer.write(self._http.send(h11.Data(data=body)) or b"")
                self._writer.write(self._http.send(h11.EndOfMessage()) or b"")
                await self._writer.drain()
                event = await self._event()
                while isinstance(event, h11.InformationalResponse):
                    event = await self._event()
        except TimeoutError:
            raise _lost(STOPPED_ANSWERING) from None
        except (OSError, h11.ProtocolError, ssl.SSLError) as error:
            raise _lost(reason_of(error)) from None
        if not isinstance(event, h11.Response):
            raise _lost("it closed the connection without an answer")
        return Head(
            event.status_code, {n.decode("latin-1").lower(): v.decode("latin-1") for n, v in event.headers}
        )

    async def body(self, seconds: float) -> AsyncGenerator[bytes, None]:
        """The rest of the answer as it comes; `seconds` of silence are an error."""
        while True:
            try:
                async with asyncio.timeout(seconds):
                    event = await self._event()
            except TimeoutError:
                raise _lost(STOPPED_ANSWERING) from None
            except (OSError, h11.ProtocolError, ssl.SSLError) as error:
                raise _lost(reason_of(error)) from None
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                if self._http.their_state is h11.DONE and self._http.our_state is h11.DONE:
                    self._http.start_next_cycle()
                return
            else:
                raise _lost("the connection ended in the middle of an answer")

    async def _event(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._reader.read(_CHUNK))

    def close(self) -> None:
        """Let go, without a word."""
        self._writer.transport.abort()

    async def closed(self) -> None:
        """Wait until nothing of it is left."""
        with suppress(OSError):
            await self._writer.wait_closed()


async def connect(server: Server, context: ssl.SSLContext | None) -> Connection:
    """A connection, through the proxy if there is one. StoreError."""
    proxy = server.proxy
    first = proxy or server
    first_context = ssl.create_default_context() if proxy and proxy.secure else None if proxy else context
    via = f" through the proxy {proxy.url}" if proxy else ""
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                first.host,
                first.port,
                ssl=first_context,
                server_hostname=(first.name or first.host) if first_context else None,
                limit=_CHUNK * 4,
            )
            try:
                _keep_alive(writer.get_extra_info("socket"))
                if proxy:
                    await _tunnel(proxy, server, reader, writer)
                    if context:
                        await writer.start_tls(context, server_hostname=server.name or server.host)
            except BaseException:
                writer.transport.abort()
                raise
    except TimeoutError:
        raise _lost(f"no answer in {_CONNECT_SECONDS:g} s{via}") from None
    except (OSError, ssl.SSLError, h11.ProtocolError) as error:
        raise _lost(reason_of(error) + via) from None
    return Connection(server, reader, writer)


async def _tunnel(
    proxy: Server, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    host = f"[{server.host}]" if ":" in server.host else server.host
    http = h11.Connection(h11.CLIENT)
    target = f"{host}:{server.port}"
    writer.write(http.send(h11.Request(method="CONNECT", target=target, headers=[("Host", target)])) or b"")
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            if event.status_code // 100 != 2:
                raise ConnectionError(f"the proxy {proxy.url} answers {event.status_code}")
            return
        elif not isinstance(event, h11.InformationalResponse):
            raise ConnectionError(f"the proxy {proxy.url} closed the connection")


def _keep_alive(found: socket.socket) -> None:
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _lost(reason: str) -> StoreError:
    return StoreError(reason, transient=True)


def reason_of(error: Exception) -> str:
    """One reason, and the remedy where there is one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message} (check the CA, and the name in the URL)"
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"TLS failed: {reason} (does it speak TLS? does it want another client certificate?)"
    if isinstance(error, socket.gaierror):
        return f"its name does not resolve: {error.strerror}"
    if isinstance(error, h11.ProtocolError) and "ConnectionClosed" in str(error):
        return "it closed the connection without an answer (does it want a client certificate?)"
    if isinstance(error, h11.ProtocolError):
        return f"it does not speak HTTP/1.1: {str(error)[:80]}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused (is it running and listening there?)"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)[:160]


def basic(text: str) -> str:
    """The header's value for user:password."""
    return "Basic " + base64.b64encode(text.encode()).decode()
