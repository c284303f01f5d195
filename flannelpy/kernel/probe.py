"""Probes of the ways to peers. The far side needs nothing but its kernel: it answers echoes and makes errors.

- ICMP echo with DF: the way there and back, for one size.
- UDP to a closed port: the way there, for one size, because the ICMP error is small.
- An echo that we wrap ourselves: the encapsulation, whatever our own tables say.
- A datagram with an option that must be refused: whether datagrams of a kind arrive although the port is open
  and its owner says nothing. IPv4: a bad record-route option, which the IP layer of whoever receives it
  refuses; IPv6: an unknown destination option.

Everything ends by a deadline; nothing is sent more than a few times.
"""

import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from flannelpy.kernel import sniff
from flannelpy.model import packet
from flannelpy.model.address import Address, Mac, format_address

SECONDS = 0.5
"""How long an answer may take. Each probe that stays without one is sent once more."""
_LEAST_SECONDS, _TRIPS = 0.2, 20
"""Where the round trip is known, it may take so many of them, but at least so long."""
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_CLOSED_PORTS = range(33434, 33534)
"""Those of traceroute: nobody listens there."""
_ETH_P = {4: 0x0800, 16: 0x86DD}
_UNREACHABLE, _PARAMETER = {4: (3, 3), 16: (1, 4)}, {4: 12, 16: 4}
_BAD_RECORD_ROUTE = bytes((7, 7, 3, 0, 0, 0, 0, 0))
"""Its pointer may not be less than 4 (RFC 791)."""
_UNKNOWN_OPTION = bytes((17, 0, 0x9E, 0, 1, 2, 0, 0))
"""A destination options header before UDP; what does not know the option sends an error (RFC 8200, 4.2)."""
_WITH_OPTIONS = {4: 17, 16: 60}


class Wrapping(NamedTuple):
    """How the encapsulation of one peer looks."""

    local: Address
    remote: Address
    port: int
    vni: int | None
    """None: the datagram holds the packet itself (udp)."""
    source_mac: Mac
    target_mac: Mac
    source: Address
    """Of the inner packet."""
    target: Address


class Answer(NamedTuple):
    """To a wrapped echo."""

    seconds: float
    mac: Mac
    """Of whoever answered; empty without frames."""


