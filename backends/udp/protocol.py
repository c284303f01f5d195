"""How the daemon drives a forwarder: requests and answers, one JSON object per packet of a UNIX socket. Pure.

The socket is an abstract one (SOCK_SEQPACKET), so it belongs to the network namespace, as the device does.
The daemon asks, the forwarder answers; anything that it says unasked is why it ends.

    {"do":"hello"}                          -> {"version":1,"program":"0.1.0","pid":7,"tunnel":{...}|null}
    {"do":"take","tunnel":{...}} + TUN, UDP -> {}       carry packets; without descriptors: keep those there
    {"do":"lend"}                           -> {} + TUN, UDP        copies of them, for whoever comes next
    {"do":"release"}                        -> {}       give them up: packets wait for the next "take"
    {"do":"apply","put":[["10.5.2.0/24","192.0.2.2"]],"gone":["10.5.3.0/24"]}  -> {}
    {"do":"observe","from":0}               -> {"forwards":[[...]],"next":500|null}
    {"do":"counters"}                       -> {"counters":{"sent_packets":1,...}}
    {"do":"stop"}                           -> {}, then it ends
    anything that cannot be done            -> {"error":"why"}
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flannelpy.model.address import Address, Prefix, format_address, parse_address, parse_prefix
from flannelpy.model.kernel import Tunnel

VERSION = 1
PAGE = 500
"""Entries in one message: some 20 kB, well below what a socket's buffer takes."""
MAX_MESSAGE = 1 << 17


def address_of(device: str) -> str:
    """The name of the socket of a device's forwarder."""
    return f"\0flannelpy/udp/{device}"


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as bytes."""
    return json.dumps(message, separators=(",", ":")).encode()


def decode(data: bytes) -> dict[str, Any]:
    """Bytes as a message; ValueError if they are none."""
    try:
        message = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not an object")  # noqa: TRY004  # the bytes are wrong, not the caller
    return message


def encode_tunnel(tunnel: Tunnel) -> dict[str, Any]:
    """A tunnel as JSON."""
    return {
        **tunnel._asdict(),
        "local": format_address(tunnel.local),
        "sources": [format_address(source) for source in tunnel.sources],
    }


def decode_tunnel(value: Mapping[str, Any]) -> Tunnel:
    """JSON as a tunnel; ValueError, TypeError or KeyError if it is none."""
    sources = tuple(parse_address(source) for source in value["sources"])
    return Tunnel(
        str(value["device"]),
        parse_address(value["local"]),
        int(value["port"]),
        int(value["mtu"]),
        sources,
        bool(value["open"]),
        str(value.get("uplink", "")),
        bool(value.get("fast", False)),
    )


def encode_forwards(forwards: Iterable[tuple[Prefix, Address]]) -> list[list[str]]:
    """Table entries as JSON."""
    return [[str(prefix), format_address(address)] for prefix, address in forwards]


def decode_forwards(value: Iterable[Iterable[str]]) -> dict[Prefix, Address]:
    """JSON as table entries; ValueError or TypeError if it is none."""
    return {parse_prefix(prefix).network(): parse_address(address) for prefix, address in value}
