"""The few requests of a node to the Kubernetes API: get and patch itself, list and watch all nodes.

Requests share one connection, each watch has its own. All errors are KubeError, in one line.
"""

import asyncio
import codecs
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from flannelpy import __version__
from flannelpy.errors import StoreError
from flannelpy.store.kube_access import Access, TlsContexts
from flannelpy.store.kube_connection import Connection, Head, basic, connect

NODES = "/api/v1/nodes"
_SECONDS = 15.0
"""Until the answer to a request begins; a list of thousands of nodes takes its time."""
_SILENCE_SECONDS = 30.0
"""Between two pieces of an answer."""
_WATCH_SILENCE_SECONDS = 100.0
"""An API server sends a bookmark about every minute; whoever sends none is asked again from where we are."""
_LARGEST = 8 << 20
"""Bytes of an object or a watch event; an API server takes objects of 1.5 MB at most."""
_RATE, _BURST = 5.0, 10
"""Requests a second, as client-go's."""
_LONGEST_WISH = 60.0
"""What a server may ask for by Retry-After."""
_BLANKS = " \t\r\n"


class KubeError(StoreError):
    """The API server said no (`status`), or nothing (0)."""

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message, transient=True)
        self.status = status
        self.retry_after = retry_after


class Page(NamedTuple):
    """What stands beside the items of a list."""

    revision: str
    more: str
    """The token for the next page; empty: this was the last."""


