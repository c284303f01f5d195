"""One way to a peer, probed step by step: the underlay, the encapsulation, the overlay, sizes, checksums."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from flannelpy.doctor.facts import Path
from flannelpy.doctor.paths import OTHER_PORTS, Destination
from flannelpy.kernel.probe import SECONDS, Prober, Wrapping, wrapped_echo
from flannelpy.model import packet
from flannelpy.model.address import Address

_BROADCAST = b"\xff" * 6
_PLAIN = b"flannelpy asks whether this arrives"


class _Probers:
    """The sockets of both families, made when they are first needed; `close` them."""

    def __init__(self) -> None:
        self._by_width: dict[int, Prober] = {}

    def of(self, address: bytes) -> Prober:
        """The one for this family."""
        width = len(address)
        if width not in self._by_width:
            self._by_width[width] = Prober(width)
        return self._by_width[width]

    def close(self) -> None:
        """Give the sockets back."""
        for one in self._by_width.values():
            one.close()


def probe(to: Destination) -> Path:
    """All that can be told about the way: hundredths of a second where all is well, else a few seconds."""
    probers = _Probers()
    try:
        return _probe(to, probers)
    finally:
        probers.close()


def _probe(to: Destination, probers: "_Probers") -> Path:
    path, under = to.path, probers.of(to.path.remote)
    path = path._replace(underlay=under.echo(path.remote))
    if path.underlay is None:
        path = path._replace(underlay_udp=under.closed_port(path.remote))
    else:
        under.learn(path.underlay)
        path = _underlay_sizes(path, under)
        if len(path.remote) == 4:
            path = path._replace(clock_ahead=under.clock_ahead(path.remote))
    if path.port is not None:
        path = _tunnel(path, to, under)
    over = probers.of(to.target)
    if over is not under and path.underlay is not None:
        over.learn(path.underlay)
    if to.direct:
        path = path._replace(overlay=over.next_hop(to.target))
        if path.overlay is not None:
            path = path._replace(overlay_full=over.next_hop(to.target, path.mtu) is not None)
            path = _sums(path, under, to.local, path.remote)
        return path
    path = path._replace(overlay=over.echo(to.target))
    if path.overlay is not None:
        path = path._replace(overlay_full=over.echo(to.target, path.mtu) is not None)
        path = _sums(path, over, to.source, to.target)
    return path


def _sums(path: Path, prober: Prober, source: Address, target: Address) -> Path:
    if prober.closed_port(target):
        return path._replace(udp_plain=True, udp_offloaded=True)
    return path._replace(udp_plain=prober.closed_port_plain(source, target))


def _underlay_sizes(path: Path, under: Prober) -> Path:
    if under.echo(path.remote, path.needed) is not None:
        return path._replace(underlay_full=True)
    fits = under.largest(path.remote, 576 if len(path.remote) == 4 else 1280, path.needed)
    out = under.closed_port(path.remote, path.needed)
    return path._replace(underlay_full=False, underlay_fits=fits, out_full=out)


def _tunnel(path: Path, to: Destination, under: Prober) -> Path:
    assert path.port is not None  # noqa: S101  # asked before
    way = Wrapping(
        to.local, path.remote, path.port, to.vni, to.own_mac, path.mac or b"", to.source, to.target
    )
    # A forwarder takes its time on a busy host; a kernel does not.
    patience = SECONDS if to.vni is None else under.patience
    with suppress(OSError):
        answer = wrapped_echo(to.uplink, way, patience)
        if answer is not None:
            return path._replace(tunnel=answer.seconds)
        if to.vni is not None:
            answer = wrapped_echo(to.uplink, way._replace(target_mac=_BROADCAST), under.patience)
            if answer is not None:
                return path._replace(tunnel_by_broadcast=answer.mac)
    if under.refused(path.remote, path.port):
        return path._replace(refused=True)
    return path._replace(arrives=_arrivals(path, to, under.patience))


def _arrivals(path: Path, to: Destination, patience: float) -> dict[str, bool]:
    """What reaches the peer's IP layer, kind by kind: errors that it must send tell it."""
    assert path.port is not None  # noqa: S101
    wrapped = _PLAIN
    if to.vni is not None:
        inner = packet.echo_packet(to.source, to.target, 1)
        wrapped = packet.vxlan(to.vni, path.mac or _BROADCAST, to.own_mac, inner)
    kinds = {"closed": (33433, _PLAIN), "plain": (path.port, _PLAIN), "vxlan": (path.port, wrapped)}
    found = _ask(to, kinds, patience)
    if not found["closed"]:
        return {"closed": False}  # options are dropped somewhere: this tells nothing
    if found["plain"] and not found["vxlan"]:
        others = [port for port in OTHER_PORTS if port != path.port]
        found |= _ask(to, {str(port): (port, wrapped) for port in others}, patience)
    return found


def _ask(to: Destination, kinds: Mapping[str, tuple[int, bytes]], patience: float) -> dict[str, bool]:
    """Whether datagrams (port, payload) arrive, all at the same time."""

    def ask(kind: tuple[int, bytes]) -> bool:
        with closing(Prober(len(to.local))) as prober:
            prober.patience = patience
            return prober.arrives(to.local, to.path.remote, *kind)

    with ThreadPoolExecutor(len(kinds)) as pool:
        return dict(zip(kinds, pool.map(ask, kinds.values()), strict=True))
