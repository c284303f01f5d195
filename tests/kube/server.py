"""A stand-in for kube-apiserver, as a process: nodes, pods and events over HTTPS.

    python -m tests.kube.server --address 127.0.0.1 --certificate C --key K [--client-ca CA] [--port 0]

It prints its port. What it models: one revision for all writes, a bounded history, lists (of a cache, exact,
in pages), watches with bookmarks and time limits, merge and strategic merge patches, subresources, tokens.
`POST /stand-in/...` does what goes wrong: see `Faults`. tests/kube/test_api.py runs on both.
"""

import argparse
import asyncio
import json
import ssl
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11

from tests.kube.model import Nodes, Object, RefusalError, expired, selected


class Faults:
    """What goes wrong. Each is set by `POST /stand-in/NAME` with JSON."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.tokens: list[str] | None = None
        """None: whoever asks."""
        self.answers: list[Object] = []
        """{"verb", "how": "status" | "html" | "hang" | "garbage", "code", "headers", "message", "count"}."""
        self.gone_by = "event"
        """How a watch is told that its revision is too old: "event" or "status"."""
        self.bookmark_seconds = 1.0
        self.silent = False
        """Watches stay open, and nothing comes."""
        self.cut = asyncio.Event()
        self.requests: Counter[str] = Counter()
        self.saved: tuple[int, dict[str, Object]] | None = None

    def set(self, name: str, value: Any) -> Any:
        getattr(self, f"_{name.replace('-', '_')}")(value)
        return {"revision": self.nodes.revision, "requests": dict(self.requests)}

    def _state(self, _value: Any) -> None:
        """Only look."""

    def _tokens(self, value: Any) -> None:
        self.tokens = value

    def _answers(self, value: Any) -> None:
        self.answers = value

    def _options(self, value: Any) -> None:
        for name, one in value.items():
            setattr(self, name, one)
        self.nodes.wake()

    def _compact(self, _value: Any) -> None:
        self.nodes.history.clear()
        self.nodes.compacted = self.nodes.revision

    def _skip(self, value: Any) -> None:
        """Other objects were written."""
        self.nodes.revision += value
        self.nodes.wake()

    def _cut(self, how: Any) -> None:
        """End all watches: "clean", or "mid" an event."""
        self.cut_how = how
        self.cut.set()
        self.cut = asyncio.Event()
        self.nodes.wake()

    def _save(self, _value: Any) -> None:
        self.saved = self.nodes.revision, dict(self.nodes.objects)

    def _restore(self, _value: Any) -> None:
        """Back to the backup."""
        assert self.saved is not None
        self.nodes.revision, self.nodes.objects = self.saved[0], dict(self.saved[1])
        self.nodes.history.clear()
        self._cut("clean")

    def _many(self, value: Any) -> None:
        """Nodes as a cluster has them, `count` of them with flannel's annotations."""
        for number in range(value["first"], value["first"] + value["count"]):
            self.nodes.create(big_node(number, value.get("padding", 5000)))

    def _heartbeats(self, value: Any) -> None:
        """Each node's status is written again, nothing else."""
        for name in list(self.nodes.objects)[:value]:
            now = datetime.fromtimestamp(self.nodes.revision, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            change = {
                "status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": now}]}
            }
            self.nodes.patch(name, change, part="status", strategic=True)

    def answer(self, verb: str) -> Object | None:
        for one in self.answers:
            if one["verb"] in (verb, "*") and one.get("count", 1) > 0:
                one["count"] = one.get("count", 1) - 1
                return one
        return None


def big_node(number: int, padding: int) -> Object:
    mac = f"02:00:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
    prefix = "flannel.alpha.coreos.com/"
    images = [
        {"names": [f"registry.example/image-{n}@sha256:{'0' * 64}"], "sizeBytes": n}
        for n in range(padding // 130)
    ]
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": f"big-{number:05}",
            "labels": {"kubernetes.io/os": "linux"},
            "annotations": {
                f"{prefix}kube-subnet-manager": "true",
                f"{prefix}backend-type": "vxlan",
                f"{prefix}backend-data": json.dumps({"VNI": 1, "VtepMAC": mac}, separators=(",", ":")),
                f"{prefix}public-ip": f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
            },
        },
        "spec": {"podCIDR": f"10.{128 + (number >> 8)}.{number & 255}.0/24"},
        "status": {"images": images, "conditions": []},
    }


