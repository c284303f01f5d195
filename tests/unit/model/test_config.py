import json
from typing import Any

import pytest

from flannelpy.model.address import Prefix, format_address, parse_prefix
from flannelpy.model.config import (
    EXAMPLE_CONFIG,
    MAX_CHARACTERS,
    ConfigError,
    NetworkConfig,
    Section,
    decode_json,
    overlap_warnings,
    parse_config,
)

V6_ONLY = {"EnableIPv4": False, "EnableIPv6": True}


def parse(**keys: Any) -> NetworkConfig:
    return parse_config(json.dumps(keys))


def refused(text: str) -> str:
    """The error for this config, which must be one short line."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def range_of(config: NetworkConfig) -> tuple[int, str, str]:
    assert config.subnet_min is not None
    assert config.subnet_max is not None
    return config.subnet_len, format_address(config.subnet_min), format_address(config.subnet_max)


def range6_of(config: NetworkConfig) -> tuple[int, str, str]:
    assert config.subnet6_min is not None
    assert config.subnet6_max is not None
    return config.subnet6_len, format_address(config.subnet6_min), format_address(config.subnet6_max)


def test_the_example_works() -> None:
    config = parse_config(EXAMPLE_CONFIG)
    assert config.network == parse_prefix("10.5.0.0/16")
    assert (config.enable_ipv4, config.enable_ipv6, config.enable_nftables) == (True, False, False)
    assert (config.backend_type, dict(config.backend)) == ("vxlan", {"Type": "vxlan"})
    assert config == parse_config(EXAMPLE_CONFIG)


# The cases of this table and the next ones were run on flannel; where flannel fails later, the text says so.
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"Network": "10.3.0.0/16"}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.7.9/16"}, (24, "10.3.1.0", "10.3.255.0")),
        (
            {"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"},
            (20, "10.10.0.0", "10.99.0.0"),
        ),
        (
            {"Network": "10.3.0.0/16", "SubnetLen": 28, "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0"},
            (28, "10.3.5.0", "10.3.8.0"),
        ),
        ({"Network": "10.3.0.0/22"}, (24, "10.3.1.0", "10.3.3.0")),
        ({"Network": "10.3.0.0/23"}, (25, "10.3.0.128", "10.3.1.128")),
        ({"Network": "10.3.0.0/24"}, (26, "10.3.0.64", "10.3.0.192")),
        ({"Network": "10.3.0.0/28"}, (30, "10.3.0.4", "10.3.0.12")),
        ({"Network": "10.3.0.0/16", "SubnetLen": 18}, (18, "10.3.64.0", "10.3.192.0")),
        ({"Network": "255.0.0.0/8"}, (24, "255.0.1.0", "255.255.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetLen": 0, "SubnetMin": "0.0.0.0"}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetLen": None}, (24, "10.3.1.0", "10.3.255.0")),
        ({"network": "10.3.0.0/16", "subnetLEN": 26}, (26, "10.3.0.64", "10.3.255.192")),
    ],
)
def test_ipv4_range(keys: dict[str, Any], expected: tuple[int, str, str]) -> None:
    assert range_of(parse(**keys)) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"IPv6Network": "fc00::/48"}, (64, "fc00:0:0:1::", "fc00:0:0:ffff::")),
        ({"IPv6Network": "fc00::/62"}, (64, "fc00:0:0:1::", "fc00:0:0:3::")),
        ({"IPv6Network": "fc00::/63"}, (65, "fc00::8000:0:0:0", "fc00:0:0:1:8000::")),
        ({"IPv6Network": "fc00::/124"}, (126, "fc00::4", "fc00::c")),
        (
            {
                "ipv6network": "fc00::/48",
                "IPv6SubnetLen": 124,
                "IPv6SubnetMin": "fc00:0:0:1::",
                "IPv6SubnetMax": "fc00:0:0:f::",
            },
            (124, "fc00:0:0:1::", "fc00:0:0:f::"),
        ),
        (
            {"IPv6Network": "fc00::/48", "IPv6SubnetMin": None, "IPv6SubnetMax": None},
            (64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
        ),
    ],
)
def test_ipv6_range(keys: dict[str, Any], expected: tuple[int, str, str]) -> None:
    config = parse(**V6_ONLY, **keys)
    assert range6_of(config) == expected
    assert (config.network, config.subnet_len, config.subnet_min, config.subnet_max) == (None, 0, None, None)


def test_dual_stack() -> None:
    config = parse(Network="10.42.0.0/16", EnableIPv6=True, IPv6Network="2001:cafe:42:0::/56")
    assert range_of(config) == (24, "10.42.1.0", "10.42.255.0")
    assert range6_of(config) == (64, "2001:cafe:42:1::", "2001:cafe:42:ff::")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, 'Network is missing.*"EnableIPv4":false'),
        ({"Network": "10.3.0.0/29"}, 'Network is "10.3.0.0/29": it is too small'),
        ({"Network": "0.0.0.0/0"}, "Network is .*it overlaps loopback"),
        ({"Network": "10.3.0.0/16", "SubnetLen": 31}, "SubnetLen is 31: .* from 18 to 30"),
        ({"Network": "10.3.0.0/16", "SubnetLen": 17}, "SubnetLen is 17: .* from 18 to 30"),
        ({"Network": "10.3.0.0/29", "SubnetLen": 30}, "SubnetLen is 30: .*no room"),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.4.0.0"}, "SubnetMin .*inside Network 10.3.0.0/16"),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.4.0.0"}, "SubnetMax .*inside Network"),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.0.1"}, "SubnetMin .*such as 10.3.0.0/24"),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.3.0.1"}, "SubnetMax .*first address"),
        # flannel accepts this one and then says "out of subnets"
        (
            {"Network": "10.3.0.0/16", "SubnetMin": "10.3.9.0", "SubnetMax": "10.3.1.0"},
            "SubnetMin is 10.3.9.0, SubnetMax is 10.3.1.0: the first must not lie after",
        ),
        ({"Network": "fc00::/48"}, "Network .*IPv4 network.*IPv6Network is the key"),
        ({"Network": "bad"}, 'Network is "bad": it must be an IPv4 network'),
        ({"Network": ""}, "it must be an IPv4 network"),
        ({"Network": None}, "Network is null"),
        ({"Network": 10}, "Network is 10: it must be"),
        ({"Network": "10.3.0.0/16", "SubnetLen": -1}, "SubnetLen is -1: it must be an integer"),
        ({"Network": "10.3.0.0/16", "SubnetLen": "24"}, 'SubnetLen is "24": it must be an integer'),
        ({"Network": "10.3.0.0/16", "SubnetLen": True}, "SubnetLen is true: it must be an integer"),
        ({"Network": "10.3.0.0/16", "SubnetLen": 24.0}, "SubnetLen is 24.0: it must be an integer"),
        ({"Network": "10.3.0.0/16", "SubnetLen": 10**100}, "SubnetLen is 1000000.*: it must be an integer"),
        ({"Network": "10.3.0.0/16", "SubnetMin": None}, "SubnetMin is null: it must be an IPv4 address"),
        ({"Network": "10.3.0.0/16", "SubnetMin": ""}, 'SubnetMin is "": it must be an IPv4 address'),
        ({"Network": "10.3.0.0/16", "EnableIPv6": 1}, "EnableIPv6 is 1: it must be true or false"),
        ({"Network": "10.3.0.0/16", "EnableNFTables": "true"}, "EnableNFTables .*without quotes"),
        ({"Network": "10.3.0.0/16", "EnableIPv6": True}, 'IPv6Network is missing.*"EnableIPv6":false'),
        ({"Network": "127.0.0.0/16"}, "overlaps loopback addresses"),
        ({"Network": "239.1.0.0/16"}, "overlaps multicast addresses"),
        ({**V6_ONLY, "IPv6Network": "fc00::/125"}, "IPv6Network .*too small"),
        ({**V6_ONLY, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 127}, "IPv6SubnetLen is 127: .*50 to 126"),
        ({**V6_ONLY, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 49}, "IPv6SubnetLen is 49: .*50 to 126"),
        ({**V6_ONLY, "IPv6Network": "10.0.0.0/8"}, r"IPv6 network.*\(Network is the key"),
        ({**V6_ONLY, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "10.0.0.0"}, "an IPv6 address"),
        ({**V6_ONLY, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "fd00::"}, "IPv6SubnetMin .*inside"),
        (
            {
                **V6_ONLY,
                "IPv6Network": "fc00::/48",
                "IPv6SubnetMin": "fc00:0:0:2::",
                "IPv6SubnetMax": "fc00:0:0:1::",
            },
            "must not lie after",
        ),
        ({**V6_ONLY, "IPv6Network": "ff05::/48"}, "overlaps multicast"),
        ({**V6_ONLY, "IPv6Network": "::ffff:0:0/100"}, "overlaps IPv4-mapped"),
        ({"EnableIPv4": False}, "EnableIPv4 is false and EnableIPv6 is not true"),
        ({"EnableIPv4": False, "Network": "nonsense"}, "Network is"),
        ({"Network": "10.3.0.0/16", "Backend": []}, r"Backend is \[\]: it must be an object"),
        ({"Network": "10.3.0.0/16", "Backend": {"Type": 5}}, "Backend.Type is 5: it must be a string"),
        ({"Network": "10.3.0.0/16", "Backend": {}}, "Backend.Type is missing"),
        ({"Network": "10.3.0.0/16", "Backend": None}, "Backend.Type is missing"),
        ({"Network": "10.3.0.0/16", "Backend": {"Type": ""}}, "Backend.Type is missing"),
    ],
)
def test_what_is_refused_and_what_is_said(keys: dict[str, Any], said: str) -> None:
    message = refused(json.dumps(keys))
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(message)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", '"x"', "{} {}", '{"Network":"10.3.0.0/16",}', "{'Network':1}", "\ufeff{}"),
        '{"Network":"10.3.0.0/16","SubnetLen":NaN}',
        '{"Network":"10.3.0.0/16","X":Infinity}',
        '{"Network":"10.3.0.0/16","X":"a\nb"}',
        '{"Network":"10.3.0.0/16","X":' + "[" * 60_000 + "}",
        '{"Network":"10.3.0.0/16","X":' + "[" * 500 + "]" * 500 + "}",
        '{"Network":"10.3.0.0/16","X":' + '{"a":' * 500 + "1" + "}" * 500 + "}",
        '{"Network":"10.3.0.0/16","X":' + "9" * 60_000 + "}",
        '{"Network":"10.3.0.0/16"}' + " " * MAX_CHARACTERS,
    ],
    ids=lambda text: repr(text[:40]),
)
def test_text_that_is_no_usable_json_is_one_line(text: str) -> None:
    refused(text)


def test_unknown_keys_blanks_and_large_numbers_do_no_harm() -> None:
    text = '\n {"Network":"10.3.0.0/16", "Comment":[[{}]], "Big":1' + "0" * 4000 + ', "Huge":1e999}\r\n\t'
    assert parse_config(text).network == parse_prefix("10.3.0.0/16")


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ('"SubnetLen":20,"SubnetLen":26', 26),
        ('"SubnetLen":20,"subnetlen":26', 26),
        ('"SubnetLen":20,"subnetlen":22,"SubnetLen":26', 26),
        ('"subnetlen":22,"SubnetLen":20,"subnetlen":26', 26),
    ],
)
def test_the_last_duplicate_wins_in_any_case(text: str, length: int) -> None:
    assert parse_config('{"Network":"10.3.0.0/16",' + text + "}").subnet_len == length


def test_no_backend_is_udp_and_a_type_is_lowered() -> None:
    assert parse(Network="10.3.0.0/16").backend_type == "udp"
    config = parse(Network="10.3.0.0/16", backend={"type": "VXLAN", "VNI": 7})
    assert (config.backend_type, dict(config.backend)) == ("vxlan", {"type": "VXLAN", "VNI": 7})


def test_half_a_surrogate_pair_cannot_escape() -> None:
    value = decode_json('{"a\\ud800":["\\uDc00x", {"b":"\\ud83d\\ude00"}]}')
    assert value == {"a\ufffd": ["\ufffdx", {"b": "😀"}]}
    json.dumps(value, ensure_ascii=False).encode()


def test_a_section_reads_a_backends_options() -> None:
    section = Section({"vni": 7, "Learning": True, "Mode": "auto", "Port": None}, "Backend")
    assert section.integer("VNI", 1, 1, 0xFFFFFF) == 7
    assert section.integer("Port", 0, 0, 65535) == 0
    assert section.integer("MTU", 1500, 68, 65535) == 1500
    assert section.boolean("learning", default=False) is True
    assert section.boolean("GBP", default=False) is False
    assert section.text("Mode", "separate") == "auto"
    assert section.text("PSK", "") == ""
    assert "port" in section
    assert "PSK" not in section
    for read, said in (
        (lambda: section.integer("VNI", 1, 8, 9), "Backend.VNI is 7: it must be an integer from 8 to 9"),
        (lambda: section.integer("Learning", 1, 0, 9), "Backend.Learning is true: it must be an integer"),
        (lambda: section.boolean("VNI", default=True), "Backend.VNI is 7: it must be true or false"),
        (lambda: section.text("VNI", ""), "Backend.VNI is 7: it must be a string"),
    ):
        with pytest.raises(ConfigError, match=said):
            read()


def pairs(*texts: str) -> list[tuple[str, Prefix]]:
    return [(device, parse_prefix(prefix)) for device, prefix in (text.split() for text in texts)]


def test_overlaps_are_named_once_and_our_own_are_not() -> None:
    config = parse(Network="10.5.0.0/16", EnableIPv6=True, IPv6Network="fd00:5::/48")
    warnings = overlap_warnings(
        config,
        addresses=pairs(
            *("lo 127.0.0.1/8", "eth0 192.0.2.1/24", "eth1 10.5.3.4/24", "docker0 10.5.7.1/24"),
            *("flannel.1 10.5.7.0/32", "eth2 fd00:5:0:9::1/64", "docker1 10.5.8.1/24"),
        ),
        routes=pairs(
            *("eth0 0.0.0.0/0", "eth0 ::/0", "eth1 10.5.3.0/24", "docker0 10.5.7.0/24", "eth0 192.0.2.0/24"),
            *("tun0 10.0.0.0/8", "flannel.1 10.5.9.0/24", "eth0 10.6.0.0/16"),
        ),
        ours=frozenset({"flannel.1"}),
        own=[parse_prefix("10.5.7.0/24")],
    )
    assert [warning.split(":")[0] if "fd00" not in warning else "fd00" for warning in warnings] == [
        "address 10.5.3.4/24 on eth1 overlaps Network 10.5.0.0/16",
        "fd00",
        "address 10.5.8.1/24 on docker1 overlaps Network 10.5.0.0/16",
        "route 10.0.0.0/8 on tun0 overlaps Network 10.5.0.0/16",
    ]
    assert "address fd00:5:0:9::1/64 on eth2 overlaps IPv6Network fd00:5::/48" in warnings[1]
