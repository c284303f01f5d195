"""The keys of the network config for people: what each means, what holds now, and what a change of it does.

`model/config.py` decides what is valid; this says it in words. Pure.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from flannelpy.model.address import format_address
from flannelpy.model.census import Entry
from flannelpy.model.config import NetworkConfig, decode_json
from flannelpy.model.subnet import is_compatible

Effect: TypeAlias = Literal["live", "restart"]
"""When a change counts: while the daemons run, or for each when it is restarted."""


class Key(NamedTuple):
    """One key of the config. `Backend.` stands before those of the backend."""

    name: str
    meaning: str
    default: str
    effect: Effect
    on_change: str
    """What a change does, in words."""


class Change(NamedTuple):
    """A key whose value in effect differs between two configs."""

    key: Key
    before: str
    """Empty if there was no config."""
    after: str


_APART = "nodes that still have the old value and those with the new one do not reach each other"
_MOVES = "leases that do not fit are replaced when their nodes restart; restart Docker or the pods there, too"
_NEXT = "counts for the next subnet that a node takes; running nodes keep theirs until they restart"
_EACH = "each node follows when its daemon is restarted"

# fmt: off
KEYS = (
    Key("Network", "the IPv4 network that all nodes' subnets are cut from", "none; needed while IPv4 is on",
        "restart", f"{_APART}; {_MOVES}"),
    Key("EnableIPv4", "whether nodes get an IPv4 subnet", "true", "restart", _MOVES),
    Key("SubnetLen", "the prefix length of a node's IPv4 subnet", "24, or two more than Network's if longer",
        "restart", _MOVES),
    Key("SubnetMin", "the first IPv4 subnet that a node may get", "the second of Network", "live", _NEXT),
    Key("SubnetMax", "the last IPv4 subnet that a node may get", "the last of Network", "live", _NEXT),
    Key("EnableIPv6", "whether nodes get an IPv6 subnet", "false", "restart", _MOVES),
    Key("IPv6Network", "the IPv6 network that all nodes' subnets are cut from",
        "none; needed while IPv6 is on", "restart", f"{_APART}; {_MOVES}"),
    Key("IPv6SubnetLen", "the prefix length of a node's IPv6 subnet",
        "64, or two more than IPv6Network's if longer", "restart", _MOVES),
    Key("IPv6SubnetMin", "the first IPv6 subnet that a node may get", "the second of IPv6Network", "live",
        _NEXT),
    Key("IPv6SubnetMax", "the last IPv6 subnet that a node may get", "the last of IPv6Network", "live",
        _NEXT),
    Key("EnableNFTables", "whether traffic rules are made with nftables instead of iptables", "false",
        "live", "each node makes its rules the other way at once; no packet goes without them"),
    Key("Backend.Type", "how packets get from node to node", "udp if there is no Backend", "restart", _APART),
)
BACKEND_KEYS: Mapping[str, tuple[Key, ...]] = {
    "vxlan": (
        Key("Backend.VNI", "the number of the VXLAN; the device is flannel.<VNI>", "1", "restart", _APART),
        Key("Backend.Port", "the UDP port; 0 is the kernel's default, 8472", "0", "restart", _APART),
        Key("Backend.MTU", "instead of the uplink's MTU; 0 takes the uplink's", "0", "restart", _EACH),
        Key("Backend.GBP", "VXLAN group based policy", "false", "restart", _EACH),
        Key("Backend.Learning", "whether the device learns forwarding entries", "false", "restart", _EACH),
        Key("Backend.DirectRouting", "no encapsulation between nodes on one link", "false", "restart", _EACH),
    ),
    "udp": (
        Key("Backend.Port", "the UDP port that nodes send to", "8285", "restart", _APART),
        Key("Backend.FastPath", "whether the kernel carries what it can: auto, on, off", "auto", "restart",
            _EACH),
    ),
    "host-gw": (),
    "alloc": (),
}
"""By backend; keys of others are not known here and never called wrong."""
# fmt: on

_IPV4_ONLY = ("Network", "SubnetLen", "SubnetMin", "SubnetMax")
_IPV6_ONLY = ("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax")


def keys_of(backend_type: str) -> tuple[Key, ...]:
    """All keys that count with this backend."""
    return KEYS + BACKEND_KEYS.get(backend_type, ())


def in_effect(config: NetworkConfig) -> dict[str, str]:
    """What holds, by key: given or by default. "off" for the keys of a family that is off."""
    addresses = (config.subnet_min, config.subnet_max, config.subnet6_min, config.subnet6_max)
    low, high, low6, high6 = ("" if a is None else format_address(a) for a in addresses)
    values = {
        "Network": str(config.network or ""),
        "EnableIPv4": _boolean(config.enable_ipv4),
        "SubnetLen": str(config.subnet_len),
        "SubnetMin": low,
        "SubnetMax": high,
        "EnableIPv6": _boolean(config.enable_ipv6),
        "IPv6Network": str(config.network6 or ""),
        "IPv6SubnetLen": str(config.subnet6_len),
        "IPv6SubnetMin": low6,
        "IPv6SubnetMax": high6,
        "EnableNFTables": _boolean(config.enable_nftables),
        "Backend.Type": config.backend_type,
    }
    off = (() if config.enable_ipv4 else _IPV4_ONLY) + (() if config.enable_ipv6 else _IPV6_ONLY)
    values.update(dict.fromkeys(off, "off"))
    given = {f"backend.{name.casefold()}": value for name, value in config.backend.items()}
    for key in BACKEND_KEYS.get(config.backend_type, ()):
        value = given.pop(key.name.casefold(), None)
        values[key.name] = key.default if value is None else _shown(value)
    if config.backend_type not in BACKEND_KEYS:
        for name, value in config.backend.items():
            if name.casefold() != "type":
                values[f"Backend.{name}"] = _shown(value)
    return values


def changes(before: NetworkConfig | None, after: NetworkConfig) -> tuple[Change, ...]:
    """The keys whose values in effect differ."""
    old = {} if before is None else in_effect(before)
    new = in_effect(after)
    known = {key.name: key for kind in (after, before) if kind for key in keys_of(kind.backend_type)}
    found = []
    for name in dict.fromkeys((*new, *old)):
        if old.get(name, "") != new.get(name, ""):
            key = known.get(name) or Key(name, "an option of the backend", "", "restart", _EACH)
            found.append(Change(key, old.get(name, ""), new.get(name, "")))
    return tuple(found)


def stranded(
    before: NetworkConfig | None, after: NetworkConfig, entries: Iterable[Entry]
) -> tuple[Entry, ...]:
    """The records that a change leaves behind: they do not fit the new config, but did fit the old one."""
    return tuple(
        entry
        for entry in entries
        if entry.lease is not None
        and (before is None or is_compatible(before, *entry.subnets))
        and not is_compatible(after, *entry.subnets)
    )


def remarks(text: str, config: NetworkConfig) -> tuple[str, ...]:
    """What a valid config holds that will surprise: keys that nobody reads. One line each."""
    raw = decode_json(text)
    names: list[str] = list(raw)
    found = [*_unknown(names, "", [*(key.name for key in KEYS if "." not in key.name), "Backend"])]
    if config.backend_type in BACKEND_KEYS:
        backend_names = [key.name.partition(".")[2] for key in BACKEND_KEYS[config.backend_type]]
        found += _unknown(list(config.backend), "Backend.", [*backend_names, "Type"])
    folded = {name.casefold() for name in names}
    for on, switch, keys in (
        (config.enable_ipv4, '"EnableIPv4" is false', _IPV4_ONLY),
        (config.enable_ipv6, '"EnableIPv6" is not true', _IPV6_ONLY),
    ):
        idle = [key for key in keys if not on and key.casefold() in folded]
        if idle:
            found.append(f"{', '.join(idle)}: no effect while {switch}")
    if "backend" not in folded:
        found.append('there is no "Backend": that means udp, the slowest; was {"Type":"vxlan"} meant?')
    return tuple(found)


def _unknown(names: Sequence[str], where: str, known: Sequence[str]) -> list[str]:
    folded = {name.casefold(): name for name in known}
    found = []
    for name in names:
        if name.casefold() not in folded:
            near = difflib.get_close_matches(name[:64].casefold(), folded, n=1, cutoff=0.6)
            hint = f", did you mean {where}{folded[near[0]]}?" if near else ""
            found.append(f"{where}{_shown(name)[:64]} is no key, so it is ignored{hint}")
    return found


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _shown(value: object) -> str:
    """A JSON value on one line, texts without quotes."""
    plain = isinstance(value, str) and value.isprintable()
    text = str(value) if plain else json.dumps(value).replace("\x7f", "\\u007f")
    return text if len(text) <= 200 else f"{text[:197]}..."
