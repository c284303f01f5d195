"""`/healthz`, `/readyz` and `/metrics` over HTTP/1: flannel's answers, and after them the reasons.

What is asked for comes from strangers: a request is bounded in size and time, and so are the connections. Any
method is answered alike, as flannel does; a connection serves one request.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from flannelpy.errors import FlannelpyError
from flannelpy.verdict import Verdict

_LONGEST_LINE = 4096
_MOST_LINES = 100
_SECONDS = 5.0
_CONNECTIONS = 64
"""At a time; more are closed at once."""

_TEXT = "text/plain; charset=utf-8"
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    body: bytes
    content_type: str = _TEXT


Pages = Mapping[str, Callable[[], Answer]]
"""Path -> what is answered now."""


def healthz(verdict: Verdict) -> Answer:
    """Whether the process works. 503 asks whoever watches it to start it anew."""
    if verdict.stuck is not None:
        return _text(503, f"flanneld is stuck\n{verdict.stuck}\n")
    return _text(200, "flanneld is running")


def readyz(verdict: Verdict) -> Answer:
    """Whether the node's pods are reached. Flannel's words, then a line for each thing that is wrong."""
    lines = [*verdict.faults, *verdict.flaws]
    if verdict.faults:
        first = "flanneld is not ready yet"
        return _text(503, "\n".join([first, *lines, ""]))
    return _text(200, "\n".join(["flanneld is ready", *lines, ""]) if lines else "flanneld is ready")


def _text(status: int, text: str) -> Answer:
    return Answer(status, text.encode("utf-8", "replace"))


@asynccontextmanager
async def listen(host: str, port: int, pages: Pages) -> AsyncIterator[None]:
    """Answer until the end of the block; FlannelpyError if the address cannot be used."""
    open_now = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        try:
            if open_now <= _CONNECTIONS:
                async with asyncio.timeout(_SECONDS):
                    await _serve(reader, writer, pages)
        except (OSError, TimeoutError):
            pass  # they left, or took too long
        finally:
            open_now -= 1
            writer.close()

    try:
        server = await asyncio.start_server(serve, host or None, port, limit=_LONGEST_LINE)
    except OSError as error:
        raise FlannelpyError(
            f"cannot listen on {host}, port {port}, for /healthz and /readyz: {error.strerror or error};"
            " choose another --healthz-ip or --healthz-port"
        ) from None
    try:
        yield
    finally:
        server.close()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Pages) -> None:
    method, path = await _read_request(reader)
    if not path:
        answer = Answer(400, b"400 bad request\n")
    elif path in pages:
        answer = pages[path]()
    else:
        answer = Answer(404, b"404 page not found\n")
    head = (
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\nContent-Type: {answer.content_type}\r\n"
        f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + (b"" if method == b"HEAD" else answer.body))
    await writer.drain()


async def _read_request(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """(method, path without its query); the path is empty if this is no HTTP/1 request."""
    try:
        words = (await reader.readline()).split()
        for _number in range(_MOST_LINES):
            if not (await reader.readline()).strip():
                break
        else:
            return b"", ""
    except ValueError:  # a line that is too long
        return b"", ""
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return b"", ""
    return words[0], words[1].partition(b"?")[0].decode("latin-1")
