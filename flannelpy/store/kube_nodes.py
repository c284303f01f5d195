"""All nodes: listed, then watched (a reflector). What comes out are leases, and only where they changed.

list  pages of 500; the first one as the server's cache has it, at least as new as what we have seen
watch from there, with bookmarks; a node's heartbeats change its revision and nothing that we tell
410   by status or as an event: list again, and tell the whole as a Snapshot, which is a difference
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from random import Random
from typing import Any, NamedTuple

from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.store.decision import lacks_most
from flannelpy.store.etcd_codec import Listing
from flannelpy.store.kube_client import KubeClient, KubeError
from flannelpy.store.kube_codec import Families, is_name, lease_of, read_node, revision_of

_PAGE = 500
_WATCH_SECONDS = (300, 600)
"""How long a watch lasts before it is asked for again; at random, for there are thousands."""
_MAX_REASON = 200
_OLD = (410, 504)
"""Gone; and the server's cache has not come as far as we have seen ("Too large resource version")."""


class ExpiredError(KubeError):
    """The server does not know any more what happened since: list again."""


class Found(NamedTuple):
    """One node as an event or a list shows it."""

    name: str
    revision: int
    lease: Lease | None
    """None: it takes no part, or cannot be read."""
    reason: str = ""
    """Why it cannot be read."""


