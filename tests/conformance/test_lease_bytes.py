"""Lease records byte for byte as flannel writes them, and what of foreign records is read and refused."""

import json
from typing import Any

import pytest

from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.lease import LeaseAttrs
from flannelpy.model.subnet import decode_attrs, encode_attrs, format_key, parse_key

V4 = parse_address("192.168.64.3")
V6 = parse_address("2001:db8::3")
VTEP = {"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}
VTEP6 = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"}
KEY = "XqbU5ItvbCyXAOJ0O0/8LfQ3vGTqEBSbdkjZu9yYHkI="


@pytest.mark.parametrize(
    ("attrs", "golden"),
    [
        (
            LeaseAttrs(V4, None, "vxlan", VTEP),
            (
                '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
                '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
            ),
        ),
        (
            LeaseAttrs(V4, V6, "vxlan", VTEP, VTEP6),
            (
                '{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"vxlan",'
                '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},'
                '"BackendV6Data":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}}'
            ),
        ),
        (
            LeaseAttrs(None, V6, "vxlan", None, VTEP6),
            (
                '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::3","BackendType":"vxlan",'
                '"BackendV6Data":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}}'
            ),
        ),
        (
            LeaseAttrs(V4, None, "host-gw"),
            '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}',
        ),
        (
            LeaseAttrs(V4, V6, "host-gw"),
            '{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"host-gw"}',
        ),
        (LeaseAttrs(V4, None, ""), '{"PublicIP":"192.168.64.3","PublicIPv6":null}'),
        (
            LeaseAttrs(V4, None, "wireguard", {"PublicKey": KEY, "Port": 51820}),
            (
                '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard",'
                f'"BackendData":{{"PublicKey":"{KEY}","Port":51820}}}}'
            ),
        ),
        (
            LeaseAttrs(V4, None, "extension", 'a<b>&c "\\é\u2028\u2029\t\n\x01\x7f'),
            (
                '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"extension",'
                '"BackendData":"a\\u003cb\\u003e\\u0026c \\"\\\\é\\u2028\\u2029\\t\\n\\u0001\x7f"}'
            ),
        ),
    ],
)
def test_values(attrs: LeaseAttrs, golden: str) -> None:
    assert encode_attrs(attrs) == golden
    assert decode_attrs(golden) == attrs
    assert decode_attrs(golden.encode()) == attrs


@pytest.mark.parametrize(
    ("key", "subnet", "subnet6"),
    [
        ("10.5.52.0-24", "10.5.52.0/24", None),
        ("10.1.2.2-31", "10.1.2.2/31", None),
        ("10.5.52.0-24&fd00:0:0:1::-64", "10.5.52.0/24", "fd00:0:0:1::/64"),
        ("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0/24", "fd00:12:13::/56"),
        ("0.0.0.0-0&fd00:0:0:1::-64", None, "fd00:0:0:1::/64"),
    ],
)
def test_keys(key: str, subnet: str | None, subnet6: str | None) -> None:
    pair = (parse_prefix(subnet) if subnet else None, parse_prefix(subnet6) if subnet6 else None)
    assert parse_key(key) == pair
    assert format_key(*pair) == key


@pytest.mark.parametrize(
    "key",
    [
        *("", "10", "10.12.13.0", "10.12.13-24", "10.12.13.300-24", "10.12.13.0-24hi", "010.1.2.0-24"),
        *("&2001::-56", "10.12.13.0-24&:12:13:-56", "10.12.13.0-24&20011::-56", "10.12.13.0-24&2001-56"),
        *("10.12.13.0-24&2001::", "10.12.13.0-24&2001::-56hi", "10.12.13.0-24&FD00::-64", "10.12.13.0-32"),
        *(
            "10.12.13.0-24&fd00::-128",
            "10.12.13.0-24\n",
            "10.12.13.0-24&",
            "\u06610.12.13.0-24",
            "10.12.13.0-99999",
        ),
        # flannel accepts the first one, and would take the others for a subnet of all addresses
        *("foo10.12.13.0-24", "10.12.13.0-0", "0.0.0.0-0", "0.0.0.0-0&::-0"),
    ],
)
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match=r"is not a|length of a subnet"):
        parse_key(key)


