"""`flannelpy bench`: what the overlay costs between two hosts, in throughput and round trips.

    on one host    flannelpy bench --serve
    on another     flannelpy bench PEER

Both ways are measured in turns, so that what else happens on the hosts hits both alike; the ratio counts.
"""

import argparse
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from statistics import median
from typing import Any, NamedTuple

from flannelpy import inspection
from flannelpy.beside import settings_beside
from flannelpy.cli.admin import Parser, add_output_flag, dump, table, wants_json
from flannelpy.cli.doctor import Progress
from flannelpy.doctor.facts import Overlay
from flannelpy.errors import FlannelpyError
from flannelpy.model.address import Address, Prefix, format_address, parse_address
from flannelpy.model.lease import Lease

PORT = 7979
_SERVE_SECONDS = 600
_MOST_SECONDS = 60.0
"""A connection may last so long,"""
_MOST_CONNECTIONS = 8
"""and so many at a time."""
_CHUNK = 256 << 10
_TRIPS, _WARM = 300, 20
"""Round trips in a round, of which the first do not count."""
_PATIENCE = 5.0
_SINK, _ECHO = b"S", b"E"
_EPILOG = """\
Flags of the daemon may follow; beside a running daemon none is needed. --serve listens on this host's
addresses in the overlay and on the uplink (TCP), answers only addresses of nodes and pods of this network,
and ends by itself.
"""


class Ways(NamedTuple):
    """Two addresses of one peer."""

    underlay: Address
    overlay: Address


class Measured(NamedTuple):
    """One way: medians over the rounds."""

    gigabits: float
    """Per second."""
    trip: float
    """Seconds."""


def main(argv: list[str]) -> int:
    """Serve, or measure."""
    options, rest = _parser().parse_known_args(argv)
    if options.serve == bool(options.peer):
        raise FlannelpyError("give a PEER to measure, or --serve on that peer")
    if not 0 < options.port < 65536:
        raise FlannelpyError(f"--port {options.port}: must be 1 to 65535")
    known = settings_beside(rest, os.environ)
    with Progress() as progress:
        facts = inspection.inspect(known, most_peers=0, tell=progress.tell, try_features=False)
    overlay = facts.overlay
    if overlay is None or overlay.own is None or overlay.uplink is None:
        raise FlannelpyError(f"this host has no part in the network: {facts.overlay_trouble or 'no lease'}")
    if options.serve:
        local = [own.prefix.address for one in facts.host.interfaces for own in one.addresses]
        return _serve(overlay, local, options.port, options.seconds or _SERVE_SECONDS)
    ways = ways_to(overlay, options.peer)
    seconds, rounds = min(options.seconds or 2, 30), max(1, min(options.rounds, 20))
    with Progress() as progress:
        under, over = _compare(ways, options.port, rounds, seconds, progress.tell)
    print(dump(document(ways, under, over)) if wants_json(options) else "\n".join(lines(ways, under, over)))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="flannelpy bench",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure the overlay between two hosts against the underlay between them.",
        epilog=_EPILOG,
    )
    parser.add_argument("peer", nargs="?", help="the peer's public IP, or an address of its subnet")
    parser.add_argument("--serve", action="store_true", help="be the peer")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="of both (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=int,
        default=0,
        metavar="S",
        help=f"per way and round (default: 2); with --serve until it ends (default: {_SERVE_SECONDS})",
    )
    add_output_flag(parser)
    return parser


# --- which addresses ---


def ways_to(overlay: Overlay, text: str) -> Ways:
    """The two addresses of the peer with this public IP, or this address in its subnet. FlannelpyError."""
    try:
        wanted = parse_address(text)
    except ValueError as error:
        raise FlannelpyError(f"PEER {text[:64]!r}: {error}") from None
    for lease in overlay.leases:
        attrs, is_own = lease.attrs, overlay.own is not None and lease.key == overlay.own.key
        named = wanted in (attrs.public_ip, attrs.public_ipv6)
        inside = any(subnet.has(wanted) for subnet in lease.subnets())
        if is_own or not (named or inside):
            continue
        v4 = len(wanted) == 4
        subnet, public = (lease.subnet, attrs.public_ip) if v4 else (lease.subnet6, attrs.public_ipv6)
        if subnet is None:
            subnet = lease.subnet or lease.subnet6
        public = public or attrs.public_ip or attrs.public_ipv6
        if subnet is not None and public is not None:
            return Ways(public, _address_in(overlay, subnet))
    raise FlannelpyError(f"no other node of the network has {text}: flannelpy lease list shows them")


def _address_in(overlay: Overlay, subnet: Prefix) -> Address:
    """What a node has in the overlay: its tunnel device's address; without a device that of its bridge."""
    return subnet.address if overlay.observed is not None and overlay.observed.links else subnet.nth(1)


def _allowed(leases: Sequence[Lease]) -> Callable[[Address], bool]:
    subnets = [subnet for lease in leases for subnet in lease.subnets()]
    hosts = {ip for lease in leases for ip in (lease.attrs.public_ip, lease.attrs.public_ipv6) if ip}
    return lambda address: address in hosts or any(subnet.has(address) for subnet in subnets)


# --- the serving side ---