class Prober:
    """Sockets for probes of one family of addresses; `close` it. Raises OSError without privileges."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.patience = SECONDS
        """Seconds for an answer."""
        self._family = socket.AF_INET if width == 4 else socket.AF_INET6
        protocol = socket.IPPROTO_ICMP if width == 4 else socket.IPPROTO_ICMPV6
        self._icmp = socket.socket(self._family, socket.SOCK_RAW, protocol)
        _never_fragment(self._icmp, width)
        self._icmp.setblocking(False)
        self._raw = socket.socket(self._family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._numbers = itertools.count(int.from_bytes(os.urandom(2)) << 16 | 1)
        # Each begins elsewhere: one of another thread hears the same errors.
        first = os.urandom(1)[0] % len(_CLOSED_PORTS)
        self._ports = itertools.cycle([*_CLOSED_PORTS[first:], *_CLOSED_PORTS[:first]])

    def close(self) -> None:
        """Give the sockets back."""
        self._icmp.close()
        self._raw.close()

    def learn(self, trip: float) -> None:
        """The round trip to the peer is this: its silence is known sooner."""
        self.patience = min(SECONDS, max(_LEAST_SECONDS, _TRIPS * trip))

    # --- echoes ---

    def echo(self, target: Address, size: int = 84) -> float | None:
        """The round trip of an echo of `size` bytes that may not be fragmented; None without an answer."""
        for _attempt in range(2):
            found = self.echoes(target, [size])
            if found:
                return found[size]
        return None

    def echoes(self, target: Address, sizes: Sequence[int]) -> dict[int, float]:
        """The same for several sizes at once: size -> seconds, of those that came back."""
        sent: dict[int, tuple[int, float]] = {}
        for size in sizes:
            number = next(self._numbers) & 0xFFFFFFFF
            # More than the way is known to carry is refused here already.
            with suppress(OSError):
                self._icmp.sendto(packet.icmp_echo(self._width, number, size), (format_address(target), 0))
                sent[number] = (size, time.monotonic())
        found: dict[int, float] = {}
        for data, source in self._heard(lambda: len(found) < len(sent)):
            reply = packet.ECHO[self._width][1]
            if source == target and len(data) >= 8 and data[0] == reply:
                size, began = sent.get(int.from_bytes(data[4:8]), (0, 0.0))
                if size:
                    found[size] = time.monotonic() - began
        return found

    def next_hop(self, target: Address, size: int = 84) -> float | None:
        """The round trip of an echo that goes no further than the next hop; None without an answer.

        That answers, or it says that it would have to forward the packet: either way it has come there.
        """
        level, kind = packet.HOP_LIMIT[self._width]
        for _attempt in range(2):
            number = next(self._numbers) & 0xFFFFFFFF
            data = packet.icmp_echo(self._width, number, size)
            began = time.monotonic()
            with suppress(OSError):
                limit = [(level, kind, struct.pack("@i", 1))]
                self._icmp.sendmsg([data], limit, 0, (format_address(target), 0))
            for heard, _source in self._heard(lambda: True):
                if packet.number_asked(self._width, heard) == number:
                    return time.monotonic() - began
        return None

    def clock_ahead(self, target: Address) -> float | None:
        """Seconds that the clock of a host is ahead of ours, by an ICMP timestamp (RFC 792); IPv4 only."""
        for _attempt in range(2):
            number = next(self._numbers) & 0xFFFFFFFF
            began = time.time()
            with suppress(OSError):
                self._icmp.sendto(packet.icmp_timestamp(number, began), (format_address(target), 0))
            for heard, source in self._heard(lambda: True):
                ahead = packet.read_timestamp(heard, number, (began + time.time()) / 2)
                if source == target and ahead is not None:
                    return ahead
        return None

    def largest(self, target: Address, low: int, high: int) -> int:
        """The largest echo between the two that comes back; 0 if none does. Under a hundred packets."""
        while True:
            step = max(1, (high - low) // 31)
            sizes = sorted({*range(low, high, step), high})
            answered = self.echoes(target, sizes)
            missing = [size for size in sizes if size not in answered]
            if missing:  # a lost one is no limit
                answered |= self.echoes(target, missing[:4])
            if not answered:
                return 0
            best = max(answered)
            if step == 1 or best == high:
                return best
            low, high = best, min(best + step, high)

    # --- datagrams ---

    def closed_port(self, target: Address, size: int = 84) -> bool:
        """Whether a datagram of this size to a port that nobody has is answered by an error of the peer."""
        return any(self.refused(target, next(self._ports), size) for _attempt in range(2))

    def refused(self, target: Address, port: int, size: int = 84) -> bool:
        """Whether a port is closed. The checksum is left to the device, as for all that sockets send."""
        with socket.socket(self._family, socket.SOCK_DGRAM) as client:
            client.settimeout(self.patience)
            _never_fragment(client, self._width)
            try:
                client.connect((format_address(target), port))
                client.send(bytes(max(1, size - packet.HEADER[self._width] - 8)))
                client.recv(1)
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
            return False

    def closed_port_plain(self, source: Address, target: Address) -> bool:
        """The same with a checksum made here, so that no device has to."""
        for _attempt in range(2):
            ports = (next(self._ports), next(self._ports))
            with suppress(OSError):
                self._send(target, packet.udp_packet(source, target, ports, bytes(56)))
            if self._error(target, _UNREACHABLE[self._width], ports):
                return True
        return False

    def arrives(self, local: Address, target: Address, port: int, data: bytes) -> bool:
        """Whether a datagram with this payload reaches the peer's IP layer."""
        for _attempt in range(2):
            ports = (next(self._ports), port)
            whole = packet.udp_packet(local, target, ports, data)
            body = whole[packet.HEADER[self._width] :]
            if self._width == 4:
                probe = packet.ip_packet(local, target, 17, body, _BAD_RECORD_ROUTE)
            else:
                probe = packet.ip_packet(local, target, 60, _UNKNOWN_OPTION + body)
            with suppress(OSError):
                self._send(target, probe)
            if self._error(target, (_PARAMETER[self._width], None), ports):
                return True
        return False

    def _send(self, target: Address, whole: bytes) -> None:
        self._raw.sendto(whole, (format_address(target), 0))

    def _error(self, peer: Address, kind: tuple[int, int | None], ports: tuple[int, int]) -> bool:
        """Whether the peer itself sends an ICMP error of that kind about a datagram between these ports."""
        wanted = struct.pack("!HH", *ports)
        for data, source in self._heard(lambda: True):
            matches = data[:1] == bytes([kind[0]]) and kind[1] in (None, data[1])
            if matches and source == peer and wanted in data[8:]:
                return True
        return False

    def _heard(self, more: Callable[[], bool]) -> Iterator[tuple[bytes, Address]]:
        """(ICMP message, who sent it) until the time is over or nothing more is wanted."""
        deadline = time.monotonic() + self.patience
        while more() and (left := deadline - time.monotonic()) > 0:
            if not select.select([self._icmp], [], [], left)[0]:
                return
            with suppress(OSError):
                data, where = self._icmp.recvfrom(65535)
                if self._width == 4:
                    data = data[(data[0] & 15) * 4 :]
                yield data, socket.inet_pton(self._family, where[0].partition("%")[0])