class KubeClient:
    """Owned by one store."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._contexts = TlsContexts(access)
        self._idle: Connection | None = None
        self._open: set[Connection] = set()
        self._tokens, self._filled = float(_BURST), 0.0
        self.requests: Counter[str] = Counter()
        """Verb -> how many were sent."""

    @property
    def place(self) -> str:
        """The API server, for messages."""
        return self._access.server.url

    async def close(self) -> None:
        """Let go of all connections."""
        connections = list(self._open)
        for connection in connections:
            self._drop(connection)
        for connection in connections:
            await connection.closed()

    async def get(self, path: str) -> Any:
        """An object."""
        return await self._call("get", "GET", path, b"", "")

    async def patch(self, path: str, change: Any) -> Any:
        """Change an object by a strategic merge patch -> the object as it is then."""
        body = json.dumps(change).encode()
        return await self._call("patch", "PATCH", path, body, "application/strategic-merge-patch+json")

    async def create(self, path: str, value: Any) -> Any:
        """A new object."""
        return await self._call("create", "POST", path, json.dumps(value).encode(), "application/json")

    async def list_page(self, query: Mapping[str, str], items: list[Any], read: Any) -> Page:
        """One page of nodes: `read(object)` of each is added to `items` as it comes in.

        Objects are dropped as soon as they are read: 5,000 nodes are 50 MB.
        """
        reader = ListReader()
        path = f"{NODES}?{urlencode(query)}"
        async with aclosing(self._stream("list", "GET", path, _SILENCE_SECONDS)) as chunks:
            try:
                async for chunk in chunks:
                    items.extend(read(one) for one in reader.feed(chunk))
                return reader.page()
            except ValueError as error:
                raise self._error(f"sends a list that cannot be read: {error}") from None

    async def watch(self, query: Mapping[str, str]) -> AsyncGenerator[list[Any], None]:
        """Events of nodes, those that come together as one list; first an empty one: the watch stands.

        Ends when the server ends it.
        """
        rest = b""
        path = f"{NODES}?{urlencode({'watch': 'true', **query})}"
        async with aclosing(self._stream("watch", "GET", path, _WATCH_SILENCE_SECONDS)) as chunks:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _LARGEST:
                    raise self._error(f"sends an event of more than {_LARGEST} bytes")
                try:
                    events = [json.loads(line) for line in lines if line.strip()]
                except (ValueError, RecursionError):
                    raise self._error("sends a watch event that is not JSON") from None
                if events or not chunk:
                    yield events
        if rest.strip():
            raise self._error("ended a watch in the middle of an event")

    # --- one request -------------------------------------------------------------------------------------

    async def _call(self, verb: str, method: str, path: str, body: bytes, kind: str) -> Any:
        parts = []
        size = 0
        async with aclosing(self._stream(verb, method, path, _SILENCE_SECONDS, body, kind)) as chunks:
            async for chunk in chunks:
                parts.append(chunk)
                size += len(chunk)
                if size > _LARGEST:
                    raise self._error(f"answers with more than {_LARGEST} bytes")
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise self._error("answers something that is not JSON") from None

    async def _stream(
        self, verb: str, method: str, path: str, silence: float, body: bytes = b"", kind: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """The body of a good answer as it comes. A 401 is met once with credentials read afresh."""
        await self._within_rate()
        for attempt in (1, 2):
            connection, head = await self._begin(verb, method, path, body, kind)
            try:
                if head.status == 401 and attempt == 1:
                    self._access.identity.reject()
                    continue
                if head.status // 100 != 2:
                    raise await self._refusal(verb, connection, head)
                if "json" not in head.headers.get("content-type", ""):
                    shown = ascii(head.headers.get("content-type", "nothing"))[:60]
                    raise self._error(
                        f"answers {shown} instead of JSON: is this the URL of an API server, or of something"
                        " before it?"
                    )
                try:
                    yield b""
                    async with aclosing(connection.body(silence)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                except KubeError:
                    raise
                except StoreError as error:
                    raise self._error(str(error)) from None
                self._give_back(connection)
                return
            finally:
                if connection is not self._idle:
                    self._drop(connection)

    async def _begin(
        self, verb: str, method: str, path: str, body: bytes, kind: str
    ) -> tuple[Connection, Head]:
        """Send it; an idle connection that the server has closed meanwhile is no failure."""
        access = self._access
        credentials = await access.identity.current()
        headers = [("Accept", "application/json"), ("User-Agent", f"flannelpy/{__version__}")]
        if kind:
            headers.append(("Content-Type", kind))
        if credentials.token:
            headers.append(("Authorization", f"Bearer {credentials.token}"))
        elif credentials.basic:
            headers.append(("Authorization", basic(credentials.basic)))
        idle, self._idle = self._idle, None
        self.requests[verb] += 1
        target = access.server.path + path
        if idle is not None and idle.reusable:
            try:
                return idle, await idle.send(method, target, headers, body, _SECONDS)
            except StoreError:
                self._drop(idle)
            except BaseException:
                self._drop(idle)
                raise
        elif idle is not None:
            self._drop(idle)
        context = self._contexts.current(credentials) if access.server.secure else None
        try:
            connection = await connect(access.server, context)
            self._open.add(connection)
            try:
                return connection, await connection.send(method, target, headers, body, _SECONDS)
            except BaseException:
                self._drop(connection)
                raise
        except StoreError as error:
            raise self._error(str(error)) from None

    def _give_back(self, connection: Connection) -> None:
        if self._idle is None and connection.reusable:
            self._idle = connection

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection is self._idle:
            self._idle = None
        connection.close()

    async def _within_rate(self) -> None:
        """Wait until a request is allowed: 5 a second, 10 at once."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._tokens = min(_BURST, self._tokens + (now - self._filled) * _RATE)
        self._filled = now
        self._tokens -= 1
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / _RATE)

    # --- errors ------------------------------------------------------------------------------------------

    async def _refusal(self, verb: str, connection: Connection, head: Head) -> KubeError:
        data = b""
        try:
            async with aclosing(connection.body(_SECONDS)) as chunks:
                async for chunk in chunks:
                    data += chunk
                    if len(data) > 1 << 16:
                        break
        except StoreError:
            pass
        status: Any = None
        if "json" in head.headers.get("content-type", ""):
            try:
                status = json.loads(data)
            except (ValueError, RecursionError):
                status = None
        return refusal(self.place, verb, head, status if isinstance(status, dict) else {})

    def _error(self, what: str) -> KubeError:
        return KubeError(f"the Kubernetes API server at {self.place}: {what}")


