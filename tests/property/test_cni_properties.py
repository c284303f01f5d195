"""The CNI plugin has parsers of its own for foreign bytes: JSON by the compiled scanner, and subnet.env."""

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannelpy.cni import plugin
from flannelpy.cni.plugin import CniError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(st.text(), values, max_size=5)
keys = ("NETWORK", "SUBNET", "IPV6_NETWORK", "IPV6_SUBNET", "MTU", "IPMASQ", "OTHER")
lines = st.tuples(st.sampled_from(keys), st.text(max_size=12) | st.ip_addresses().map(str)).map(
    lambda pair: f"FLANNEL_{pair[0]}={pair[1]}"
)


@given(objects)
def test_json_comes_out_as_it_went_in(value: dict[str, Any]) -> None:
    text = plugin.rendered(value)
    assert json.loads(text) == value
    assert plugin.parsed(text.encode(), "it") == value
    assert plugin.parsed(json.dumps(value, indent=1).encode(), "it") == value


@given(st.binary(max_size=200) | objects.map(json.dumps).map(lambda text: text[:-1].encode()))
def test_bytes_are_an_object_or_refused(data: bytes) -> None:
    """As the module json says."""
    try:
        expected = json.loads(data.decode())
        json.dumps(expected, allow_nan=False)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert plugin.parsed(data, "it") == expected
    else:
        with pytest.raises(CniError):
            plugin.parsed(data, "it")


@given(st.text(max_size=300) | st.lists(lines | st.text(max_size=30), max_size=9).map("\n".join))
def test_any_text_is_a_subnet_env_or_refused(text: str) -> None:
    try:
        subnet = plugin._parse_subnet(text, "it")
    except CniError as error:
        assert "it" in str(error)  # noqa: PT017
        return
    assert subnet.networks
    assert subnet.subnets
    assert 0 <= subnet.mtu < 1 << 32


@given(st.ip_addresses(), st.integers(0, 128))
def test_a_block_is_masked(address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: int) -> None:
    text = f"{address}/{length}"
    if length > address.max_prefixlen:
        with pytest.raises(CniError):
            plugin._block(text, address.version == 6, "it")
        return
    found = plugin._block(text, address.version == 6, "it")
    assert ipaddress.ip_network(found) == ipaddress.ip_network(text, strict=False)


@given(st.text(max_size=60))
def test_no_name_leaves_its_folder(text: str) -> None:
    if plugin._is_name(text):
        assert "/" not in text
        assert text not in (".", "..")
        assert text.isascii()
        assert "\0" not in text
