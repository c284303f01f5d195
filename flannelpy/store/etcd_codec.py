"""Etcd's answers as values. Pure. Each record is foreign: a bad one becomes (key, reason), never an error."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from flannelpy.model.address import Prefix
from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.model.subnet import decode_attrs, parse_key

if TYPE_CHECKING:  # the memory store reads records, too, and has no use for protobuf
    from flannelpy.store.etcd_pb2 import Event, KeyValue

MAX_VALUE = 65_536
"""Bytes; flannel's values are below 500, the extension backend's free text included."""
_MAX_KEY = 80
_MAX_REASON = 200

DELETE = 1
"""`Event.DELETE`."""


class Record(NamedTuple):
    """One key of ours as etcd returns it."""

    key: str
    """What follows `<prefix>/subnets/`."""
    value: bytes
    created: int
    revision: int
    etcd_lease_id: int


class Listing(NamedTuple):
    """All records at one revision."""

    leases: dict[str, Lease]
    unreadable: dict[str, str]
    """key -> reason."""
    taken: tuple[tuple[Prefix | None, Prefix | None], ...]
    """The subnets of all keys, those with an unreadable value included: they are not free."""
    revision: int

    def snapshot(self) -> Snapshot:
        """The same for the world."""
        return Snapshot(tuple(self.leases.values()), self.revision, tuple(self.unreadable.items()))


def subnets_range(prefix: str) -> tuple[bytes, bytes]:
    """[first, end) of the keys under `<prefix>/subnets/`; `<prefix>/subnets-old/x` is not among them."""
    first = f"{prefix}/subnets/".encode()
    return first, first[:-1] + b"0"  # the byte after "/"


def shown_key(key: bytes) -> str:
    """A key as text: exactly, if it could be a lease's; printable and at most 80 characters otherwise."""
    text = key.decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= _MAX_KEY else f"{text[: _MAX_KEY - 3]}..."


def read_lease(record: Record) -> Lease:
    """A record -> Lease; ValueError with the reason otherwise."""
    subnet, subnet6 = parse_key(record.key)
    if len(record.value) > MAX_VALUE:
        raise ValueError(f"the value has {len(record.value)} bytes; at most {MAX_VALUE} make sense")
    attrs = decode_attrs(record.value)
    return Lease(record.key, subnet, subnet6, attrs, record.created, record.revision, record.etcd_lease_id)


def reason_of(error: ValueError) -> str:
    """Why a record is unreadable, bounded."""
    return str(error)[:_MAX_REASON]


def record_of(kv: "KeyValue", skip: int) -> Record:
    """`skip` is the length of `<prefix>/subnets/`."""
    return Record(shown_key(kv.key[skip:]), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def read_listing(
    records: Iterable[Record], revision: int, read: Callable[[Record], Lease] = read_lease
) -> Listing:
    """All records of a network at a revision."""
    leases: dict[str, Lease] = {}
    unreadable: dict[str, str] = {}
    taken = []
    for record in records:
        try:
            lease = read(record)
        except ValueError as error:
            unreadable[record.key] = reason_of(error)
            try:
                taken.append(parse_key(record.key))
            except ValueError:
                continue
        else:
            leases[record.key] = lease
            taken.append((lease.subnet, lease.subnet6))
    return Listing(leases, unreadable, tuple(taken), revision)


def read_changes(
    changes: Iterable[tuple[bool, Record]], revision: int, read: Callable[[Record], Lease] = read_lease
) -> Delta:
    """(deleted, record) in the order in which they happened -> what they come to.

    An unreadable record leaves what was known about its key as it was.
    """
    put: dict[str, Lease] = {}
    gone: dict[str, None] = {}
    unreadable: dict[str, str] = {}
    for deleted, record in changes:
        key = record.key
        if deleted:
            put.pop(key, None)
            unreadable.pop(key, None)
            gone[key] = None
            continue
        try:
            lease = read(record)
        except ValueError as error:
            unreadable[key] = reason_of(error)
        else:
            gone.pop(key, None)
            unreadable.pop(key, None)
            put[key] = lease
    return Delta(tuple(put.values()), tuple(gone), revision, tuple(unreadable.items()))


def changes_of(events: "Iterable[Event]", skip: int) -> list[tuple[bool, Record]]:
    """Watch events, for `read_changes`."""
    return [(event.type == DELETE, record_of(event.kv, skip)) for event in events]
