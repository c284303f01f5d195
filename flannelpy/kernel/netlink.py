"""A netlink socket: requests in batches, dumps, and errors that know which request they belong to.

Netlink answers before `send` returns, so everything here is synchronous and takes microseconds per message.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flannelpy.kernel import codec, replies
from flannelpy.kernel.codec import Message
from flannelpy.kernel.table import Row, Table

T = TypeVar("T")

BATCH = 300
"""Messages per send: large enough to make the system calls free, small enough to let the loop breathe."""

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER = 8 << 20
_DATAGRAM = 1 << 16
_DUMP_ATTEMPTS = 8


class NetlinkError(OSError):
    """The kernel refused a request: errno and, where it gives any, its own words."""

    def __init__(self, code: int, words: str = "") -> None:
        super().__init__(code, words or os.strerror(code))


class NetlinkSocket:
    """One netlink socket in the network namespace of the calling thread. For one task at a time."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.bind((0, 0))
        # An answer that does not come is a bug, not a reason to hang for ever.
        self._socket.settimeout(10)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        enlarge_receive_buffer(self._socket)
        self._sequence = 0
        self.port: int = self._socket.getsockname()[0]
        """What the kernel's announcements of our own changes carry."""

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def request(self, message: Message) -> list[bytes]:
        """One request; the bodies of its answers. Raises NetlinkError."""
        bodies: list[bytes] = []
        sequence = self._send([message], ack_all=True)
        for kind, _flags, seq, body in self._answers():
            if seq != sequence:
                continue
            if kind == codec.NLMSG_ERROR:
                code, words = replies.read_error(body)
                if code:
                    raise NetlinkError(code, words)
                return bodies
            bodies.append(body)
        raise NetlinkError(errno.ETIMEDOUT)

    def ask(self, messages: Sequence[Message]) -> list[bytes | None]:
        """Many questions with one answer each: the bodies; None where the kernel has none to give."""
        found: list[bytes | None] = []
        for start in range(0, len(messages), BATCH):
            part = messages[start : start + BATCH]
            last = self._send(part, ack_all=False)
            first = last - len(part) + 1
            answers: list[bytes | None] = [None] * len(part)
            for kind, _flags, seq, body in self._answers():
                if not first <= seq <= last:
                    continue
                if kind != codec.NLMSG_ERROR:
                    answers[seq - first] = body
                elif seq == last:
                    break
            found += answers
        return found

    def dump(self, message: Message) -> list[bytes]:
        """A whole table, by the bodies of its messages."""
        return self._dump(message, codec.next_body)

    def rows(self, message: Message, table: Table) -> list[Row]:
        """A whole table of very many messages, by what `table` reads of each."""
        return self._dump(message, table.read)

    def batch(self, messages: Sequence[Message]) -> dict[int, NetlinkError]:
        """Many requests; position -> error of those that failed. The others are done.

        Only the last one of each send asks for an acknowledgement: failures are reported without it.
        """
        errors: dict[int, NetlinkError] = {}
        for start in range(0, len(messages), BATCH):
            part = messages[start : start + BATCH]
            last = self._send(part, ack_all=False)
            first = last - len(part) + 1
            for kind, _flags, seq, body in self._answers():
                if kind != codec.NLMSG_ERROR or not first <= seq <= last:
                    continue
                code, words = replies.read_error(body)
                if code:
                    errors[start + seq - first] = NetlinkError(code, words)
                if seq == last:
                    break
        return errors

    def _send(self, messages: Sequence[Message], *, ack_all: bool) -> int:
        """Send in one system call; returns the sequence number of the last message."""
        if self._sequence > 0xFFFF0000:
            self._sequence = 0
        header = codec.HEADER.pack
        sequence, final = self._sequence, self._sequence + len(messages)
        parts: list[bytes] = []
        for kind, flags, body in messages:
            sequence += 1
            wanted = codec.NLM_F_REQUEST | flags
            if (ack_all or sequence == final) and flags & codec.NLM_F_DUMP != codec.NLM_F_DUMP:
                wanted |= codec.NLM_F_ACK
            parts += header(16 + len(body), kind, wanted, sequence, 0), body
        self._sequence = sequence
        self._socket.send(b"".join(parts))
        return self._sequence

    def _answers(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            yield from codec.messages(self._socket.recv(_DATAGRAM))

    def _dump(self, message: Message, read: Callable[[bytes, int], tuple[list[T], int]]) -> list[T]:
        """Repeated while the kernel says that the table changed under the reading."""
        found, consistent = self._dump_once(message, read)
        for _attempt in range(_DUMP_ATTEMPTS):
            if consistent:
                break
            found, consistent = self._dump_once(message, read)
        return found

    def _dump_once(
        self, message: Message, read: Callable[[bytes, int], tuple[list[T], int]]
    ) -> tuple[list[T], bool]:
        """`read` takes a datagram and where a message begins; what it makes of one or more, and the next."""
        found: list[T] = []
        consistent = True
        sequence = self._send([message], ack_all=False)
        while True:
            data = self._socket.recv(_DATAGRAM)
            offset = 0
            while head := codec.read_header(data, offset):
                length, kind, flags, seq = head
                if seq != sequence:
                    offset += (length + 3) & ~3
                    continue
                if kind in (codec.NLMSG_DONE, codec.NLMSG_ERROR):
                    # The end carries an error, too: an unknown device is not an empty table.
                    code, words = replies.read_error(data[offset + 16 : offset + length])
                    if code > 0:
                        raise NetlinkError(code, words)
                    return found, consistent
                consistent = consistent and not flags & codec.NLM_F_DUMP_INTR
                some, offset = read(data, offset)
                found += some


def enlarge_receive_buffer(sock: socket.socket) -> None:
    """8 MiB, past the sysctl's limit where we may; each queued message costs the kernel about 832 bytes."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