class Nodes:
    """What is known of all nodes. `own` is our lease as it was written last: it counts instead of an echo."""

    def __init__(self, client: KubeClient, prefix: str, random: Random) -> None:
        self._client = client
        self._prefix = prefix
        self._random = random
        self.families = Families(ipv4=True, ipv6=False)
        self.leases: dict[str, Lease] = {}
        self._unreadable: dict[str, str] = {}
        self.revision = 0
        """How far we have seen."""
        self.own: Lease | None = None
        self._remembered: frozenset[str] = frozenset()

    def remember(self, revision: int, names: Sequence[str]) -> None:
        """What an earlier life had seen."""
        self.revision = revision
        self._remembered = frozenset(names)

    # --- list --------------------------------------------------------------------------------------------

    async def read_all(self) -> Snapshot:
        """All nodes. Raises StoreError."""
        seen = self.revision
        cached = {"resourceVersion": "0"}
        if seen:
            cached = {"resourceVersion": str(seen), "resourceVersionMatch": "NotOlderThan"}
        try:
            found, revision = await self._pages(cached)
            exact = False
        except KubeError as error:
            if error.status not in _OLD:
                raise
            found, revision = await self._pages({})
            exact = True
        listing = self._listing(found, revision)
        if not exact and lacks_most(self._remembered or self.leases.keys(), listing):
            # Once more, and not out of a cache, before most of the peers are given up.
            found, revision = await self._pages({})
            listing = self._listing(found, revision)
            exact = True
        new_history = exact and 0 < revision < seen
        if new_history:
            self.own = None
            listing = self._listing(found, revision)
        self._remembered = frozenset()
        self.leases, self._unreadable = listing.leases, listing.unreadable
        self.revision = revision
        return listing.snapshot()._replace(new_history=new_history)

    async def _pages(self, query: dict[str, str]) -> tuple[list[Found], int]:
        """All pages; an exact list if a token for the next one is not known any more."""
        while True:
            found: list[Found | None] = []
            page = await self._client.list_page({**query, "limit": str(_PAGE)}, found, self._found)
            try:
                while page.more:
                    more = {"limit": str(_PAGE), "continue": page.more}
                    page = await self._client.list_page(more, found, self._found)
            except KubeError as error:
                if error.status != 410 or not query:
                    raise
                query = {}
                continue
            try:
                return [one for one in found if one is not None], revision_of(page.revision)
            except ValueError as error:
                raise KubeError(f"the list of nodes cannot be read: {error}") from None

    def _listing(self, found: Sequence[Found], revision: int) -> Listing:
        leases: dict[str, Lease] = {}
        unreadable: dict[str, str] = {}
        for one in found:
            lease = self._ours_or(one)
            if lease is not None:
                leases[one.name] = lease
            elif one.reason:
                unreadable[one.name] = one.reason
        return Listing(leases, unreadable, (), revision)

    # --- watch -------------------------------------------------------------------------------------------

    async def follow(self) -> AsyncGenerator[Delta, None]:
        """What changes from here on; ends when the server ends the watch. ExpiredError: list again."""
        query = {
            "resourceVersion": str(self.revision),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._random.randint(*_WATCH_SECONDS)),
        }
        try:
            async with aclosing(self._client.watch(query)) as batches:
                async for events in batches:
                    delta = self._after(events)
                    if delta is not None:
                        yield delta
        except KubeError as error:
            if error.status == 410:
                raise ExpiredError(str(error), 410) from None
            raise

    def _after(self, events: Sequence[Any]) -> Delta | None:
        """What some events come to; None if they tell nothing new: heartbeats, labels, images."""
        put: dict[str, Lease] = {}
        gone: dict[str, None] = {}
        unreadable: dict[str, str] = {}
        alive = not events
        for event in events:
            kind, value = _parts(event)
            if kind == "ERROR":
                raise _error_of(value)
            found = self._found(value) if kind in ("ADDED", "MODIFIED", "DELETED") else None
            if kind == "BOOKMARK":
                self._advance(value)
                alive = True
            if found is None:
                continue
            self.revision = max(self.revision, found.revision)
            name = found.name
            lease = None if kind == "DELETED" else self._ours_or(found)
            if kind != "DELETED" and lease is None and found.reason:
                if self._unreadable.get(name) != found.reason:
                    unreadable[name] = self._unreadable[name] = found.reason
                continue
            was_unreadable = self._unreadable.pop(name, None) is not None
            unreadable.pop(name, None)
            known = self.leases.get(name)
            if lease is None:
                if known is not None or was_unreadable:  # then what was known of it before has stayed
                    self.leases.pop(name, None)
                    put.pop(name, None)
                    gone[name] = None
            elif known is None or not _is_same(known, lease):
                self.leases[name] = put[name] = lease
                gone.pop(name, None)
        if put or gone or unreadable or alive:
            return Delta(tuple(put.values()), tuple(gone), self.revision, tuple(unreadable.items()))
        return None

    def _advance(self, value: Any) -> None:
        try:
            self.revision = max(self.revision, revision_of(value["metadata"]["resourceVersion"]))
        except (ValueError, KeyError, TypeError):
            return

    # --- one node ----------------------------------------------------------------------------------------

    def _found(self, value: Any) -> Found | None:
        """A node object, whatever is in it; None if it does not even have a name."""
        try:
            node = read_node(value, self._prefix)
        except ValueError as error:
            name = _name_of(value)
            return None if name is None else Found(name, 0, None, str(error)[:_MAX_REASON])
        try:
            return Found(node.name, node.revision, lease_of(node, self.families))
        except ValueError as error:
            return Found(node.name, node.revision, None, str(error)[:_MAX_REASON])

    def _ours_or(self, found: Found) -> Lease | None:
        """The lease of a node; of our own one what we wrote, unless somebody else wrote it since."""
        own = self.own
        if own is None or found.name != own.key:
            return found.lease
        if found.revision < own.revision or (found.lease is not None and _is_same(found.lease, own)):
            return own
        return found.lease


def _is_same(one: Lease, other: Lease) -> bool:
    """But for the revision, which every heartbeat changes."""
    return one._replace(revision=other.revision) == other


def _parts(event: Any) -> tuple[str, Any]:
    if not isinstance(event, dict):
        return "", None
    return str(event.get("type", "")), event.get("object")


def _error_of(value: Any) -> KubeError:
    """An ERROR event: a Status object."""
    status = value if isinstance(value, dict) else {}
    code = status.get("code")
    said = ascii(status.get("message", ""))[1:-1][:200]
    is_old = code == 410 or status.get("reason") in ("Expired", "Gone")
    error = ExpiredError if is_old else KubeError
    return error(
        f"the Kubernetes API server ended the watch of the nodes with {ascii(code)[:10]}: {said}",
        410 if is_old else 0,
    )


def _name_of(value: Any) -> str | None:
    metadata = value.get("metadata") if isinstance(value, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) and is_name(name) else None