def _serve(overlay: Overlay, local: Sequence[Address], port: int, seconds: float) -> int:
    own, uplink = overlay.own, overlay.uplink
    assert own is not None and uplink is not None  # noqa: S101, PT018  # asked before
    asked = [uplink.address, uplink.address6, *(_address_in(overlay, subnet) for subnet in own.subnets())]
    allowed = _allowed(overlay.leases)
    with ExitStack() as stack:
        listeners = []
        for address in asked:
            if address is None or address not in local:
                continue
            try:
                listeners.append(stack.enter_context(_listen(address, port)))
            except OSError as error:
                raise FlannelpyError(
                    f"cannot listen on {format_address(address)} port {port}: {error.strerror};"
                    " --port chooses another"
                ) from None
        names = ", ".join(listener.getsockname()[0] for listener in listeners)
        print(f"serving on {names}, TCP port {port}, for {seconds:g} s; Ctrl-C stops", flush=True)
        with suppress(KeyboardInterrupt):
            _accept(listeners, allowed, time.monotonic() + seconds)
    return 0


def _listen(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((format_address(address), port))
    except OSError:
        listener.close()
        raise
    listener.listen(_MOST_CONNECTIONS)
    return listener


def _accept(listeners: Sequence[socket.socket], allowed: Callable[[Address], bool], deadline: float) -> None:
    room = threading.Semaphore(_MOST_CONNECTIONS)
    while (left := deadline - time.monotonic()) > 0:
        for listener in select.select(listeners, [], [], min(left, 1.0))[0]:
            connection, where = listener.accept()
            source = socket.inet_pton(listener.family, where[0].partition("%")[0])
            if not allowed(source) or not room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=_answer, args=(connection, room), daemon=True).start()


def _answer(connection: socket.socket, room: threading.Semaphore) -> None:
    """Take what comes and tell how much it was; or send each byte back."""
    with connection, suppress(OSError):
        connection.settimeout(_PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + _MOST_SECONDS
        if connection.recv(1) == _SINK:
            buffer, count, began = bytearray(_CHUNK), 0, 0.0
            while (got := connection.recv_into(buffer)) and time.monotonic() < deadline:
                began = began or time.monotonic()
                count += got
            connection.sendall(f"{count} {time.monotonic() - began:.6f}\n".encode())
        else:
            while (byte := connection.recv(1)) and time.monotonic() < deadline:
                connection.sendall(byte)
    room.release()


# --- the measuring side ---


def _compare(
    ways: Ways, port: int, rounds: int, seconds: float, tell: Callable[[str], None]
) -> tuple[Measured, Measured]:
    """(the underlay, the overlay)."""
    speeds: dict[Address, list[float]] = {ways.underlay: [], ways.overlay: []}
    trips: dict[Address, list[float]] = {ways.underlay: [], ways.overlay: []}
    for number in range(rounds):
        for name, address in zip(Ways._fields, ways, strict=True):
            tell(f"the {name}, round {number + 1} of {rounds}")
            with _named(name, address, port):
                speeds[address].append(_throughput(address, port, seconds))
        tell(f"round trips, round {number + 1} of {rounds}")
        with _named("overlay", ways.overlay, port):
            for address, found in _trips(ways, port).items():
                trips[address] += found
    under, over = (Measured(median(speeds[one]), median(trips[one])) for one in ways)
    return under, over


@contextmanager
def _named(name: str, address: Address, port: int) -> Iterator[None]:
    """FlannelpyError instead of OSError and ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FlannelpyError(
            f"the {name} address {format_address(address)}, TCP port {port}: {reason}; does flannelpy bench"
            " --serve run there, and is the port open?"
        ) from None


def _connect(address: Address, port: int, kind: bytes) -> socket.socket:
    client = socket.create_connection((format_address(address), port), _PATIENCE)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(kind)
    return client


def _throughput(address: Address, port: int, seconds: float) -> float:
    """Gbit/s as the far side counts them."""
    chunk = memoryview(bytes(_CHUNK))
    with _connect(address, port, _SINK) as client:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            client.sendall(chunk)
        client.shutdown(socket.SHUT_WR)
        count, took = client.makefile("rb").readline(64).split()
    return int(count) * 8 / max(float(took), 1e-6) / 1e9


def _trips(ways: Ways, port: int) -> dict[Address, list[float]]:
    """Round trips of a byte on both ways, in turns: what the processor does meanwhile hits both alike."""
    found: dict[Address, list[float]] = {address: [] for address in ways}
    with ExitStack() as stack:
        clients = {one: stack.enter_context(_connect(one, port, _ECHO)) for one in ways}
        for number in range(_TRIPS):
            for address, client in clients.items():
                began = time.perf_counter()
                client.sendall(b".")
                if not client.recv(1):
                    raise ValueError("the far side hung up")
                if number >= _WARM:
                    found[address].append(time.perf_counter() - began)
    return found


# --- output ---


def document(ways: Ways, under: Measured, over: Measured) -> dict[str, Any]:
    """For programs."""
    return {
        "underlay": {"address": format_address(ways.underlay), **under._asdict()},
        "overlay": {"address": format_address(ways.overlay), **over._asdict()},
        "ratio": {"gigabits": over.gigabits / under.gigabits, "trip": over.trip / under.trip},
    }


def lines(ways: Ways, under: Measured, over: Measured) -> list[str]:
    """For a terminal."""
    ends = (f"underlay {format_address(ways.underlay)}", f"overlay {format_address(ways.overlay)}")
    rows = [
        (
            "TCP",
            f"{under.gigabits:.3f} Gbit/s",
            f"{over.gigabits:.3f} Gbit/s",
            f"{over.gigabits / under.gigabits:.2f}",
        ),
        (
            "round trip",
            f"{under.trip * 1e6:.0f} us",
            f"{over.trip * 1e6:.0f} us",
            f"{over.trip / under.trip:.2f}",
        ),
    ]
    return table(("", *ends, "ratio"), rows)
