"""Leases as flannel writes them (keys and values under `<prefix>/subnets/`), and which subnet to claim next.

Keys: `10.5.52.0-24`, `10.5.52.0-24&fd00:0:0:1::-64`, and without IPv4 `0.0.0.0-0&fd00:0:0:1::-64`.
Values: one line of JSON, byte for byte what Go's encoding/json makes of flannel's LeaseAttrs.
"""

import json
import re
import socket
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple, TypeAlias

from flannelpy.model.address import Address, Prefix, format_address, parse_address, parse_v4, parse_v6
from flannelpy.model.config import NetworkConfig, decode_json
from flannelpy.model.lease import LeaseAttrs

Pair: TypeAlias = tuple[Prefix | None, Prefix | None]
"""(IPv4 subnet, IPv6 subnet)."""


class Previous(NamedTuple):
    """What `subnet.env` said when the daemon started: a wish, never a claim."""

    network: Prefix | None = None
    subnet: Prefix | None = None
    network6: Prefix | None = None
    subnet6: Prefix | None = None


class PoolFull(ValueError):  # noqa: N818
    """No subnet of the network is free."""


# --- keys ---

_NO_IPV4 = "0.0.0.0-0"
_KEY = re.compile(r"([0-9]+\.[0-9]+\.[0-9]+\.[0-9]+)-([0-9]{1,3})(?:&([a-f0-9:]+)-([0-9]{1,3}))?")


def format_key(subnet: Prefix | None, subnet6: Prefix | None) -> str:
    """The last part of a lease's etcd key; at least one of the two must be given."""
    if subnet is None and subnet6 is None:
        raise ValueError("a lease needs an IPv4 or an IPv6 subnet")
    key = _NO_IPV4 if subnet is None else f"{format_address(subnet.address)}-{subnet.length}"
    return key if subnet6 is None else f"{key}&{_go_text(subnet6.address)}-{subnet6.length}"


def parse_key(text: str) -> Pair:
    """The last part of a lease's etcd key -> (IPv4 subnet, IPv6 subnet); ValueError otherwise.

    flannel lets anything stand before the address; this does not. Host bits are masked off and a length may
    have leading zeros, so two keys may mean one subnet: compare leases by subnet, address records by key.
    """
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text[:80]!r} is not a lease key like 10.5.52.0-24 or 10.5.52.0-24&fd00:0:0:1::-64"
        )
    v4, v4_length, v6, v6_length = match.groups()
    subnet6 = None if v6 is None else _subnet(parse_v6(v6), int(v6_length))
    if subnet6 is not None and text.startswith(_NO_IPV4 + "&"):
        return None, subnet6
    return _subnet(parse_v4(v4), int(v4_length)), subnet6


def _subnet(address: Address, length: int) -> Prefix:
    """A leased subnet. flannel refuses whole-address lengths; a length of 0 would be everybody's address."""
    bits = len(address) * 8
    if not 0 < length < bits:
        raise ValueError(
            f"{format_address(address)}-{length}: the length of a subnet must be from 1 to {bits - 1}"
        )
    return Prefix(address, length).network()


def _go_text(address: Address) -> str:
    """An IPv6 address as flannel prints it: dotted if IPv4-mapped or of just four significant bytes."""
    if address.startswith(_MAPPED) or (not any(address[:12]) and address[12]):
        return socket.inet_ntop(socket.AF_INET, address[12:])
    if not any(address[:12]) and any(address):
        # inet_ntop prints ::1:2 as ::0.1.0.2.
        high, low = int.from_bytes(address[12:14]), int.from_bytes(address[14:])
        return f"::{high:x}:{low:x}" if high else f"::{low:x}"
    return socket.inet_ntop(socket.AF_INET6, address)


_MAPPED = bytes(10) + b"\xff\xff"

# --- values ---

_GO_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
_FIELDS = ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data")
_PLAIN = json.JSONDecoder(parse_constant=int)  # ValueError: NaN is no JSON
_PLAIN_SIZE = 1000
_FIELD_SET = frozenset(_FIELDS)
_UNSET = (bytes(4), bytes(16))
_FOLDED_FIELDS = {name.casefold(): name for name in _FIELDS}


def encode_attrs(attrs: LeaseAttrs) -> str:
    """The value of a lease as Go's encoding/json writes it: fixed order, no blanks, no empty fields."""
    public_ip, public_ipv6, backend_type, data, data6 = attrs
    fields: dict[str, Any] = {
        "PublicIP": "0.0.0.0" if public_ip is None else format_address(public_ip),
        "PublicIPv6": None if public_ipv6 is None else _go_text(public_ipv6),
    }
    if backend_type:
        fields["BackendType"] = backend_type
    if data is not None:
        fields["BackendData"] = data
    if data6 is not None:
        fields["BackendV6Data"] = data6
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_GO_ESCAPES)