def test_two_keys_may_mean_one_subnet() -> None:
    assert parse_key("10.1.2.3-24") == parse_key("10.1.2.0-024") == parse_key("10.1.2.0-24")


def test_a_key_names_at_least_one_subnet() -> None:
    with pytest.raises(ValueError, match="needs an IPv4 or an IPv6 subnet"):
        format_key(None, None)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::1.2.3.4", "1.2.3.4"),
        ("::0.1.0.2", "::1:2"),
        ("::1", "::1"),
        ("0:0:0:1:0:0:0:2", "::1:0:0:0:2"),
        ("2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1"),
    ],
)
def test_ipv6_text_is_what_go_prints(address: str, text: str) -> None:
    value = json.loads(encode_attrs(LeaseAttrs(V4, parse_address(address), "")))
    assert value["PublicIPv6"] == text


@pytest.mark.parametrize(
    ("text", "attrs"),
    [
        ("{}", LeaseAttrs(None, None, "")),
        ('{"PublicIP":"0.0.0.0","PublicIPv6":"::"}', LeaseAttrs(None, None, "")),
        (' {"PublicIP": "192.168.64.3"}\n', LeaseAttrs(V4, None, "")),
        (
            '{"publicip":"192.168.64.3","BACKENDTYPE":"vxlan","New":{"PublicIP":1}}',
            LeaseAttrs(V4, None, "vxlan"),
        ),
        ('{"PublicIP":"1.1.1.1","publicIP":"2.2.2.2","PublicIP":"192.168.64.3"}', LeaseAttrs(V4, None, "")),
        (
            '{"PublicIP":"192.168.64.3","PublicIPv6":"1.2.3.4","BackendType":null,"BackendData":null}',
            LeaseAttrs(V4, parse_address("::ffff:1.2.3.4"), ""),
        ),
        ('{"PublicIP":"192.168.64.3","BackendData":[1,"x"]}', LeaseAttrs(V4, None, "", [1, "x"])),
        (b'{"PublicIP":"192.168.64.3","BackendType":"\xff\\ud800"}', LeaseAttrs(V4, None, "\ufffd\ufffd")),
    ],
)
def test_what_other_writers_may_leave_out_or_write_otherwise(text: str | bytes, attrs: LeaseAttrs) -> None:
    assert decode_attrs(text) == attrs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "must be a JSON object"),
        ("{}{}", "more after its end"),
        ('{"PublicIP":null}', "^PublicIP must be a string, not null"),
        ('{"PublicIP":""}', "PublicIP: '' is not an IPv4 address"),
        ('{"PublicIP":"2001:db8::1"}', "PublicIP: .* is not an IPv4 address"),
        ('{"PublicIP":3232235777}', "PublicIP"),
        ('{"PublicIPv6":""}', "PublicIPv6: '' is not an IP address"),
        ('{"PublicIPv6":false}', "PublicIPv6"),
        ('{"BackendType":7}', "BackendType must be a string, not 7"),
        ('{"BackendData":NaN}', "NaN is not JSON"),
        ('{"BackendData":' + "[" * 60_000, "nested more than 32 deep"),
        ('{"BackendData":' + "[" * 200 + "]" * 200 + "}", "nested more than 32 deep"),
        ('{"BackendData":"' + "x" * 70_000 + '"}', "at most 65536"),
        (b"\xff\xfe{}", "Expecting value"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        decode_attrs(text)
    assert len(str(caught.value)) < 200


def test_backend_data_of_ours_must_be_json() -> None:
    data: Any = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        encode_attrs(LeaseAttrs(V4, None, "x", data))
