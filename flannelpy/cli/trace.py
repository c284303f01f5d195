"""`flannelpy trace`: the way of a packet from this host to a pod, and a probe that goes there."""

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from flannelpy import inspection
from flannelpy.beside import settings_beside
from flannelpy.cli import packets
from flannelpy.cli.admin import Parser, add_output_flag, dump, shown, wants_json
from flannelpy.cli.doctor import Progress
from flannelpy.doctor.facts import Overlay
from flannelpy.doctor.trace import Trace, trace
from flannelpy.errors import FlannelpyError
from flannelpy.flags import read_address
from flannelpy.model.address import Address, format_address
from flannelpy.model.peer_filter import port_of
from flannelpy.model.traffic import RuleSet

BROKEN = 11
"""Exit code when a step is wrong or the probe is not answered."""
_AFTERWARDS = 0.2
"""Seconds for what is still on its way to us."""
_EPILOG = """\
Flags of the daemon may follow; beside a running daemon none is needed. The steps come from the kernel's own
tables, each against what the lease says. The probe is a ping from this host; a pod that answers no ping is no
fault of the way.
"""


class Probe(NamedTuple):
    """What became of the ping."""

    seconds: float | None
    seen: tuple[tuple[str, bool, bytes], ...]
    """(device, whether it goes out, packet), in the order of time."""


def main(argv: list[str]) -> int:
    """Follow the packet."""
    parser = Parser(
        prog="flannelpy trace",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Follow a packet from this host to a pod through the kernel's tables, then send a ping\n"
        f"and show it decoded on each device. Exit code {BROKEN}: a step is wrong, or nothing comes back.",
        epilog=_EPILOG,
    )
    parser.add_argument("pod_ip", help="the pod's address")
    parser.add_argument("--no-probe", action="store_true", help="send nothing")
    add_output_flag(parser)
    options, rest = parser.parse_known_args(argv)
    address = _address(options.pod_ip)
    if not options.no_probe:
        packets.require()
    known = settings_beside(rest, os.environ)
    with Progress() as progress:
        facts = inspection.inspect(known, most_peers=0, tell=progress.tell, try_features=False)
    if facts.overlay is None:
        raise FlannelpyError(f"the network is not known: {facts.overlay_trouble}")
    found = _follow(facts.overlay, address, inspection.wanted_rules(known, facts))
    probe = None if options.no_probe else _probe(facts.overlay, found)
    port = _port(facts.overlay)
    vxlan = facts.overlay.config.backend_type == "vxlan"
    if wants_json(options):
        print(dump(document(found, probe, port, vxlan=vxlan)))
    else:
        print("\n".join(lines(found, probe, port, vxlan=vxlan)))
    wrong = any(step.wrong for step in found.steps)
    return BROKEN if wrong or (probe is not None and probe.seconds is None) else 0


def _address(text: str) -> Address:
    try:
        found = read_address(text)
    except ValueError as error:
        raise FlannelpyError(f"POD_IP {text[:64]!r}: {error}") from None
    if found is None:
        raise FlannelpyError("POD_IP must be an address, not empty")
    return found


def _follow(overlay: Overlay, address: Address, rules: RuleSet) -> Trace:
    (way,) = inspection.ways_to([address])
    first = trace(overlay, address, way, None, rules)
    lease = first.lease
    # The underlay of udp and of IPv4 overlays is IPv4, where there is any.
    attrs = lease.attrs if lease else None
    outer = None
    if attrs is not None:
        udp = overlay.config.backend_type == "udp"
        ip = attrs.public_ip if (len(address) == 4 or (udp and attrs.public_ip)) else attrs.public_ipv6
        outer = inspection.ways_to([ip])[0] if ip else None
    return trace(overlay, address, way, outer, rules)


def _port(overlay: Overlay) -> int | None:
    observed = overlay.observed
    return port_of(overlay.config, observed.links if observed else {})


def _probe(overlay: Overlay, found: Trace) -> Probe:
    """Ping, and look at the devices meanwhile."""
    if not found.devices:
        return Probe(inspection.echo(found.address), ())
    port, uplink = _port(overlay), overlay.uplink
    network = overlay.config.network
    asked = [
        (device, port if uplink and device == uplink.name else None, network) for device in found.devices
    ]
    with closing(inspection.sniffer(asked)) as sniffer:
        seconds = inspection.echo(found.address)
        seen = [
            (one.device, one.outgoing, one.packet)
            for one in sniffer.packets(_AFTERWARDS)
            if packets.concerns(one.packet, port, None, found.address)
        ]
    return Probe(seconds, tuple(_in_order(seen, found.devices)))


def _in_order(
    seen: Sequence[tuple[str, bool, bytes]], devices: Sequence[str]
) -> list[tuple[str, bool, bytes]]:
    """As a packet meets them: out through the tunnel, then the uplink; in the other way. One of each."""
    first = {(device, outgoing): packet for device, outgoing, packet in reversed(seen)}
    places = [(device, True) for device in devices] + [(device, False) for device in reversed(devices)]
    return [(*place, first[place]) for place in places if place in first]


# --- output ---


def document(found: Trace, probe: Probe | None, port: int | None, *, vxlan: bool) -> dict[str, Any]:
    """For programs."""
    return {
        "address": format_address(found.address),
        "lease": found.lease and found.lease.key,
        "steps": [step._asdict() for step in found.steps],
        "probe": probe
        and {
            "seconds": probe.seconds,
            "packets": [
                {
                    "device": device,
                    "outgoing": outgoing,
                    "bytes": packet.hex(),
                    "layers": packets.layers(packet, port, vxlan=vxlan),
                }
                for device, outgoing, packet in probe.seen
            ],
        },
    }


def lines(found: Trace, probe: Probe | None, port: int | None, *, vxlan: bool) -> list[str]:
    """For a terminal."""
    rows = []
    for step in found.steps:
        rows.append(f"{'X' if step.wrong else ' '} {step.name:10}{shown(step.text)}")
        if step.wrong:
            rows.append(f"    {'':8}{shown(step.wrong)}")
    if probe is None:
        return rows
    rows.append("")
    took = "no answer" if probe.seconds is None else f"answered in {probe.seconds * 1e6:.0f} us"
    rows.append(f"{' ' if probe.seconds else 'X'} {'ping':10}{took}")
    for device, outgoing, packet in probe.seen:
        rows.append(f"    {'out through' if outgoing else 'in through'} {device}, {len(packet)} bytes")
        rows += [f"        {line}" for line in packets.layers(packet, port, vxlan=vxlan)]
    if probe.seconds is None and probe.seen:
        rows.append("    nothing came back on the last of these: flannelpy doctor --peers says why")
    return rows
