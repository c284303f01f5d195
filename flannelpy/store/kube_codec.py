"""Node objects of Kubernetes as leases, in flannel's annotations. Pure. Each node is foreign data.

spec.podCIDR(s)                   the subnets
PREFIX kube-subnet-manager        "true": the node takes part
PREFIX backend-type               "vxlan"; "" for udp and alloc
PREFIX backend-data, -v6-data     JSON, "null" without
PREFIX public-ip, public-ipv6
PREFIX public-ip(v6)-overwrite    an operator's: written instead
PREFIX node-public-ip(v6)         an operator's: as --public-ip(v6)
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from flannelpy.model.address import Address, Prefix, format_address, parse_prefix, parse_v4, parse_v6
from flannelpy.model.config import NetworkConfig, decode_json
from flannelpy.model.lease import Lease, LeaseAttrs

MANAGED = "kube-subnet-manager"
_TYPE, _DATA, _DATA6 = "backend-type", "backend-data", "backend-v6-data"
_IP, _IP6 = "public-ip", "public-ipv6"
_OVERWRITE, _OVERWRITE6 = "public-ip-overwrite", "public-ipv6-overwrite"
_OPERATOR, _OPERATOR6 = "node-public-ip", "node-public-ipv6"
_READ = (MANAGED, _TYPE, _DATA, _DATA6, _IP, _IP6, _OVERWRITE, _OVERWRITE6, _OPERATOR, _OPERATOR6)

_DUAL = ("vxlan", "wireguard", "host-gw", "extension")
"""The backends whose IPv6 half flannel writes."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_REVISION = re.compile(r"[0-9]{1,19}")
_GO_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
_MAX_TYPE = 64


class Node(NamedTuple):
    """What counts of a Node object; the rest, 5 to 20 KB, is dropped as soon as it is read."""

    name: str
    revision: int
    """metadata.resourceVersion."""
    created: int
    """metadata.creationTimestamp, seconds since 1970; 0 if it is none."""
    annotations: Mapping[str, str]
    """Only ours, without the prefix."""
    cidrs: tuple[str, ...]
    """spec.podCIDRs, or spec.podCIDR alone."""


class Families(NamedTuple):
    """The families of the network: whatever a node says about others means nothing."""

    ipv4: bool
    ipv6: bool


def families_of(config: NetworkConfig) -> Families:
    """As the network config says."""
    return Families(config.enable_ipv4, config.enable_ipv6)


def is_name(text: str) -> bool:
    """Whether this can be a node's name: it becomes a part of paths."""
    return _NAME.fullmatch(text) is not None


def revision_of(value: Any) -> int:
    """A resourceVersion; ValueError if it is none. They are etcd's revisions, and are compared as such."""
    if not isinstance(value, str) or not _REVISION.fullmatch(value):
        raise ValueError(f"resourceVersion is {_shown(value)}")
    return int(value)


def read_node(value: Any, prefix: str) -> Node:
    """A decoded Node object; ValueError when it is none."""
    metadata = _object(value, "metadata")
    name = metadata.get("name")
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"metadata.name is {_shown(name)}")
    annotations = metadata.get("annotations")
    found = {}
    if isinstance(annotations, dict):
        texts = ((suffix, annotations.get(prefix + suffix)) for suffix in _READ)
        found = {suffix: text for suffix, text in texts if isinstance(text, str)}
    spec = value.get("spec")
    spec = spec if isinstance(spec, dict) else {}
    many = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    cidrs = tuple(str(one)[:64] for one in many[:3]) if isinstance(many, list) else ()
    revision = revision_of(metadata.get("resourceVersion"))
    return Node(name, revision, _seconds(metadata.get("creationTimestamp")), found, cidrs)


def subnets_of(node: Node, families: Families) -> tuple[Prefix | None, Prefix | None]:
    """The first podCIDR of each family of the network; ValueError when one is none, or there are too many."""
    if len(node.cidrs) > 2:
        raise ValueError("it has more than two podCIDRs")
    found: dict[int, Prefix] = {}
    for text in node.cidrs:
        try:
            prefix = parse_prefix(text).network()
        except ValueError as error:
            raise ValueError(f"podCIDR: {error}") from None
        if not 0 < prefix.length < prefix.bits:
            raise ValueError(f"podCIDR {prefix} is no subnet")
        found.setdefault(prefix.bits, prefix)
    return found.get(32) if families.ipv4 else None, found.get(128) if families.ipv6 else None


