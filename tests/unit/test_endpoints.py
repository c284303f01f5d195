"""The HTTP edge: what is answered, and what strangers may do to it."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from flannelpy import endpoints
from flannelpy.endpoints import Answer, Pages, listen
from flannelpy.errors import FlannelpyError
from tests.etcd_process import free_port

PAGES: Pages = {"/healthz": lambda: Answer(200, b"flanneld is running"), "/no": lambda: Answer(503, b"no")}


def served(scenario: Callable[[int], Awaitable[None]]) -> None:
    async def run() -> None:
        port = free_port()
        async with asyncio.timeout(20), listen("127.0.0.1", port, PAGES):
            await scenario(port)

    asyncio.run(run())


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionError:  # closed with our bytes unread
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        (b"GET /healthz HTTP/1.1", 200, b"flanneld is running"),
        (b"POST /healthz HTTP/1.0", 200, b"flanneld is running"),
        (b"GET /healthz?verbose=1 HTTP/1.1", 200, b"flanneld is running"),
        (b"HEAD /healthz HTTP/1.1", 200, b""),
        (b"GET /no HTTP/1.1", 503, b"no"),
        (b"GET / HTTP/1.1", 404, b"404 page not found\n"),
        (b"GET /healthz/../no HTTP/1.1", 404, b"404 page not found\n"),
        (b"GET /healthz", 400, b"400 bad request\n"),
        (b"PRI * HTTP/2.0", 400, b"400 bad request\n"),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1", 400, b"400 bad request\n"),
        (b"\xff\xfe\x00 \x00 \x00", 400, b"400 bad request\n"),
    ],
)
def test_each_request_has_its_answer(request_line: bytes, status: int, body: bytes) -> None:
    async def scenario(port: int) -> None:
        head, _, found = (await ask(port, request_line + b"\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert found == body

    served(scenario)


def test_what_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a silent connection nor one line of a request after the other keeps a place for long."""
    monkeypatch.setattr(endpoints, "_SECONDS", 0.2)

    async def scenario(port: int) -> None:
        assert await ask(port, b"GET /healthz HTTP/1.1\r\n") == b""
        assert (await ask(port, b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 101)).startswith(b"HTTP/1.1 400")

    served(scenario)


def test_too_many_connections_at_a_time_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_CONNECTIONS", 3)

    async def scenario(port: int) -> None:
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _number in range(3)]
        assert await ask(port, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
        for _reader, writer in waiting:
            writer.close()
        while not (await ask(port, b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200"):
            pass

    served(scenario)


def test_noise_does_no_harm() -> None:
    async def scenario(port: int) -> None:
        random = Random(7)
        for _number in range(100):
            noise = random.choice([os.urandom, random.randbytes])(random.randrange(1, 3000))
            answer = await ask(port, noise + b"\r\n\r\n")
            assert answer[:12] in (b"HTTP/1.1 400", b"")
        assert (await ask(port, b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")

    served(scenario)


def test_an_address_that_cannot_be_used_is_named() -> None:
    async def scenario(host: str, port: int) -> None:
        async with listen(host, port, PAGES):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FlannelpyError, match=rf"127\.0\.0\.1, port {port}, .*choose another --healthz"):
            asyncio.run(scenario("127.0.0.1", port))
    with pytest.raises(FlannelpyError, match="cannot listen on no such host"):
        asyncio.run(scenario("no such host", free_port()))