def decode_attrs(text: str | bytes) -> LeaseAttrs:
    """The value of a lease -> attributes; ValueError with the reason otherwise.

    Keys in any case, unknown ones ignored, as Go decodes. A missing PublicIP or 0.0.0.0 is None. The backend
    data are any JSON: the backend checks them.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    values = _decode_plainly(text)
    if values is None:
        values = decode_json(text)
    if not isinstance(values, dict):
        raise ValueError("the value of a lease must be a JSON object")  # noqa: TRY004
    if not values.keys() <= _FIELD_SET:
        values = {_FOLDED_FIELDS.get(key.casefold(), ""): value for key, value in values.items()}
    return LeaseAttrs(
        _address(values, "PublicIP", parse_v4) if "PublicIP" in values else None,
        _address(values, "PublicIPv6", _parse_v6_field) if values.get("PublicIPv6") is not None else None,
        _text(values, "BackendType") if values.get("BackendType") is not None else "",
        values.get("BackendData"),
        values.get("BackendV6Data"),
    )


def _decode_plainly(text: str) -> Any:
    """What flannel itself writes, in half the time: short, ASCII, no escapes, keys in their usual case.

    None = look closer. With these keys alone "the last of equal keys wins" needs no care.
    """
    if len(text) > _PLAIN_SIZE or not text.isascii() or "\\" in text or text.count("{") > 3 or "[" in text:
        return None
    try:
        values, end = _PLAIN.raw_decode(text)
    except ValueError:
        return None
    plain = end == len(text) and type(values) is dict and values.keys() <= _FIELD_SET
    return values if plain else None


def _address(values: dict[str, Any], key: str, parse: Callable[[str], Address]) -> Address | None:
    text = _text(values, key)
    try:
        address = parse(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return None if address in _UNSET else address


def _parse_v6_field(text: str) -> Address:
    """Go stores a dotted text in an IPv6 field as an IPv4-mapped address."""
    address = parse_address(text)
    return _MAPPED + address if len(address) == 4 else address


def _text(values: dict[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {json.dumps(value)[:64]}")  # noqa: TRY004
    return value


# --- the pool ---


class Pool(NamedTuple):
    """The subnets of one family that may be leased, numbered 0..size-1 from the first."""

    network: Prefix
    length: int
    low: Address
    high: Address

    @property
    def size(self) -> int:
        """How many subnets there are, taken ones included."""
        return self._index(int.from_bytes(self.high)) + 1

    def _index(self, address: int) -> int:
        """The number of the subnet that holds `address`; negative before the first."""
        return (address - int.from_bytes(self.low)) >> (self.network.bits - self.length)

    def subnet(self, index: int) -> Prefix:
        """The subnet with this number."""
        return Prefix(
            Prefix(self.low, self.length).nth(index << (self.network.bits - self.length)), self.length
        )

    def holds(self, subnet: Prefix) -> bool:
        """Whether `subnet` is one of these: flannel's test of an old lease against a new config."""
        return (
            subnet.length == self.length
            and len(subnet.address) == len(self.low)
            and self.low <= subnet.network().address <= self.high
        )

    def taken(self, leased: Iterable[Prefix]) -> list[tuple[int, int]]:
        """The numbers that overlap a leased subnet of any length: sorted, disjoint ranges (first, last)."""
        top = self.size - 1
        ranges = sorted((self._index(subnet.first), self._index(subnet.last)) for subnet in leased)
        merged: list[tuple[int, int]] = []
        for first, last in ranges:
            low, high = max(first, 0), min(last, top)
            if low > high:
                continue
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            else:
                merged.append((low, high))
        return merged


def pools(config: NetworkConfig) -> tuple[Pool | None, Pool | None]:
    """The IPv4 and the IPv6 pool; None for a family that is off."""
    v4 = v6 = None
    if config.network is not None and config.subnet_min is not None and config.subnet_max is not None:
        v4 = Pool(config.network, config.subnet_len, config.subnet_min, config.subnet_max)
    if config.network6 is not None and config.subnet6_min is not None and config.subnet6_max is not None:
        v6 = Pool(config.network6, config.subnet6_len, config.subnet6_min, config.subnet6_max)
    return v4, v6


def pool_size(config: NetworkConfig) -> tuple[int, int]:
    """How many nodes fit: the number of IPv4 and of IPv6 subnets, 0 for a family that is off."""
    v4, v6 = pools(config)
    return (0 if v4 is None else v4.size), (0 if v6 is None else v6.size)


def is_compatible(config: NetworkConfig, subnet: Prefix | None, subnet6: Prefix | None) -> bool:
    """Whether a lease of these subnets fits the config: exactly its families, in range, of its length."""
    return all(
        leased is None if pool is None else leased is not None and pool.holds(leased)
        for pool, leased in zip(pools(config), (subnet, subnet6), strict=True)
    )


def choose(
    config: NetworkConfig,
    taken: Iterable[Pair],
    previous: Previous,
    random: Random,
) -> Pair:
    """The subnets to claim: per family the previous one if it fits and is free, else a random free one.

    Uniform over the whole range, so that nodes that join together rarely meet (flannel draws from the first
    100). Takes time in proportion to the taken subnets, whatever the size of the pool. Raises `PoolFull`.
    """
    leases = list(taken)
    v4, v6 = pools(config)
    leased = [subnet for subnet, _ in leases if subnet is not None]
    leased6 = [subnet6 for _, subnet6 in leases if subnet6 is not None]
    return (
        None if v4 is None else _choose(v4, leased, previous.subnet, random),
        None if v6 is None else _choose(v6, leased6, previous.subnet6, random),
    )


def _choose(pool: Pool, leased: list[Prefix], wanted: Prefix | None, random: Random) -> Prefix:
    if wanted is not None and pool.holds(wanted) and not any(wanted.overlaps(subnet) for subnet in leased):
        return wanted.network()
    ranges = pool.taken(leased)
    taken = sum(last - first + 1 for first, last in ranges)
    if taken >= pool.size:
        raise PoolFull(
            f"no free /{pool.length} subnet in {pool.network}: {taken} of {pool.size} are taken "
            f"({format_address(pool.low)} to {format_address(pool.high)}, {len(leased)} leases); "
            f"remove leases of nodes that are gone, or configure a larger network or smaller subnets"
        )
    index = random.randrange(pool.size - taken)
    for first, last in ranges:
        if index < first:
            break
        index += last - first + 1
    return pool.subnet(index)
