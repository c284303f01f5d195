"""`flannelpy capture`: the overlay's packets on the uplink, with what is inside; shown, or in a file."""

import argparse
import os
import sys
import time
from contextlib import closing
from typing import NamedTuple

from flannelpy import inspection
from flannelpy.beside import settings_beside
from flannelpy.cli import packets
from flannelpy.cli.admin import Parser, add_output_flag, dump, wants_json
from flannelpy.cli.doctor import Progress
from flannelpy.doctor.facts import Overlay
from flannelpy.errors import FlannelpyError
from flannelpy.flags import read_address
from flannelpy.model.address import Address, Prefix, format_address
from flannelpy.model.packet import Seen, addresses
from flannelpy.model.peer_filter import port_of

_EPILOG = """\
Flags of the daemon may follow; beside a running daemon none is needed. Stops at Ctrl-C, after --count packets
or after --seconds. The file holds IP packets (LINKTYPE_RAW), for tcpdump and wireshark.
"""


class _Wish(NamedTuple):
    peer: Address | None
    pod: Address | None
    most: int
    seconds: float
    write: str
    layers: bool
    json: bool


class _Place(NamedTuple):
    """Where to look, and for what."""

    subnets: tuple[Prefix, ...]
    """The peer's, where nothing is wrapped: then its packets have its pods' addresses."""

    device: str
    port: int | None
    network: Prefix | None
    vxlan: bool


def main(argv: list[str]) -> int:
    """Show packets until enough was seen."""
    parser = Parser(
        prog="flannelpy capture",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the overlay's packets as they pass the uplink, with what is inside.",
        epilog=_EPILOG,
    )
    parser.add_argument("--peer", default="", metavar="IP", help="only those from or to this public IP")
    parser.add_argument("--pod", default="", metavar="IP", help="only those from or to this pod")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="stop after so many")
    parser.add_argument("--seconds", type=int, default=0, metavar="S", help="stop after so long")
    parser.add_argument("--write", default="", metavar="FILE", help="write a pcap file, too")
    parser.add_argument("--layers", action="store_true", help="all layers with their fields")
    add_output_flag(parser)
    options, rest = parser.parse_known_args(argv)
    wish = _Wish(
        _address("--peer", options.peer),
        _address("--pod", options.pod),
        max(0, options.count),
        max(0, options.seconds) or 1e9,
        options.write,
        options.layers,
        wants_json(options),
    )
    packets.require()
    known = settings_beside(rest, os.environ)
    with Progress() as progress:
        facts = inspection.inspect(known, most_peers=0, tell=progress.tell, try_features=False)
    if facts.overlay is None:
        raise FlannelpyError(f"the network is not known: {facts.overlay_trouble}")
    return _capture(_place(facts.overlay, wish.peer), wish)


def _address(flag: str, text: str) -> Address | None:
    try:
        return read_address(text)
    except ValueError as error:
        raise FlannelpyError(f"{flag} {text[:64]!r}: {error}") from None


def _place(overlay: Overlay, peer: Address | None) -> _Place:
    if overlay.uplink is None:
        raise FlannelpyError(f"there is no uplink to look at: {overlay.uplink_reason}")
    links = overlay.observed.links if overlay.observed else {}
    port = port_of(overlay.config, links)
    theirs = tuple(
        subnet
        for lease in overlay.leases
        if peer is not None and peer in (lease.attrs.public_ip, lease.attrs.public_ipv6)
        for subnet in lease.subnets()
    )
    vxlan = overlay.config.backend_type == "vxlan"
    return _Place(theirs, overlay.uplink.name, port, overlay.config.network, vxlan)


def _capture(place: _Place, wish: _Wish) -> int:
    """Look until it is enough; how many there were is said at the end, on stderr."""
    pcap = packets.Pcap(wish.write) if wish.write else None
    shown = 0
    what = f"UDP port {place.port}" if place.port else f"packets of {place.network or 'the network'}"
    print(f"looking at {what} on {place.device}; Ctrl-C stops", file=sys.stderr, flush=True)
    with closing(inspection.sniffer([(place.device, place.port, place.network)])) as sniffer:
        try:
            for one in sniffer.packets(wish.seconds):
                if not _is_wanted(one, place, wish):
                    continue
                shown += 1
                _show(place, wish, one)
                if pcap is not None:
                    pcap.write(one.packet, one.at)
                if shown == wish.most:
                    break
        except KeyboardInterrupt:
            pass
        finally:
            dropped = sniffer.dropped()
            if pcap is not None:
                pcap.close()
    lost = f", {dropped} came too fast and were not seen" if dropped else ""
    where = f", written to {wish.write}" if pcap else ""
    print(f"{shown} packets{where}{lost}", file=sys.stderr)
    return 0


def _is_wanted(one: Seen, place: _Place, wish: _Wish) -> bool:
    if place.port is not None or wish.peer is None:
        return packets.concerns(one.packet, place.port, wish.peer, wish.pod)
    ends = addresses(one.packet) or ()
    of_peer = any(subnet.has(end) for subnet in place.subnets for end in ends)
    return of_peer and packets.concerns(one.packet, None, None, wish.pod)


def _show(place: _Place, wish: _Wish, one: Seen) -> None:
    port, vxlan = place.port, place.vxlan
    if wish.json:
        outside = addresses(one.packet) or (b"\0" * 4, b"\0" * 4)
        document = {
            "at": one.at,
            "outgoing": one.outgoing,
            "from": format_address(outside[0]),
            "to": format_address(outside[1]),
            "text": packets.in_words(one.packet, port, vxlan=vxlan),
            "layers": packets.layers(one.packet, port, vxlan=vxlan) if wish.layers else None,
        }
        print(dump(document), flush=True)
        return
    clock = time.strftime("%H:%M:%S", time.gmtime(one.at)) + f".{int(one.at % 1 * 1e6):06d}"
    print(clock, ">" if one.outgoing else "<", packets.in_words(one.packet, port, vxlan=vxlan), flush=True)
    if wish.layers:
        print("\n".join(f"    {line}" for line in packets.layers(one.packet, port, vxlan=vxlan)), flush=True)
