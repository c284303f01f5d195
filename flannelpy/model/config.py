"""The network config: flannel's `net-conf.json`, kept in the store or in a file, -> `NetworkConfig`.

What flannel reads is read here the same way (Go's encoding/json: keys in any case, the last duplicate
wins, unknown keys are ignored, types are strict). What flannel lets through and then stumbles over is
refused, by one line that names the key, the value and the rule.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flannelpy.model.address import Address, Prefix, format_address, parse_address, parse_prefix

EXAMPLE_CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
"""The shortest config that works."""

MAX_CHARACTERS = 65536
"""The longest JSON text that is read, of a config or of a lease."""

MAX_DEPTH = 32
"""How deep arrays and objects may be nested: later steps compare and print the values recursively."""


class ConfigError(ValueError):
    """The network config is not usable: one line with the key, the value and the rule."""


class NetworkConfig(NamedTuple):
    """A checked network config. All values of a family that is not enabled are None or 0."""

    network: Prefix | None
    network6: Prefix | None
    enable_ipv4: bool
    enable_ipv6: bool
    enable_nftables: bool
    subnet_len: int
    subnet_min: Address | None
    """The first subnet that may be leased: its address."""
    subnet_max: Address | None
    """The last subnet that may be leased: its address."""
    subnet6_len: int
    subnet6_min: Address | None
    subnet6_max: Address | None
    backend_type: str
    """In lower case; "udp" when the config has no Backend, as in flannel."""
    backend: Mapping[str, Any]
    """The Backend object as it stands, with `Type`; read it through `Section(config.backend, "Backend")`."""


class Section:
    """A JSON object whose keys are matched in any case and whose values are checked when they are read.

    `where` is the object's own key for messages ("Backend"), empty for the whole config. A JSON `null`
    counts as absent, as Go treats it for numbers, booleans and strings. Every method raises `ConfigError`.
    """

    __slots__ = ("_values", "_where")

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self._where = f"{where}." if where else ""
        self._values = {key.casefold(): value for key, value in raw.items()}

    def __contains__(self, key: str) -> bool:
        return key.casefold() in self._values

    def value(self, key: str) -> Any:
        """The decoded value, or None when it is absent or null."""
        return self._values.get(key.casefold())

    def error(self, key: str, rule: str) -> ConfigError:
        """The error to raise for the value of `key`."""
        return ConfigError(f"{self._where}{key} is {_shown(self.value(key))}: {rule}")

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """An integer in low..high; `default` itself need not lie in there."""
        value = self.value(key)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"it must be an integer from {low} to {high}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; no numbers, no strings."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false, without quotes")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "it must be a string")
        return value


class _Family(NamedTuple):
    """What differs between the families: the keys, and the limits that flannel sets."""

    name: str
    bits: int
    enable: str
    network: str
    subnet_len: str
    subnet_min: str
    subnet_max: str
    usual_len: int
    longest_subnet: int
    unusable: tuple[tuple[Prefix, str], ...]
    example: str


_V4 = _Family(
    *("IPv4", 32, "EnableIPv4", "Network", "SubnetLen", "SubnetMin", "SubnetMax", 24, 30),
    (
        (parse_prefix("127.0.0.0/8"), "loopback addresses"),
        (parse_prefix("224.0.0.0/4"), "multicast addresses"),
    ),
    "10.5.0.0/16",
)
_V6 = _Family(
    *("IPv6", 128, "EnableIPv6", "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", 64, 126),
    (
        (parse_prefix("::/96"), "the loopback and IPv4-compatible addresses"),
        (parse_prefix("::ffff:0:0/96"), "IPv4-mapped addresses"),
        (parse_prefix("ff00::/8"), "multicast addresses"),
    ),
    "fd00:10:5::/48",
)


class _Pool(NamedTuple):
    """One family's part of the config."""

    network: Prefix | None = None
    length: int = 0
    low: Address | None = None
    high: Address | None = None


