"""What the stand-in for kube-apiserver keeps: nodes, their revisions and history, lists in pages, patches."""

import asyncio
import base64
from collections import deque
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

Object = dict[str, Any]
_HISTORY = 10_000


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.code = code
        self.headers: dict[str, str] = more.pop("headers", {})
        self.status = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code, **more,
        }  # fmt: skip


def expired(message: str) -> RefusalError:
    return RefusalError(410, "Expired", message)


class Nodes:
    """All nodes, and what happened to them."""

    def __init__(self) -> None:
        self.revision = 100
        self.compacted = 0
        """What happened up to this revision is forgotten."""
        self.objects: dict[str, Object] = {}
        self.history: deque[tuple[int, str, Object]] = deque()
        self.changed = asyncio.Event()
        self._pages: dict[str, tuple[int, list[Object]]] = {}

    def note(self, kind: str, value: Object) -> Object:
        """Write it -> the object as it is then. What was written before is never changed."""
        self.revision += 1
        value = {**value, "metadata": {**value["metadata"], "resourceVersion": str(self.revision)}}
        self.history.append((self.revision, kind, value))
        while len(self.history) > _HISTORY:
            self.compacted = self.history.popleft()[0]
        self.wake()
        return value

    def since(self, revision: int) -> list[tuple[int, str, Object]]:
        """What happened after a revision; watchers are nearly always near the end."""
        found = list(takewhile(lambda one: one[0] > revision, reversed(self.history)))
        return found[::-1]

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def get(self, name: str) -> Object:
        if name not in self.objects:
            raise RefusalError(404, "NotFound", f'nodes "{name}" not found')
        return self.objects[name]

    def create(self, value: Object) -> Object:
        name = value["metadata"]["name"]
        if name in self.objects:
            raise RefusalError(409, "AlreadyExists", f'nodes "{name}" already exists')
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        value["metadata"] |= {"creationTimestamp": now, "uid": f"uid-{self.revision}"}
        value.setdefault("spec", {})
        value.setdefault("status", {})
        self.objects[name] = self.note("ADDED", value)
        return self.objects[name]

    def delete(self, name: str) -> Object:
        value = self.get(name)
        del self.objects[name]
        return self.note("DELETED", value)

    def patch(self, name: str, change: Object, *, part: str, strategic: bool) -> Object:
        before = self.get(name)
        metadata = dict(change.get("metadata") or {})
        wanted = metadata.pop("resourceVersion", None)
        if wanted not in (None, before["metadata"]["resourceVersion"]):
            raise RefusalError(409, "Conflict", f'Operation cannot be fulfilled on nodes "{name}"')
        change = {**change, "metadata": metadata}
        change.pop("spec" if part == "status" else "status", None)
        after: Object = merge(before, change, strategic=strategic)
        cidr = before["spec"].get("podCIDR")
        if cidr and after["spec"].get("podCIDR") != cidr:
            raise RefusalError(
                422, "Invalid", f'Node "{name}" is invalid: spec.podCIDR: Forbidden: may not be changed'
            )
        if after != before:
            self.objects[name] = self.note("MODIFIED", after)
        return self.objects[name]

    def page(self, query: dict[str, str]) -> Object:
        limit = int(query.get("limit", 0))
        token, revision = query.get("continue", ""), query.get("resourceVersion", "")
        if token:
            known = self._pages.pop(token, None)
            if known is None or known[0] < self.compacted:
                raise expired(
                    "The provided continue parameter is too old to display a consistent list result"
                )
            at, objects = known
        else:
            if revision not in ("", "0") and int(revision) > self.revision:
                causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
                message = f"Too large resource version: {revision}, current: {self.revision}"
                raise RefusalError(
                    504, "Timeout", message, details={"causes": causes, "retryAfterSeconds": 1}
                )
            at, objects = self.revision, [self.objects[name] for name in sorted(self.objects)]
            objects = [one for one in objects if selected(one, query)]
        metadata: Object = {"resourceVersion": str(at)}
        if limit and len(objects) > limit and not (revision and not token):  # a cache does not page
            rest = objects[limit:]
            objects = objects[:limit]
            token = base64.urlsafe_b64encode(f"{at}:{len(rest)}:{len(self._pages)}".encode()).decode()
            self._pages[token] = at, rest
            metadata |= {"continue": token, "remainingItemCount": len(rest)}
        return {"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": objects}


def selected(value: Object, query: dict[str, str]) -> bool:
    selector = query.get("fieldSelector", "")
    return not selector or selector == f"metadata.name={value['metadata']['name']}"


def merge(before: Any, change: Any, *, strategic: bool, key: str = "") -> Any:
    """RFC 7396; a strategic one merges conditions by their type."""
    if strategic and key == "conditions":
        found = {one["type"]: one for one in before or []}
        for one in change:
            found[one["type"]] = {**found.get(one["type"], {}), **one}
        return list(found.values())
    if not isinstance(change, dict):
        return change
    after = dict(before) if isinstance(before, dict) else {}
    for name, value in change.items():
        if value is None:
            after.pop(name, None)
        else:
            after[name] = merge(after.get(name), value, strategic=strategic, key=name)
    return after
