"""One builder per type, with every value that a test does not care about filled in."""

import json
from typing import Any

from flannelpy.backend import Facts
from flannelpy.model.address import parse_prefix, parse_v4, parse_v6
from flannelpy.model.census import Entry, Subnets
from flannelpy.model.config import NetworkConfig, parse_config
from flannelpy.model.kernel import Link
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import decode_attrs, format_key, parse_key
from flannelpy.model.uplink import Uplink

V4 = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
DUAL = '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'


def config(text: str = V4) -> NetworkConfig:
    return parse_config(text)


def uplink(mtu: int = 1500, public_ip: str = "192.0.2.1") -> Uplink:
    return Uplink(
        name="eth0",
        ifindex=2,
        mtu=mtu,
        address=parse_v4("192.0.2.1"),
        address6=parse_v6("2001:db8::1"),
        public_ip=parse_v4(public_ip),
        public_ipv6=parse_v6("2001:db8::1"),
    )


def facts(*links: Link, **changes: Any) -> Facts:
    return Facts(
        changes.pop("uplink", uplink()), {link.name: link for link in links}, host_id="test", **changes
    )


def lease(
    subnet: str = "10.5.2.0/24",
    public_ip: str = "192.0.2.2",
    *,
    mac: str = "02:00:00:00:00:02",
    subnet6: str = "",
    public_ipv6: str = "2001:db8::2",
    mac6: str = "",
    backend_type: str = "vxlan",
    data: Any = None,
    created: int = 1,
    key: str = "",
) -> Lease:
    """A vxlan peer's lease; IPv6 only with `subnet6`."""
    v4 = parse_prefix(subnet) if subnet else None
    v6 = parse_prefix(subnet6) if subnet6 else None
    data6 = {"VNI": 1, "VtepMAC": mac6 or mac} if v6 else None
    attrs = LeaseAttrs(
        parse_v4(public_ip) if v4 else None,
        parse_v6(public_ipv6) if v6 else None,
        backend_type,
        ({"VNI": 1, "VtepMAC": mac} if data is None else data) if v4 else None,
        data6,
    )
    return Lease(key or format_key(v4, v6), v4, v6, attrs, created, created)


def value(ip: str = "192.0.2.9", **fields: object) -> str:
    """The text of a vxlan lease."""
    data = {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{int(ip.rpartition('.')[2]):02x}"}
    return json.dumps({"PublicIP": ip, "BackendType": "vxlan", "BackendData": data} | fields)


def entry(
    key: str, text: str = "", *, created: int = 5, lease_id: int = 1, left: int | None = 86_400
) -> Entry:
    """A record as the store reads it; readable or not."""
    lease, problem = None, ""
    subnets: Subnets = (None, None)
    try:
        subnets = parse_key(key)
        attrs = decode_attrs(text or value("192.0.2." + key.split(".")[2]))
        lease = Lease(key, *subnets, attrs, created, created, lease_id)
    except ValueError as error:
        problem = str(error)
    left = left if lease_id else None
    raw = text.encode("utf-8", "surrogateescape")
    return Entry(key, key.encode(), raw, subnets, lease, problem, created, created, lease_id, left)