def verb_of(method: str, path: str, query: dict[str, str]) -> str:
    if query.get("watch") in ("true", "1"):
        return "watch"
    verbs = {"GET": "get", "PATCH": "patch", "POST": "create", "DELETE": "delete"}
    return "list" if method == "GET" and path.endswith("/nodes") else verbs[method]


class Api:
    """All requests."""

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.faults = Faults(self.nodes)
        self.pods: dict[str, Object] = {}
        self.events: list[Object] = []

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = await self._request(http, reader)
                if request is None:
                    return
                await self._answer(http, writer, request, body)
                if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                    return
                http.start_next_cycle()
        except (ConnectionError, h11.ProtocolError, asyncio.IncompleteReadError, ssl.SSLError):
            return
        finally:
            writer.transport.abort()

    async def _request(self, http: Any, reader: asyncio.StreamReader) -> tuple[Any, bytes]:
        request, body = None, b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return request, body
            else:
                return None, b""

    async def _answer(self, http: Any, writer: asyncio.StreamWriter, request: Any, body: bytes) -> None:
        parts = urlsplit(request.target.decode())
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        query = dict(parse_qsl(parts.query))
        method = request.method.decode()
        send = Sender(http, writer)
        try:
            if parts.path.startswith("/stand-in/"):  # whoever asks
                await send.json(
                    200, self.faults.set(parts.path.removeprefix("/stand-in/"), json.loads(body or b"null"))
                )
                return
            verb = verb_of(method, parts.path, query)
            self.faults.requests[verb] += 1
            self._authenticate(headers)
            fault = self.faults.answer(verb)
            if fault is not None and await send.fault(fault):
                return
            if verb == "watch":
                await self._watch(send, query)
            else:
                code = 201 if verb == "create" else 200
                await send.json(
                    code, self._do(method, parts.path.strip("/").split("/"), query, headers, body)
                )
        except RefusalError as refusal:
            await send.json(refusal.code, refusal.status, refusal.headers)

    def _authenticate(self, headers: dict[str, str]) -> None:
        if self.faults.tokens is not None:
            token = headers.get("authorization", "").removeprefix("Bearer ")
            if token not in self.faults.tokens:
                raise RefusalError(401, "Unauthorized", "Unauthorized")

    def _do(  # noqa: C901
        self, method: str, path: list[str], query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Any:
        value: Any = json.loads(body) if body else None
        match method, path:
            case "GET", ["api", "v1", "nodes"]:
                return self.nodes.page(query)
            case "POST", ["api", "v1", "nodes"]:
                return self.nodes.create(value)
            case "GET", ["api", "v1", "nodes", name]:
                return self.nodes.get(name)
            case "DELETE", ["api", "v1", "nodes", name]:
                return self.nodes.delete(name)
            case "PATCH", ["api", "v1", "nodes", name, *part]:
                kind = headers.get("content-type", "")
                if kind not in ("application/strategic-merge-patch+json", "application/merge-patch+json"):
                    raise RefusalError(415, "UnsupportedMediaType", f"the body of the request was in {kind}")
                return self.nodes.patch(name, value, part="".join(part), strategic="strategic" in kind)
            case "POST", ["api", "v1", "namespaces", namespace, "pods"]:
                self.pods[f"{namespace}/{value['metadata']['name']}"] = value
                return value
            case "GET", ["api", "v1", "namespaces", namespace, "pods", name]:
                if f"{namespace}/{name}" not in self.pods:
                    raise RefusalError(404, "NotFound", f'pods "{name}" not found')
                return self.pods[f"{namespace}/{name}"]
            case "POST", ["api", "v1", "namespaces", namespace, "events"]:
                if value["involvedObject"].get("namespace", "default") != namespace:
                    raise RefusalError(
                        422, "Invalid", "involvedObject.namespace: does not match event.namespace"
                    )
                self.events.append(value)
                return value
            case "GET", ["api", "v1", "namespaces", _, "events"]:
                return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": self.events}
        raise RefusalError(404, "NotFound", "the server could not find the requested resource")

    async def _watch(self, send: "Sender", query: dict[str, str]) -> None:
        nodes, faults = self.nodes, self.faults
        position = int(query.get("resourceVersion") or 0)
        bookmarks = query.get("allowWatchBookmarks") == "true"
        too_old = expired(f"too old resource version: {position} ({nodes.compacted})")
        if 0 < position < nodes.compacted and faults.gone_by == "status":
            raise too_old
        await send.begin()
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds", 1800))
        next_bookmark = loop.time() + faults.bookmark_seconds
        cut = faults.cut
        while loop.time() < end:
            changed = nodes.changed
            if cut.is_set():
                if faults.cut_how == "mid":
                    await send.raw(b'{"type":"MODIFIED","object":{"metadata":{"na')
                    send.writer.transport.abort()
                    raise ConnectionError
                break
            if not faults.silent:
                if position < nodes.compacted:
                    await send.event("ERROR", too_old.status)
                    break
                for revision, kind, value in nodes.since(position):
                    if selected(value, query):
                        await send.event(kind, value)
                    position = max(position, revision)
                if bookmarks and loop.time() >= next_bookmark:
                    position = max(position, nodes.revision)
                    next_bookmark = loop.time() + faults.bookmark_seconds
                    mark = {
                        "kind": "Node",
                        "apiVersion": "v1",
                        "metadata": {"resourceVersion": str(position)},
                    }
                    await send.event("BOOKMARK", mark)
            left = min(end, next_bookmark if bookmarks and not faults.silent else end) - loop.time()
            try:
                async with asyncio.timeout(max(0.001, left)):
                    await changed.wait()
            except TimeoutError:
                continue
        await send.end()


class Sender:
    """Writes answers."""

    def __init__(self, http: Any, writer: asyncio.StreamWriter) -> None:
        self.http = http
        self.writer = writer

    async def json(self, code: int, value: Any, more: dict[str, str] | None = None) -> None:
        await self.whole(code, json.dumps(value, separators=(",", ":")).encode(), "application/json", more)

    async def whole(self, code: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *(more or {}).items()]
        self._put(h11.Response(status_code=code, headers=headers))
        self._put(h11.Data(data=body))
        self._put(h11.EndOfMessage())
        await self.writer.drain()

    async def begin(self) -> None:
        headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
        self._put(h11.Response(status_code=200, headers=headers))
        await self.writer.drain()

    async def event(self, kind: str, value: Any) -> None:
        await self.raw(json.dumps({"type": kind, "object": value}, separators=(",", ":")).encode() + b"\n")

    async def raw(self, data: bytes) -> None:
        self._put(h11.Data(data=data))
        await self.writer.drain()

    async def end(self) -> None:
        self._put(h11.EndOfMessage())
        await self.writer.drain()

    async def fault(self, fault: Object) -> bool:
        match fault["how"]:
            case "status":
                refusal = RefusalError(fault["code"], "Fault", fault.get("message", "a fault"))
                await self.json(fault["code"], refusal.status, fault.get("headers"))
            case "html":
                await self.whole(fault.get("code", 200), b"<html>Sign in</html>", "text/html")
            case "garbage":
                await self.whole(200, b'{"kind":"NodeList","metadata":{},"items":[{"meta', "application/json")
            case "hang":
                await asyncio.sleep(3600)
        return True

    def _put(self, event: Any) -> None:
        if self.writer.transport.is_closing():
            raise ConnectionError
        self.writer.write(self.http.send(event) or b"")


async def serve(options: argparse.Namespace, told: Callable[[int], None]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options.certificate, options.key)
    if options.client_ca:
        context.load_verify_locations(options.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    api = Api()
    server = await asyncio.start_server(api.connection, options.address, options.port, ssl=context)
    told(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    for name in ("certificate", "key"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--client-ca")

    def told(port: int) -> None:
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()

    asyncio.run(serve(parser.parse_args(), told))


if __name__ == "__main__":
    main()