def parse_config(text: str) -> NetworkConfig:
    """The JSON text -> a config that can be served; raises `ConfigError`."""
    try:
        raw = decode_json(text)
    except ValueError as error:
        raise ConfigError(f"the network config is not usable JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"the network config is {_shown(raw)}: it must be a JSON object like {EXAMPLE_CONFIG}"
        )
    top = Section(raw)
    enable_ipv4 = top.boolean("EnableIPv4", default=True)
    enable_ipv6 = top.boolean("EnableIPv6", default=False)
    v4 = _pool(top, _V4, enabled=enable_ipv4)
    v6 = _pool(top, _V6, enabled=enable_ipv6)
    if not enable_ipv4 and not enable_ipv6:
        raise ConfigError("EnableIPv4 is false and EnableIPv6 is not true: enable at least one of them")
    backend_type, backend = _backend(top)
    return NetworkConfig(
        network=v4.network,
        network6=v6.network,
        enable_ipv4=enable_ipv4,
        enable_ipv6=enable_ipv6,
        enable_nftables=top.boolean("EnableNFTables", default=False),
        subnet_len=v4.length,
        subnet_min=v4.low,
        subnet_max=v4.high,
        subnet6_len=v6.length,
        subnet6_min=v6.low,
        subnet6_max=v6.high,
        backend_type=backend_type,
        backend=backend,
    )


def _backend(top: Section) -> tuple[str, Mapping[str, Any]]:
    if "Backend" not in top:
        return "udp", {}
    raw = top.value("Backend")
    if raw is not None and not isinstance(raw, dict):
        raise top.error("Backend", 'it must be an object like {"Type":"vxlan"}')
    backend = {} if raw is None else raw
    backend_type = Section(backend, "Backend").text("Type", "").lower()
    if not backend_type:
        raise ConfigError('Backend.Type is missing: name the backend, for example {"Type":"vxlan"}')
    return backend_type, backend


