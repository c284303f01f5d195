"""The config in words: every key explained, what a change does, what is never read."""

import json

import pytest

from flannelpy.backend import load
from flannelpy.model import config_change
from flannelpy.model.config import NetworkConfig
from flannelpy.model.config_keys import BACKEND_KEYS, KEYS, changes, in_effect, keys_of, remarks, stranded
from tests.builders import DUAL, V4, config, entry


def test_what_counts_at_once_is_what_a_running_daemon_takes_over() -> None:
    live = {config_change.KEYS[field] for field in config_change.LIVE}
    assert {key.name for key in KEYS if key.effect == "live"} == live
    assert not [key for keys in BACKEND_KEYS.values() for key in keys if key.effect == "live"]


def made(text: str = V4, /, **keys: object) -> NetworkConfig:
    return config(json.dumps(json.loads(text) | keys))


@pytest.mark.parametrize("backend", BACKEND_KEYS)
def test_every_key_that_counts_is_explained_and_has_a_value(backend: str) -> None:
    known = made(DUAL, Backend={"Type": backend})
    assert list(in_effect(known)) == [key.name for key in keys_of(backend)]
    assert all(key.meaning and key.default and key.on_change for key in keys_of(backend))


def test_the_defaults_of_vxlan_are_those_of_the_backend() -> None:
    """Each option given as its documented default is no change, and each is read by the backend."""
    plain = made()
    for key in BACKEND_KEYS["vxlan"]:
        name = key.name.partition(".")[2]
        given = made(Backend={"Type": "vxlan", name: json.loads(key.default)})
        assert changes(plain, given) == ()
        with pytest.raises(ValueError, match=name):
            load(made(Backend={"Type": "vxlan", name: "?"}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"SubnetLen": 24}, []),
        ({"network": "10.5.0.0/16"}, []),
        ({"SubnetMax": "10.5.99.0"}, [("SubnetMax", "10.5.255.0", "10.5.99.0", "live")]),
        ({"EnableNFTables": True}, [("EnableNFTables", "false", "true", "live")]),
        (
            {"SubnetLen": 25},
            [
                ("SubnetLen", "24", "25", "restart"),
                ("SubnetMin", "10.5.1.0", "10.5.0.128", "live"),
                ("SubnetMax", "10.5.255.0", "10.5.255.128", "live"),
            ],
        ),
        ({"Backend": {"Type": "vxlan", "vni": 7}}, [("Backend.VNI", "1", "7", "restart")]),
    ],
)
def test_what_changes_in_effect(keys: dict[str, object], expected: list[tuple[str, ...]]) -> None:
    found = changes(made(), made(**keys))
    assert [(c.key.name, c.before, c.after, c.key.effect) for c in found] == expected


def test_another_backend_changes_its_options_too() -> None:
    found = changes(made(), made(Backend={"Type": "wireguard", "PSK": "x\x7f\n"}))
    assert {(c.key.name, c.before, c.after) for c in found} > {
        ("Backend.Type", "vxlan", "wireguard"),
        ("Backend.VNI", "1", ""),
        ("Backend.PSK", "", '"x\\u007f\\n"'),
    }


def test_the_leases_that_a_change_strands() -> None:
    records = (entry("10.5.1.0-24"), entry("10.5.200.0-24"), entry("10.5.0.0-24"), entry("x"))
    lower = made(SubnetMax="10.5.99.0")
    assert stranded(made(), lower, records) == (records[1],), "10.5.0.0-24 did not fit before, either"
    assert stranded(None, lower, records) == (records[1], records[2])
    assert stranded(lower, made(), records) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (V4, ()),
        ('{"network":"10.5.0.0/16","backend":{"type":"VXLAN","vni":3}}', ()),
        (
            '{"Network":"10.5.0.0/16","SubnetLenght":25,"Backend":{"Type":"vxlan","Vnii":2,"zz\\u001b":1}}',
            ("did you mean SubnetLen?", "did you mean Backend.VNI?", r"Backend.\"zz\\u001b\" is no key"),
        ),
        (
            '{"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","Backend":{"Type":"alloc"}}',
            ("no effect while",),
        ),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard","PSK":"x"}}', ()),
        ('{"Network":"10.5.0.0/16"}', ("means udp",)),
    ],
)
def test_keys_that_nobody_reads_are_told(text: str, expected: tuple[str, ...]) -> None:
    found = remarks(text, config(text))
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part.replace("\\\\", "\\").replace('\\"', '"') in line
        assert line.isprintable()


def test_the_keys_are_those_that_the_reader_knows() -> None:
    """Every key explained makes a difference when it is wrong; another does not."""
    for key in KEYS:
        if "." not in key.name:
            with pytest.raises(ValueError, match=key.name):
                made(DUAL, **{key.name: [1]})
    made(DUAL, NoSuchKey=[1])