# --- the encapsulation ---


def wrapped_echo(device: str, way: Wrapping, seconds: float = SECONDS) -> Answer | None:
    """Send an echo that we wrapped ourselves, and look at the uplink for its answer. Raises OSError.

    The answer is seen as it comes in, before rules and our own tables have a say.
    """
    inner_source = way.source
    number = int.from_bytes(os.urandom(4))
    data = packet.echo_packet(inner_source, way.target, number)
    if way.vni is not None:
        data = packet.vxlan(way.vni, way.target_mac, way.source_mac, data)
    family = socket.AF_INET if len(way.local) == 4 else socket.AF_INET6
    with _watch(device, way.remote) as watcher, socket.socket(family, socket.SOCK_DGRAM) as client:
        client.bind((format_address(way.local), 0))
        for _attempt in range(2):
            began = time.monotonic()
            client.sendto(data, (format_address(way.remote), way.port))
            mac = _wait_for(watcher, way, number, seconds)
            if mac is not None:
                return Answer(time.monotonic() - began, mac)
    return None


def _wait_for(watcher: socket.socket, way: Wrapping, number: int, seconds: float) -> Mac | None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([watcher], [], [], left)[0]:
            return None
        found = packet.read_udp(watcher.recv(65535))
        if found is None or found[0] != way.remote or found[3] != way.port:
            continue
        data, mac = found[4], b""
        if way.vni is not None:
            unwrapped = packet.unwrap_vxlan(data)
            if unwrapped is None or unwrapped[0] != way.vni:
                continue
            _vni, mac, data = unwrapped
        echo = packet.read_echo(data)
        if echo is not None and echo.is_reply and echo.number == number:
            return mac
    return None


def _watch(device: str, remote: Address) -> socket.socket:
    """A socket that sees the datagrams of one host that come in on a device."""
    kind = _ETH_P[len(remote)]
    watcher = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    sniff.attach(watcher, sniff.from_host(remote))
    watcher.bind((device, kind))
    return watcher


def _never_fragment(sock: socket.socket, width: int) -> None:
    """DF on everything, whatever the kernel believes about the way (IP_PMTUDISC_PROBE)."""
    if width == 4:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
