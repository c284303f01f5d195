"""flannel's iptables rules, byte for byte as `iptables -S` prints them."""

import pytest

from flannelpy.model import iptables
from flannelpy.model.config import parse_config
from flannelpy.model.lease import Lease
from flannelpy.model.traffic import RuleSet, Wishes, rules
from tests.builders import lease

CONFIG = parse_config(
    '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)
ALL = Wishes(masquerade=True, forward=True)

V4 = """\
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.72.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.72.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.72.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
"""  # noqa: E501

V6 = """\
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd00:5:0:7::/64 -d fd00:5::/48 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd00:5::/48 -d fd00:5:0:7::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s fd00:5::/48 -d fd00:5:0:7::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd00:5::/48 ! -d ff00::/8 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s fd00:5::/48 -d fd00:5::/48 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s fd00:5::/48 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d fd00:5::/48 -m comment --comment "flanneld forward" -j ACCEPT
"""  # noqa: E501


@pytest.fixture
def own() -> Lease:
    return lease("10.5.72.0/24", subnet6="fd00:5:0:7::/64")


def lines(wanted: RuleSet, bits: int) -> str:
    return "".join(f"{line}\n" for line in iptables.lines_of(wanted, bits))


def test_the_listing_is_flannels(own: Lease) -> None:
    wanted = rules(CONFIG, own, ALL)
    assert lines(wanted, 32) == V4
    assert lines(wanted, 128) == V6


def test_without_random_ports(own: Lease) -> None:
    wanted = rules(CONFIG, own, ALL._replace(random_fully=False))
    assert lines(wanted, 32) == V4.replace(" --random-fully", "")


def test_what_is_not_asked_for_is_not_there(own: Lease) -> None:
    only_masquerade = rules(CONFIG, own, ALL._replace(forward=False))
    only_forward = rules(CONFIG, own, ALL._replace(masquerade=False))
    assert lines(only_masquerade, 32) + lines(only_forward, 32) == V4
    assert not rules(CONFIG, own, Wishes(masquerade=False, forward=False))


def test_a_family_that_is_off_has_no_rules(own: Lease) -> None:
    config = parse_config('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    wanted = rules(config, own, ALL)
    assert wanted.ipv6 is None
    assert lines(wanted, 32) == V4