def _pool(top: Section, family: _Family, *, enabled: bool) -> _Pool:
    """One family's keys. Values are read even when the family is off, as flannel does; rules need it on."""
    network = _read_network(top, family)
    length = top.integer(family.subnet_len, 0, 0, family.bits)
    low = _read_address(top, family, family.subnet_min)
    high = _read_address(top, family, family.subnet_max)
    if not enabled:
        return _Pool()
    if network is None:
        raise ConfigError(_network_missing(family))
    for block, meaning in family.unusable:
        if network.overlaps(block):
            raise top.error(family.network, f"it overlaps {meaning} ({block}), which cannot be routed")
    length = _subnet_length(top, family, network, length)
    size = 1 << (family.bits - length)
    if low is None:
        low = network.nth(size)
    else:
        _check_bound(top, family, family.subnet_min, network, Prefix(low, length))
    if high is None:
        high = Prefix((network.last - size + 1).to_bytes(family.bits // 8), length).address
    else:
        _check_bound(top, family, family.subnet_max, network, Prefix(high, length))
    if low > high:
        raise ConfigError(
            f"{family.subnet_min} is {format_address(low)}, {family.subnet_max} is {format_address(high)}: "
            f"the first must not lie after the second"
        )
    return _Pool(network, length, low, high)


def _network_missing(family: _Family) -> str:
    other = _V6 if family is _V4 else _V4
    return (
        f"{family.network} is missing while {family.enable} is true"
        f'{" (the default)" if family is _V4 else ""}: add "{family.network}":"{family.example}", '
        f'or set "{family.enable}":false for a network with {other.name} only'
    )


def _subnet_length(top: Section, family: _Family, network: Prefix, given: int) -> int:
    """The length of a lease's subnet: given, or chosen as flannel does; 0 means not given."""
    shortest = network.length + 2
    if given == 0:
        if shortest > family.longest_subnet:
            raise top.error(
                family.network,
                f"it is too small to be split into subnets: at most /{family.longest_subnet - 2} will do",
            )
        return max(family.usual_len, shortest)
    if not shortest <= given <= family.longest_subnet:
        limits = f"from {shortest} to {family.longest_subnet}"
        if shortest > family.longest_subnet:
            limits = f"at most {family.longest_subnet}, and {network} leaves no room for that"
        raise top.error(
            family.subnet_len,
            f"with {family.network} {network} it must be {limits} (four subnets of four addresses at least)",
        )
    return given


def _check_bound(top: Section, family: _Family, key: str, network: Prefix, subnet: Prefix) -> None:
    if not network.has(subnet.address):
        raise top.error(key, f"it must lie inside {family.network} {network}")
    aligned = subnet.network()
    if aligned != subnet:
        raise top.error(key, f"it must be the first address of a /{subnet.length} subnet, such as {aligned}")


def _read_network(top: Section, family: _Family) -> Prefix | None:
    key = family.network
    if key not in top:
        return None
    rule = f"it must be an {family.name} network like {family.example}"
    value = top.value(key)
    if not isinstance(value, str):
        raise top.error(key, rule)
    try:
        prefix = parse_prefix(value)
    except ValueError:
        raise top.error(key, rule) from None
    if prefix.bits != family.bits:
        remedy = f" ({(_V6 if family is _V4 else _V4).network} is the key for the other family)"
        raise top.error(key, rule + remedy)
    return prefix.network()


def _read_address(top: Section, family: _Family, key: str) -> Address | None:
    """An address, or None when it is absent or all zeros (flannel's "not set")."""
    if key not in top:
        return None
    value = top.value(key)
    if value is None and family is _V6:
        return None
    rule = f"it must be an {family.name} address"
    if not isinstance(value, str):
        raise top.error(key, rule)
    try:
        address = parse_address(value)
    except ValueError:
        raise top.error(key, rule) from None
    if len(address) * 8 != family.bits:
        raise top.error(key, rule)
    return address if any(address) else None


def overlap_warnings(
    config: NetworkConfig,
    addresses: Iterable[tuple[str, Prefix]],
    routes: Iterable[tuple[str, Prefix]],
    ours: frozenset[str],
    own: Sequence[Prefix] = (),
) -> tuple[str, ...]:
    """What on this host clashes with the overlay's networks, one line each.

    `addresses` are (device, address/length), `routes` are (device, destination); `ours` are devices of ours
    and `own` our leased subnets: what lies inside them is the container bridge. Default routes do not count,
    and the connected route of an address that was named is not named again.
    """
    networks = [
        (key, network)
        for key, network in ((_V4.network, config.network), (_V6.network, config.network6))
        if network is not None
    ]
    found: dict[tuple[str, Prefix], str] = {}
    for kind, entries in (("address", addresses), ("route", routes)):
        for device, prefix in entries:
            block = prefix.network()
            if device in ours or block.length == 0 or any(subnet.contains(block) for subnet in own):
                continue
            for key, network in networks:
                if network.overlaps(block):
                    found.setdefault(
                        (device, block),
                        f"{kind} {prefix} on {device} overlaps {key} {network}: traffic for one of them will "
                        f"go to the other; choose a {key} that this host does not use",
                    )
    return tuple(found.values())


def decode_json(text: str) -> Any:
    """JSON text -> values, bounded; raises ValueError with a reason.

    Of equal keys the last wins and stands where it was read, so that a later match in any case sees the right
    order. Half of a surrogate pair becomes U+FFFD, as in Go: it could not be written anywhere.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    start = len(text) - len(text.lstrip(_BLANKS))
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if end != len(text) and text[end:].strip(_BLANKS):
        raise ValueError(f"there is more after its end: {text[end:].strip(_BLANKS)[:20]!r}")
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text or not text.isascii():
        return _without_surrogates(value)
    return value


def _last_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        values.clear()
        for key, value in pairs:
            values.pop(key, None)
            values[key] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_BLANKS = " \t\r\n"
_DECODER = json.JSONDecoder(object_pairs_hook=_last_wins, parse_constant=_no_constant)


def _depth(value: Any) -> int:
    """How deep arrays and objects are nested; not recursive itself."""
    depth = 0
    layer = [value]
    while layer := [item for item in layer if isinstance(item, dict | list)]:
        depth += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    """A JSON value for a message, on one line and short."""
    text = json.dumps(value)
    return text if len(text) <= 64 else f"{text[:60]}..."