def refusal(place: str, verb: str, head: Head, status: Mapping[str, Any]) -> KubeError:
    """An answer that is no success, as one line."""
    said = status.get("message")
    said = f": {_bounded(said)}" if isinstance(said, str) and said else ""
    hints = {
        401: " (our token or certificate is not accepted: check the service account or kubeconfig)",
        403: " (our account may not do that: apply the ClusterRole of the manifest, and its binding)",
        429: " (it has too much to do; we wait)",
    }
    what = f"answers {head.status} to our {verb}{hints.get(head.status, '')}{said}"
    return KubeError(f"the Kubernetes API server at {place} {what}", head.status, _retry_after(head))


def _retry_after(head: Head) -> float:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    text = head.headers.get("retry-after", "").strip()
    if not text:
        return 0.0
    try:
        seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 10 else _until(text, head)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(_LONGEST_WISH, max(0.0, seconds))


def _until(text: str, head: Head) -> float:
    from email.utils import parsedate_to_datetime  # slow, and rare

    now = parsedate_to_datetime(head.headers.get("date", ""))
    return (parsedate_to_datetime(text) - now).total_seconds()


def _bounded(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:640]).split())
    return line if len(line) <= 200 else line[:197] + "..."


class ListReader:
    """The items of a JSON list as its text comes in; of the rest only what stands before them is kept.

    An API server writes `{"kind":..., "metadata":{...}, "items":[`, in this order.
    """

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder()
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""
        self._head: Any = None
        self._ended = False

    def feed(self, data: bytes) -> Iterator[Any]:
        """More of it -> the items that are complete by now; ValueError."""
        self._buffer += self._text.decode(data)
        if len(self._buffer) > _LARGEST:
            raise ValueError(f"an object has more than {_LARGEST} characters")
        if self._head is None and not self._find_items():
            return
        position = 0
        while not self._ended:
            while position < len(self._buffer) and self._buffer[position] in ", \t\r\n":
                position += 1
            if self._buffer[position : position + 1] == "]":
                self._ended = True
                position += 1
                break
            try:
                item, position = self._decoder.raw_decode(self._buffer, position)
            except RecursionError:
                raise ValueError("an object is nested too deep") from None
            except ValueError:
                break  # not all of it is here yet
            yield item
        self._buffer = self._buffer[position:]

    def _find_items(self) -> bool:
        place = self._buffer.find('"items":')
        if place < 0:
            return False
        start = self._buffer.find("[", place)
        if start < 0 or self._buffer[place + 8 : start].strip():
            return False
        try:
            self._head = json.loads(self._buffer[:place] + '"items":[]}')
        except (ValueError, RecursionError):
            raise ValueError("it does not begin as a list") from None
        self._buffer = self._buffer[start + 1 :]
        return True

    def page(self) -> Page:
        """What stood beside the items, once all of the text is in; ValueError if it is not complete."""
        if self._head is None:
            self._head = json.loads(self._buffer)
            self._ended = not self._head.get("items") if isinstance(self._head, dict) else False
            self._buffer = "}"
        if not self._ended or self._buffer.strip(_BLANKS) != "}":
            raise ValueError("it is cut off")
        metadata = self._head.get("metadata") if isinstance(self._head, dict) else None
        if not isinstance(metadata, dict):
            raise ValueError("it has no metadata")  # noqa: TRY004
        return Page(str(metadata.get("resourceVersion", "")), str(metadata.get("continue") or ""))


def node_path(name: str, part: str = "") -> str:
    """The path of a node, or of a subresource."""
    return f"{NODES}/{quote(name, safe='')}{part}"
