"""Node objects and annotations, foreign and hostile ones too."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.annotations import key_prefix
from flannelpy.model.config import EXAMPLE_CONFIG
from flannelpy.model.lease import LeaseAttrs
from flannelpy.store import kube_codec as codec

PREFIX = "flannel.alpha.coreos.com/"
V4, V6, DUAL = codec.Families(True, False), codec.Families(False, True), codec.Families(True, True)
VTEP = {"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e3"}
VXLAN = {
    "kube-subnet-manager": "true",
    "backend-type": "vxlan",
    "backend-data": '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}',
    "public-ip": "192.168.77.17",
}


def value(cidrs: Any = ("10.244.1.0/24",), annotations: Any = None, **metadata: Any) -> dict[str, Any]:
    texts = {PREFIX + key: text for key, text in (VXLAN if annotations is None else annotations).items()}
    known = {"name": "n1", "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {
        "metadata": {**known, "annotations": texts, **metadata},
        "spec": {"podCIDRs": cidrs and list(cidrs)},
    }


def node(*args: Any, **kwargs: Any) -> codec.Node:
    return codec.read_node(value(*args, **kwargs), PREFIX)


def test_a_node_is_a_lease() -> None:
    lease = codec.lease_of(node(), V4)
    assert lease is not None
    assert (lease.key, lease.subnet, lease.revision) == ("n1", parse_prefix("10.244.1.0/24"), 7)
    assert lease.created == 1767225600
    assert lease.attrs == LeaseAttrs(parse_address("192.168.77.17"), None, "vxlan", VTEP)


def test_pod_cidr_alone() -> None:
    one = value()
    one["spec"] = {"podCIDR": "10.244.4.0/24"}
    assert codec.read_node(one, PREFIX).cidrs == ("10.244.4.0/24",)


def test_a_node_of_both_families_in_a_network_of_one() -> None:
    both = node(
        ("fd00::/64", "10.244.1.0/24"), {**VXLAN, "public-ipv6": "2001:db8::1", "backend-v6-data": "null"}
    )
    four, six, dual = (codec.lease_of(both, families) for families in (V4, V6, DUAL))
    assert four is not None
    assert six is not None
    assert dual is not None
    assert (four.subnet6, four.attrs.public_ipv6) == (None, None)
    assert (six.subnet, six.attrs.public_ip) == (None, None)
    assert (dual.subnet, dual.subnet6) == (parse_prefix("10.244.1.0/24"), parse_prefix("fd00::/64"))


@pytest.mark.parametrize("text", [None, "false", "True", "1", ""])
def test_a_node_that_takes_no_part(text: str | None) -> None:
    annotations = {key: one for key, one in VXLAN.items() if key != "kube-subnet-manager"}
    if text is not None:
        annotations["kube-subnet-manager"] = text
    assert codec.lease_of(node(annotations=annotations), V4) is None


@pytest.mark.parametrize(
    ("cidrs", "changes", "words"),
    [
        ((), {}, "no podCIDR"),
        (("fd00::/64",), {}, "no podCIDR of a family"),
        (("10.244.1.0",), {}, "podCIDR"),
        (("10.244.1.0/33",), {}, "podCIDR"),
        (("0.0.0.0/0",), {}, "no subnet"),
        (("10.244.1.1/32",), {}, "no subnet"),
        (("10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"), {}, "more than two"),
        (("10.244.1.0/24",), {"public-ip": ""}, "no public IP"),
        (("10.244.1.0/24",), {"public-ip": "0.0.0.0"}, "no public IP"),
        (("10.244.1.0/24",), {"public-ip": "$(reboot)"}, "public-ip: "),
        (("10.244.1.0/24",), {"public-ip": "::1"}, "public-ip: "),
        (("10.244.1.0/24",), {"backend-data": "{"}, "backend-data is not usable JSON"),
        (("10.244.1.0/24",), {"backend-data": "[" * 5000}, "backend-data is not usable JSON"),
        (("10.244.1.0/24",), {"backend-data": '"' + "x" * 70_000 + '"'}, "characters"),
        (("10.244.1.0/24",), {"backend-type": "x" * 65}, "backend-type has 65 characters"),
    ],
)
def test_what_cannot_be_read_is_named(cidrs: Any, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        codec.lease_of(node(cidrs, {**VXLAN, **changes}), V4)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {},
        {"metadata": 1},
        {"metadata": {"name": "../../secrets", "resourceVersion": "1"}},
        {"metadata": {"name": "a\nb", "resourceVersion": "1"}},
        {"metadata": {"name": "n1"}},
        {"metadata": {"name": "n1", "resourceVersion": "1" * 40}},
        {"metadata": {"name": "n1", "resourceVersion": 5}},
    ],
)
def test_what_is_no_node(broken: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec.read_node(broken, PREFIX)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    metadata=st.dictionaries(st.sampled_from(["creationTimestamp", "annotations", "labels"]), json_values),
    spec=st.dictionaries(st.sampled_from(["podCIDR", "podCIDRs"]), json_values),
    texts=st.dictionaries(
        st.sampled_from([*VXLAN, "public-ipv6", "backend-v6-data"]), st.text() | json_values
    ),
)
def test_any_object_is_a_lease_none_or_a_value_error(metadata: Any, spec: Any, texts: Any) -> None:
    known = {"name": "n1", "resourceVersion": "1"}
    annotations = {PREFIX + key: text for key, text in {**VXLAN, **texts}.items()}
    for one in (
        {**known, "annotations": annotations, **metadata},
        {**known, **metadata, "annotations": annotations},
    ):
        try:
            found = codec.read_node({"metadata": one, "spec": spec}, PREFIX)
            for families in (V4, V6, DUAL):
                codec.lease_of(found, families)
        except ValueError:
            continue


def attrs(
    type_: str, data: Any = None, ip6: str = "", data6: Any = None, ip: str = "192.0.2.1"
) -> LeaseAttrs:
    return LeaseAttrs(
        parse_address(ip) if ip else None, parse_address(ip6) if ip6 else None, type_, data, data6
    )


@pytest.mark.parametrize(
    ("given_attrs", "families", "expected"),
    [
        (
            attrs("vxlan", VTEP),
            V4,
            {
                "backend-type": "vxlan",
                "backend-data": json.dumps(VTEP, separators=(",", ":")),
                "public-ip": "192.0.2.1",
            },
        ),
        (
            attrs("vxlan", None, "2001:db8::3", VTEP, ip=""),
            V6,
            {
                "backend-type": "vxlan",
                "backend-v6-data": '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}',
                "public-ipv6": "2001:db8::3",
            },
        ),
        (
            attrs("host-gw", None, "2001:db8::3"),
            DUAL,
            {
                "backend-type": "host-gw",
                "backend-data": "null",
                "public-ip": "192.0.2.1",
                "backend-v6-data": "null",
                "public-ipv6": "2001:db8::3",
            },
        ),
        (
            attrs("host-gw", None, "2001:db8::3", ip=""),
            V6,
            {
                "backend-type": "host-gw",
                "backend-data": "null",
                "public-ip": "0.0.0.0",
                "backend-v6-data": "null",
                "public-ipv6": "2001:db8::3",
            },
        ),
        (attrs(""), V4, {"backend-type": "", "backend-data": "null", "public-ip": "192.0.2.1"}),
    ],
    ids=["vxlan", "vxlan-v6", "host-gw-dual", "host-gw-v6", "udp"],
)
def test_the_annotations_are_flannels(given_attrs: Any, families: Any, expected: dict[str, str]) -> None:
    assert codec.written(given_attrs, node(), families) == {"kube-subnet-manager": "true", **expected}


def test_only_what_differs_is_written() -> None:
    wanted = codec.written(attrs("vxlan", VTEP, ip="192.168.77.18"), node(), V4)
    assert codec.differing(node(), wanted, PREFIX) == {PREFIX + "public-ip": "192.168.77.18"}


def test_an_operators_addresses() -> None:
    asked = {**VXLAN, "public-ip-overwrite": "203.0.113.9", "node-public-ip": "203.0.113.8"}
    assert codec.written(attrs("vxlan", VTEP), node(annotations=asked), V4)["public-ip"] == "203.0.113.9"
    assert codec.operator_addresses(node(annotations=asked)) == (parse_address("203.0.113.8"), None)
    with pytest.raises(ValueError, match="public-ip-overwrite"):
        codec.written(attrs("vxlan", VTEP), node(annotations={"public-ip-overwrite": "here"}), V4)


def test_the_mac_is_remembered_also_without_a_public_ip() -> None:
    found = codec.remembered_of(node(annotations={"backend-data": VXLAN["backend-data"]}), V4)
    assert found is not None
    assert found.attrs.backend_data == VTEP
    assert codec.remembered_of(node(annotations={"backend-data": "{"}), V4) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/prefix", "flannel.alpha.coreos.com/prefix-"),
        ("flannel.alpha.coreos.com/prefix-", "flannel.alpha.coreos.com/prefix-"),
        ("org.com/9", "org.com/9-"),
        *((text, None) for text in ("org", "org/", "org/prefix", "org.COM", "org.com/PREFIX", "a.b/c/d", "")),
    ],
)
def test_prefixes(text: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="two or more labels"):
            key_prefix(text)
    else:
        assert key_prefix(text) == expected


def test_the_example_is_of_one_family() -> None:
    from flannelpy.model.config import parse_config

    assert codec.families_of(parse_config(EXAMPLE_CONFIG)) == V4
