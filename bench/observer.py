"""What the kernel of one network namespace did, and when: a rtnetlink listener with nothing in between.

Every message is stamped when it is received. Formats: linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h.
"""

import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

from bench.netns import Namespace

_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTM_NEWNEIGH, _RTM_DELNEIGH, _RTM_GETNEIGH = 28, 29, 30
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST_DUMP = 0x301
_NLM_F_DUMP_INTR = 0x10
_GROUPS = 0x4 | 0x40  # RTMGRP_NEIGH (FDB entries too) and RTMGRP_IPV4_ROUTE
_AF_BRIDGE = 7
_ATTR_DST, _ATTR_LLADDR = 1, 2  # RTA_DST = NDA_DST = 1
_TABLE_MAIN, _UNICAST = 254, 1
_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_RECEIVE_BUFFER = 256 << 20

ROUTE, NEIGHBOUR, FDB = "routes", "neighbours", "fdb entries"


class Observer:
    """Routes, neighbours and FDB entries as they come and go.

    `added[table]` and `removed[table]` map a key to the time (monotonic ns) of its first message since
    `forget()`. Keys: a route's /24 base (4 bytes), a neighbour's address + MAC, an FDB entry's MAC + remote
    address. `overrun` is True once the kernel had to drop messages: then times are not to be trusted.
    """

    def __init__(self, netns: Namespace) -> None:
        with netns.entered():
            self._events = _netlink_socket(_GROUPS)
            self._dumps = _netlink_socket(0)
        self._events.setblocking(False)
        self._dumps.settimeout(10)
        self._buffer = bytearray(1 << 17)
        self._view = memoryview(self._buffer)
        self._unread: list[tuple[int, bytes]] = []
        self._poll = select.poll()
        self._poll.register(self._events, select.POLLIN)
        self.overrun = False
        self.added = _empty()
        self.removed = _empty()

    def close(self) -> None:
        self._events.close()
        self._dumps.close()

    def fileno(self) -> int:
        return self._events.fileno()

    def forget(self) -> None:
        """Start a new phase: whatever was seen, or waits to be received, no longer counts."""
        self.drain()
        self.added = _empty()
        self.removed = _empty()

    def collect(self) -> int:
        """Stamp and keep every message that waits, unread as yet; returns how many are kept; never blocks."""
        while True:
            try:
                size = self._events.recv_into(self._buffer)
            except BlockingIOError:
                return len(self._unread)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overrun = True
                continue
            self._unread.append((time.monotonic_ns(), bytes(self._view[:size])))

    def drain(self) -> None:
        """Take in every message that waits or was collected; never blocks."""
        self.collect()
        for stamp, message in self._unread:
            for kind, table, key in _entries(memoryview(message)):
                into = self.removed if kind in (_RTM_DELROUTE, _RTM_DELNEIGH) else self.added
                into[table].setdefault(key, stamp)
        self._unread.clear()

    def wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
        """Receive until `done()` holds (True) or the time is over (False)."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._poll.poll(left * 1000)
            self.drain()
        return True

    def present(self) -> dict[str, set[bytes]]:
        """What the kernel holds now, by dump; keys as in `added`."""
        requests = (
            (ROUTE, _RTM_GETROUTE, socket.AF_INET),
            (NEIGHBOUR, _RTM_GETNEIGH, socket.AF_INET),
            (FDB, _RTM_GETNEIGH, _AF_BRIDGE),
        )
        return {table: self._dump(kind, family) for table, kind, family in requests}

    def _dump(self, kind: int, family: int) -> set[bytes]:
        while True:
            header = _HEADER.pack(_HEADER.size + 12, kind, _NLM_F_REQUEST_DUMP, 0, 0)
            self._dumps.send(header + bytes((family,)) + bytes(11))
            found: set[bytes] = set()
            interrupted = finished = False
            while not finished:
                size = self._dumps.recv_into(self._buffer)
                message = self._view[:size]
                _, first, flags, _, _ = _HEADER.unpack_from(message)
                if first == _NLMSG_ERROR:
                    code = -int(struct.unpack_from("=i", message, _HEADER.size)[0])
                    raise OSError(code, f"netlink dump of type {kind} failed")
                interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                finished = any(kind == _NLMSG_DONE for kind, _, _ in _headers(message))
                found.update(key for _, _, key in _entries(message))
            if not interrupted:
                return found


def _empty() -> dict[str, dict[bytes, int]]:
    return {ROUTE: {}, NEIGHBOUR: {}, FDB: {}}


def _netlink_socket(groups: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_RCVBUFFORCE", 33), _RECEIVE_BUFFER)
    sock.bind((0, groups))
    return sock


def _headers(message: memoryview) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each netlink message in a datagram."""
    offset = 0
    while offset + _HEADER.size <= len(message):
        length, kind, _, _, _ = _HEADER.unpack_from(message, offset)
        if length < _HEADER.size:
            return
        yield kind, offset, min(offset + length, len(message))
        offset += (length + 3) & ~3


def _entries(message: memoryview) -> Iterator[tuple[int, str, bytes]]:
    """(message type, table, key) of what could be a daemon's work; everything else is skipped."""
    for kind, start, end in _headers(message):
        body = start + _HEADER.size
        if kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
            # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
            if message[body + 1] != 24 or message[body + 4] != _TABLE_MAIN or message[body + 7] != _UNICAST:
                continue
            destination, _ = _addresses(message, body + 12, end)
            if destination[:1] == b"\x0a":
                yield kind, ROUTE, destination
        elif kind in (_RTM_NEWNEIGH, _RTM_DELNEIGH):
            address, mac = _addresses(message, body + 12, end)
            if len(address) != 4 or len(mac) != 6:
                continue
            if message[body] == _AF_BRIDGE:
                yield kind, FDB, mac + address
            elif address[0] == 10:
                yield kind, NEIGHBOUR, address + mac


def _addresses(message: memoryview, offset: int, end: int) -> tuple[bytes, bytes]:
    """The destination and link-layer address attributes; empty when absent."""
    destination = mac = b""
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(message, offset)
        if length < 4:
            break
        if kind == _ATTR_DST:
            destination = bytes(message[offset + 4 : offset + length])
        elif kind == _ATTR_LLADDR:
            mac = bytes(message[offset + 4 : offset + length])
        offset += (length + 3) & ~3
    return destination, mac
