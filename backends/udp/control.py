"""The forwarder's side of the UNIX socket: who may ask, what is asked, and the loop around it all."""

import errno
import logging
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

from flannelpy import __version__
from flannelpy.backends.udp import protocol
from flannelpy.backends.udp.forwarder import Forwarder, TunnelLostError
from flannelpy.backends.udp.table import Table
from flannelpy.model.address import parse_prefix
from flannelpy.model.kernel import Tunnel

log = logging.getLogger(__name__)

Message = dict[str, Any]
Answer = tuple[Message, list[int]]
"""A message, and descriptors to go with it."""

_CREDENTIALS = struct.Struct("=iII")
_CONNECTIONS = 8


class Control:
    """The process: its listener, its connections, and the tunnel if it has been given one."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._owners = {0, os.geteuid()}
        """Who may give orders: root, and who started us; `drop_privileges` comes later."""
        self._listener = listener
        self._connections: dict[int, socket.socket] = {}
        self._table = Table()
        self._counts: Counter[str] = Counter()
        self._forwarder: Forwarder | None = None
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._handlers: dict[int, Callable[[], None]] = {listener.fileno(): self._accept}
        self._stopping = False
        self._requests: dict[str, Callable[[Message, list[int]], Answer]] = {
            "hello": self._hello,
            "take": self._take,
            "lend": self._lend,
            "release": self._let_go,
            "apply": self._apply,
            "observe": self._observe,
            "counters": self._counters,
            "stop": self._stop,
        }

    def run(self) -> None:
        """Carry packets and answer, until told to stop. Every descriptor has its turn each time round."""
        try:
            self._loop()
        except BaseException as error:
            for connection in list(self._connections.values()):
                self._answer(connection, {"bye": str(error) or type(error).__name__}, [])
            raise
        finally:
            for connection in list(self._connections.values()):
                self._hang_up(connection)
            self._release()

    def _loop(self) -> None:
        wait, handlers = self._poll.poll, self._handlers
        while not self._stopping:
            for descriptor, _events in wait():
                handler = handlers.get(descriptor)
                if handler is None:
                    continue  # closed by one that had its turn before
                try:
                    handler()
                except TunnelLostError as lost:
                    log.warning("%s; waiting for the daemon to make it anew", lost)
                    self._release()

    # --- connections -------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except BlockingIOError:
            return
        _pid, user, _group = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if user not in self._owners or len(self._connections) >= _CONNECTIONS:
            connection.close()  # an abstract socket has no file mode that would keep others out
            return
        connection.setblocking(False)
        number = connection.fileno()
        self._connections[number] = connection
        self._handlers[number] = lambda: self._serve(connection)
        self._poll.register(number, select.POLLIN)

    def _serve(self, connection: socket.socket) -> None:
        """Answer one request, or let the connection go."""
        descriptors: list[int] = []
        try:
            data, descriptors, _flags, _address = socket.recv_fds(connection, protocol.MAX_MESSAGE, 2)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(connection)
            return
        try:
            message = protocol.decode(data)
            request = self._requests.get(str(message.get("do")), _unknown)
            answer, lent = request(message, descriptors)
        except Exception as error:  # noqa: BLE001  # whatever is asked, packets go on
            for descriptor in descriptors:
                os.close(descriptor)
            answer, lent = {"error": str(error) or type(error).__name__}, []
        self._answer(connection, answer, lent)

    def _answer(self, connection: socket.socket, answer: Message, lent: list[int]) -> None:
        """Send it; who does not read its answers is let go, for packets must not wait for anybody."""
        try:
            socket.send_fds(connection, [protocol.encode(answer)], lent, socket.MSG_DONTWAIT)
        except OSError:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        number = connection.fileno()
        if self._connections.pop(number, None) is not None:
            self._poll.unregister(number)
            del self._handlers[number]
            connection.close()

    # --- requests: (message, descriptors) -> (answer, descriptors) -----------------------------------------

    def _hello(self, message: Message, descriptors: list[int]) -> Answer:
        if self._forwarder is not None and not self._forwarder.has_device():
            self._release()
        tunnel = protocol.encode_tunnel(self._forwarder.tunnel) if self._forwarder else None
        answer = {
            "version": protocol.VERSION,
            "program": __version__,
            "pid": os.getpid(),
            "tunnel": tunnel,
        }
        return answer, []

    def _take(self, message: Message, descriptors: list[int]) -> Answer:
        tunnel = protocol.decode_tunnel(message["tunnel"])
        if descriptors:
            tun, number = descriptors
            self._release()
            self._begin(tunnel, tun, socket.socket(fileno=number))
        elif self._forwarder is not None:
            self._forwarder.tunnel = tunnel
        else:
            raise ValueError("there are no descriptors to keep")
        return {}, []

    def _begin(self, tunnel: Tunnel, tun: int, sock: socket.socket) -> None:
        if self._table.port != tunnel.port:
            entries = self._table.entries
            self._table = Table(tunnel.port)
            self._table.apply(entries, ())
        forwarder = self._forwarder = Forwarder(tunnel, tun, sock, self._table, self._counts)
        for number, handler in ((tun, forwarder.send), (sock.fileno(), forwarder.receive)):
            self._handlers[number] = handler
            self._poll.register(number, select.POLLIN)

    def _release(self) -> None:
        """Give the descriptors up; device, routes and table stay."""
        forwarder, self._forwarder = self._forwarder, None
        if forwarder is None:
            return
        for number in (forwarder.tun, forwarder.socket.fileno()):
            self._poll.unregister(number)
            del self._handlers[number]
        os.close(forwarder.tun)
        forwarder.socket.close()

    def _lend(self, message: Message, descriptors: list[int]) -> Answer:
        if self._forwarder is None:
            raise OSError(errno.ENODEV, "there is no tunnel")
        return {}, [self._forwarder.tun, self._forwarder.socket.fileno()]

    def _let_go(self, message: Message, descriptors: list[int]) -> Answer:
        self._release()
        return {}, []

    def _apply(self, message: Message, descriptors: list[int]) -> Answer:
        put = protocol.decode_forwards(message.get("put", ()))
        self._table.apply(put, [parse_prefix(prefix).network() for prefix in message.get("gone", ())])
        return {}, []

    def _observe(self, message: Message, descriptors: list[int]) -> Answer:
        start = int(message.get("from", 0))
        entries = self._table.entries
        page = protocol.encode_forwards(islice(entries.items(), start, start + protocol.PAGE))
        following = start + protocol.PAGE
        return {"forwards": page, "next": following if following < len(entries) else None}, []

    def _counters(self, message: Message, descriptors: list[int]) -> Answer:
        counts = dict(self._counts)
        if self._forwarder is not None:
            counts["drop_socket_full"] = self._forwarder.overflows()
        return {"counters": counts}, []

    def _stop(self, message: Message, descriptors: list[int]) -> Answer:
        self._stopping = True
        self._listener.close()  # before the answer: whoever hears it and looks for a forwarder finds none
        return {}, []


def _unknown(message: Message, _descriptors: list[int]) -> Answer:
    raise ValueError(f"unknown request {str(message.get('do'))[:40]!r}")