def lease_of(node: Node, families: Families) -> Lease | None:
    """The lease of a node that takes part, None for another; ValueError with the reason if it is unreadable.

    In a dual-stack network a node may lack a family: the other one is served (flannel skips such a node).
    """
    if node.annotations.get(MANAGED) != "true":
        return None
    subnet, subnet6 = subnets_of(node, families)
    attrs = _attrs(node.annotations, families)
    reasons = []
    if subnet is None and subnet6 is None:
        reasons.append("it has no podCIDR of a family of the network")
    if attrs.public_ip is None and attrs.public_ipv6 is None:
        reasons.append("it has no public IP of a family of the network")
    if reasons:
        raise ValueError("; ".join(reasons))
    return Lease(node.name, subnet, subnet6, attrs, node.created, node.revision)


def remembered_of(node: Node, families: Families) -> Lease | None:
    """What the node told the peers last, for the MAC that stays; None if that cannot be read."""
    try:
        return Lease(node.name, *subnets_of(node, families), _attrs(node.annotations, families))
    except ValueError:
        return None


def operator_addresses(node: Node) -> tuple[Address | None, Address | None]:
    """What an operator wants instead of --public-ip and --public-ipv6; ValueError names the annotation."""
    return (
        _address(node.annotations, _OPERATOR, parse_v4),
        _address(node.annotations, _OPERATOR6, parse_v6),
    )


def written(attrs: LeaseAttrs, node: Node, families: Families) -> dict[str, str]:
    """The annotations that flannel would write for this, without the prefix.

    ValueError when an operator's address cannot be read.
    """
    type_ = attrs.backend_type
    values = {MANAGED: "true", _TYPE: type_}
    if families.ipv4 or type_ not in ("vxlan", "wireguard"):
        values[_DATA] = _go_json(attrs.backend_data)
        public_ip = _address(node.annotations, _OVERWRITE, parse_v4) or attrs.public_ip or bytes(4)
        values[_IP] = format_address(public_ip)
    if families.ipv6 and attrs.public_ipv6 is not None and type_ in _DUAL:
        values[_DATA6] = _go_json(attrs.backend_v6_data)
        public_ipv6 = _address(node.annotations, _OVERWRITE6, parse_v6) or attrs.public_ipv6
        values[_IP6] = format_address(public_ipv6)
    return values


def differing(node: Node, wanted: Mapping[str, str], prefix: str) -> dict[str, str]:
    """What of the wanted annotations the node has not, by their full names."""
    return {prefix + suffix: text for suffix, text in wanted.items() if node.annotations.get(suffix) != text}


def _attrs(annotations: Mapping[str, str], families: Families) -> LeaseAttrs:
    type_ = annotations.get(_TYPE, "")
    if len(type_) > _MAX_TYPE:
        raise ValueError(f"{_TYPE} has {len(type_)} characters, at most {_MAX_TYPE} make sense")
    return LeaseAttrs(
        _address(annotations, _IP, parse_v4) if families.ipv4 else None,
        _address(annotations, _IP6, parse_v6) if families.ipv6 else None,
        type_,
        _data(annotations, _DATA) if families.ipv4 else None,
        _data(annotations, _DATA6) if families.ipv6 else None,
    )


def _data(annotations: Mapping[str, str], suffix: str) -> Any:
    text = annotations.get(suffix, "")
    if not text:
        return None
    try:
        return decode_json(text)
    except ValueError as error:
        raise ValueError(f"{suffix} is not usable JSON: {error}") from None


def _address(annotations: Mapping[str, str], suffix: str, parse: Any) -> Address | None:
    text = annotations.get(suffix, "")
    if not text:
        return None
    try:
        address: Address = parse(text)
    except ValueError as error:
        raise ValueError(f"{suffix}: {error}") from None
    return address if any(address) else None


def _go_json(value: Any) -> str:
    """As Go's encoding/json writes it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_GO_ESCAPES)


def _object(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"it has no {key}")  # noqa: TRY004
    return found


def _seconds(value: Any) -> int:
    try:
        return max(0, int(datetime.fromisoformat(value).timestamp()))
    except (TypeError, ValueError, OverflowError):
        return 0


def _shown(value: Any) -> str:
    return ascii(value)[:64]
