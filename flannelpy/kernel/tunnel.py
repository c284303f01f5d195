"""The forwarders of our TUN devices: found or started, given their descriptors, asked, told.

A forwarder outlives the daemon: it is a unit of its own where systemd listens on its socket, and a detached
child elsewhere. Whoever comes next finds it by its socket and takes it over; packets flow all the while.
While a daemon runs it keeps copies of the descriptors, so when a forwarder dies, or is one of another
version, the next one goes on with them, and what arrives in between waits in their queues.
"""

import asyncio
import errno
import logging
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ParamSpec

from flannelpy import __version__
from flannelpy.backends.udp import protocol
from flannelpy.kernel import sysctl, tun
from flannelpy.kernel.fast_path import FastPath
from flannelpy.kernel.links import Failure
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.model.address import Address, Prefix
from flannelpy.model.kernel import Forward, Tunnel
from flannelpy.model.plan import Op, Put, Remove

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds for an answer: a new process has Python to start first."""
_DYING = 0.3
"""Seconds between a forwarder's last word and its end."""
_CREDENTIALS = struct.Struct("=iII")
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV")
"""All that a forwarder is told of ours: the rest may hold passwords."""


class ForwarderGoneError(NetlinkError):
    """The forwarder ended while it was spoken to."""


class Tunnels:
    """One forwarder per device. `on_end` is told, in words, when one ends by itself.

    With `only_look` a forwarder of another version is not replaced, and nothing is kept of any.
    """

    def __init__(self, netlink: NetlinkSocket, *, only_look: bool = False) -> None:
        self._only_look = only_look
        self.on_end: Callable[[str], None] = lambda _why: None
        self.fast = FastPath(netlink)
        self._lines: dict[str, _Line] = {}

    def close(self) -> None:
        """Hang up; the forwarders go on."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        self.fast.close()

    def observe(self, device: str) -> tuple[Tunnel | None, dict[Prefix, Address]]:
        """What a device's forwarder carries; nothing if there is none."""
        line = self._line(device)
        if line is None:
            return None, {}
        hello = line.ask({"do": "hello"})
        if hello.get("version") != protocol.VERSION or hello.get("program") != __version__:
            if not self._only_look:
                self._retire(line, hello)
            return None, {}
        tunnel = protocol.decode_tunnel(hello["tunnel"]) if hello.get("tunnel") else None
        if tunnel is not None and not self._only_look:
            line.keep_copies(tunnel)
        forwards: dict[Prefix, Address] = {}
        following: int | None = 0
        while following is not None:
            answer = line.ask({"do": "observe", "from": following})
            forwards.update(protocol.decode_forwards(answer["forwards"]))
            following = answer["next"]
        return tunnel, forwards

    def items(self, device: str) -> list[Tunnel | Forward]:
        """The same, as items of a state. A forwarder that does not answer carries nothing for us."""
        try:
            tunnel, forwards = self.observe(device)
        except (NetlinkError, ValueError, TypeError, KeyError) as error:
            log.warning("%s", error)
            return []
        found: list[Tunnel | Forward] = []
        for subnet, remote in forwards.items():
            item = Forward(device, subnet, remote)
            if tunnel is not None and tunnel.fast and self.fast.has_table:
                # What the kernel's table lacks counts as missing, in both.
                item = self.fast.entries.get(subnet, item._replace(remote=b""))
                if item.remote != remote:
                    continue
            found.append(item)
        if tunnel is not None:
            # Who only looks does not judge how the packets go.
            aside = self._only_look or (self.fast.has_table and not self.fast.carries(tunnel))
            found.append(tunnel._replace(fast=False) if aside else tunnel)
        return found

    def carry_out(self, ops: Sequence[Op]) -> list[Failure]:
        """Do it, a table at a time; what was refused."""
        failures: list[Failure] = []
        for device in sorted({op.item.device for op in ops if isinstance(op.item, Forward)}):
            part = [op for op in ops if isinstance(op.item, Forward) and op.item.device == device]
            forwards = [(op, op.item) for op in part if isinstance(op.item, Forward)]
            put = {item.subnet: item.remote for op, item in forwards if isinstance(op, Put)}
            gone = [item.subnet for op, item in forwards if isinstance(op, Remove)]
            failures += _attempt(part, self.apply, device, put, gone)
            in_kernel = [item for op, item in forwards if isinstance(op, Put)]
            failures += _attempt(part, self.fast.apply, in_kernel, gone)
        for op in ops:
            if isinstance(op.item, Tunnel):
                if isinstance(op, Put):
                    failures += _attempt([op], self.put, op.item)
                else:
                    self.fast.remove(op.item)
                    failures += _attempt([op], self.remove, op.item.device)
        return failures

    def put(self, tunnel: Tunnel) -> None:
        """Make the forwarder carry this; it is started if there is none."""
        self._ensure(tunnel.device).take(tunnel)
        # Our own ICMP errors come in from the device with our own address; a stranger's may not.
        sysctl.write_quietly(f"net/ipv4/conf/{tunnel.device}/accept_local", "0" if tunnel.open else "1")
        self.fast.put(tunnel)

    def apply(self, device: str, put: Mapping[Prefix, Address], gone: Sequence[Prefix]) -> None:
        """Change the table of a device's forwarder, which is started for it: it carries nothing before."""
        if not put and self._line(device) is None:
            return  # the entries went with it
        line = self._ensure(device)
        puts = protocol.encode_forwards(put.items())
        removals = [str(prefix) for prefix in gone]
        for start in range(0, max(len(puts), len(removals)), protocol.PAGE):
            part = slice(start, start + protocol.PAGE)
            line.ask({"do": "apply", "put": puts[part], "gone": removals[part]})

    def counters(self, device: str) -> dict[str, int]:
        """What a device's forwarder has counted since it started."""
        line = self._line(device)
        return dict(line.ask({"do": "counters"})["counters"]) if line is not None else {}

    def all_counters(self) -> dict[str, int]:
        """The same for every forwarder that we know of, with the fast path's. NetlinkError if one is gone."""
        found: Counter[str] = Counter()
        for device in list(self._lines):
            found.update(self.counters(device))
        found.update(self.fast.counters())
        return dict(found)

    def remove(self, device: str) -> None:
        """End a device's forwarder."""
        line = self._line(device)
        if line is not None:
            with suppress(ForwarderGoneError):
                line.ask({"do": "stop"})
            line.reap()
            self._drop(line)

    # --- finding and starting ----------------------------------------------------------------------------

    def _line(self, device: str) -> "_Line | None":
        """The connection to a device's forwarder; None if there is no forwarder."""
        line = self._lines.get(device)
        if line is not None and line.connection is not None:
            return line
        connection = _connect(device)
        if connection is None:
            return None
        line = line or _Line(device, self._ended)
        line.attach(connection)
        self._lines[device] = line
        return line

    def _ensure(self, device: str) -> "_Line":
        """The connection to a device's forwarder, which is started if there is none."""
        return self._line(device) or self._start(device)

    def _start(self, device: str) -> "_Line":
        """Start a detached forwarder. The listener is ours, so that others see whose it is."""
        line = self._lines.setdefault(device, _Line(device, self._ended))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(protocol.address_of(device))
            listener.listen(8)
            number = listener.fileno()
            words = [sys.executable, "-P", "-m", "flannelpy.backends.udp", f"--fd={number}"]
            listener.set_inheritable(True)
            line.child = os.posix_spawn(
                sys.executable,
                words,
                {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
                setsid=True,
            )
            connection = _connect(device)
        if connection is None:
            raise NetlinkError(errno.ECONNREFUSED, f"the new forwarder of {device} cannot be reached")
        log.info("started a forwarder of %s, process %d", device, line.child)
        line.attach(connection)
        return line

    def _retire(self, line: "_Line", hello: Mapping[str, Any]) -> None:
        """End a forwarder of another version; its descriptors go to the one that follows."""
        log.info(
            "the forwarder of %s, process %s, is of version %s, not %s: replacing it",
            *(line.device, hello.get("pid"), hello.get("program"), __version__),
        )
        with suppress(OSError, ValueError, TypeError, KeyError):
            line.keep_copies(protocol.decode_tunnel(hello["tunnel"]))
        with suppress(OSError):
            line.ask({"do": "stop"})
        line.reap()
        line.hang_up()

    def _ended(self, line: "_Line") -> None:
        why = f"the forwarder of {line.device} ended: {line.last_words()}"
        line.hang_up()
        self.on_end(why)

    def _drop(self, line: "_Line") -> None:
        line.close()
        del self._lines[line.device]


class _Line:
    """The connection to one forwarder, and copies of its descriptors."""

    def __init__(self, device: str, ended: "Callable[[_Line], None]") -> None:
        self.device = device
        self.connection: socket.socket | None = None
        self.child = 0
        """Its process, if we started it."""
        self._ended = ended
        self._bye = ""
        self._tunnel: Tunnel | None = None
        self._tun = -1
        self._socket: socket.socket | None = None

    def attach(self, connection: socket.socket) -> None:
        """Speak over this connection, and hear when it ends."""
        self.connection = connection
        self._bye = ""
        with suppress(RuntimeError):  # no loop runs: a command, which hears of nothing
            asyncio.get_running_loop().add_reader(connection, self._unasked)

    def hang_up(self) -> None:
        """End the connection, keep the copies."""
        if self.connection is not None:
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self.connection)
            self.connection.close()
            self.connection = None

    def close(self) -> None:
        """Give everything back."""
        self.hang_up()
        self._forget()

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """One request and its answer. Raises NetlinkError with the forwarder's words, or when it is gone."""
        answer, lent = self._exchange(request, descriptors)
        for descriptor in lent:
            os.close(descriptor)
        return answer

    def take(self, tunnel: Tunnel) -> None:
        """Have the tunnel carried, with the descriptors that are there or with new ones."""
        held = self._tunnel
        usable = (
            held is not None
            and (held.device, held.local, held.port) == (tunnel.device, tunnel.local, tunnel.port)
            and tun.is_tun(self._tun, tunnel.device)
        )
        if not usable:
            self._make(tunnel)
        assert self._socket is not None  # noqa: S101  # for the type checker
        self.ask({"do": "take", "tunnel": protocol.encode_tunnel(tunnel)}, [self._tun, self._socket.fileno()])
        self._tunnel = tunnel

    def _make(self, tunnel: Tunnel) -> None:
        """Open both anew. The forwarder lets the old ones go first: a TUN has room for one."""
        if self._tunnel is not None:
            self.ask({"do": "release"})
        self._forget()
        self._tun = tun.open_tun(tunnel.device)
        self._socket = tun.open_socket(tunnel)

    def keep_copies(self, tunnel: Tunnel) -> None:
        """Have copies of the forwarder's descriptors, for the one that comes after it."""
        if self._tunnel != tunnel or not tun.is_tun(self._tun, tunnel.device):
            _answer, lent = self._exchange({"do": "lend"})
            if len(lent) == 2:
                self._forget()
                self._tun, self._socket = lent[0], socket.socket(fileno=lent[1])
                self._tunnel = tunnel

    def _forget(self) -> None:
        if self._tun >= 0:
            os.close(self._tun)
        if self._socket is not None:
            self._socket.close()
        self._tun, self._socket, self._tunnel = -1, None, None

    def _exchange(
        self, request: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        connection = self.connection
        if connection is None:
            raise ForwarderGoneError(errno.ESRCH, f"there is no forwarder of {self.device}")
        try:
            socket.send_fds(connection, [protocol.encode(request)], descriptors)
            data, lent, _flags, _address = socket.recv_fds(connection, protocol.MAX_MESSAGE, 2)
            answer = protocol.decode(data) if data else {}
        except (OSError, ValueError) as error:
            self.hang_up()
            raise ForwarderGoneError(
                errno.EPIPE, f"the forwarder of {self.device} does not answer: {error}"
            ) from error
        if not data or "bye" in answer:
            self._bye = str(answer.get("bye", ""))
            words = self.last_words()
            self.hang_up()
            raise ForwarderGoneError(errno.EPIPE, f"the forwarder of {self.device} ended: {words}")
        if "error" in answer:
            raise NetlinkError(errno.EPROTO, f"the forwarder of {self.device} says: {answer['error']}")
        return answer, lent

    def _unasked(self) -> None:
        """Something came that is no answer: its last words, or the end."""
        if self.connection is None:
            return
        try:
            data = self.connection.recv(protocol.MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            with suppress(ValueError):
                self._bye = str(protocol.decode(data).get("bye", ""))
            return
        self._ended(self)

    def reap(self) -> int | None:
        """Wait for the end of our child, which is near; its exit code, a signal as a negative number."""
        deadline = time.monotonic() + _DYING
        while self.child and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                found, status = os.waitpid(self.child, os.WNOHANG)
                if found:
                    self.child = 0
                    return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def last_words(self) -> str:
        """Why it ended, as far as can be known."""
        code = self.reap()
        if self._bye:
            return self._bye
        if code is None:
            return "without a word"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


P = ParamSpec("P")


def _attempt(
    ops: Sequence[Op], act: Callable[P, object], *arguments: P.args, **keywords: P.kwargs
) -> list[Failure]:
    """Act; if that is refused, so are all of these operations."""
    try:
        act(*arguments, **keywords)
    except OSError as error:
        return [Failure(op, error) for op in ops]
    return []


def _connect(device: str) -> socket.socket | None:
    """A connection to the forwarder of a device; None if nobody listens, or not root."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_PATIENCE)
    try:
        connection.connect(protocol.address_of(device))
    except OSError:
        connection.close()
        return None
    _pid, user, _group = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    if user not in (0, os.geteuid()):
        # Any user may take such a name; a forwarder's is taken by us, or by systemd for it.
        connection.close()
        log.warning("user %d holds the name of the forwarder of %s: end that process", user, device)
        return None
    return connection
