import json
import time
from collections import Counter
from random import Random
from typing import Any

import pytest

from flannelpy.model.address import Prefix, parse_prefix
from flannelpy.model.config import NetworkConfig, parse_config
from flannelpy.model.subnet import (
    PoolFull,
    Previous,
    choose,
    decode_attrs,
    is_compatible,
    parse_key,
    pool_size,
)

DUAL = {"Network": "10.3.0.0/16", "EnableIPv6": True, "IPv6Network": "fc00::/48"}
V6_ONLY = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48"}


def config(**keys: Any) -> NetworkConfig:
    return parse_config(json.dumps({"Backend": {"Type": "vxlan"}, **keys}))


def seeded(number: int) -> Random:
    return Random(number)


def net(text: str | None) -> Prefix | None:
    return None if text is None else parse_prefix(text)


def v4_leases(*texts: str) -> list[tuple[Prefix | None, Prefix | None]]:
    return [(parse_prefix(text), None) for text in texts]


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"Network": "10.3.0.0/16"}, (255, 0)),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.25.0"}, (25, 0)),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.1.0"}, (1, 0)),
        (DUAL, (255, 65535)),
        ({**V6_ONLY, "IPv6Network": "fc00::/8", "IPv6SubnetLen": 126}, (0, 2**118 - 1)),
    ],
)
def test_pool_size(keys: dict[str, Any], size: tuple[int, int]) -> None:
    assert pool_size(config(**keys)) == size


@pytest.mark.parametrize(
    ("keys", "subnet", "subnet6", "compatible"),
    [
        ({"Network": "10.3.0.0/16"}, "10.3.1.0/24", None, True),
        ({"Network": "10.3.0.0/16"}, "10.3.255.0/24", None, True),
        ({"Network": "10.3.0.0/16"}, "10.3.0.0/24", None, False),
        ({"Network": "10.3.0.0/16"}, "10.4.1.0/24", None, False),
        ({"Network": "10.3.0.0/16"}, "10.3.1.0/25", None, False),
        ({"Network": "10.3.0.0/16"}, None, None, False),
        ({"Network": "10.3.0.0/16"}, "10.3.1.0/24", "fc00:0:0:1::/64", False),
        (DUAL, "10.3.1.0/24", "fc00:0:0:1::/64", True),
        (DUAL, "10.3.1.0/24", None, False),
        (DUAL, "10.3.1.0/24", "fc00::/64", False),
        (DUAL, None, "fc00:0:0:1::/64", False),
        (V6_ONLY, None, "fc00:0:0:ffff::/64", True),
        (V6_ONLY, "10.3.1.0/24", "fc00:0:0:1::/64", False),
    ],
)
def test_compatibility(
    keys: dict[str, Any], subnet: str | None, subnet6: str | None, compatible: bool
) -> None:
    assert is_compatible(config(**keys), net(subnet), net(subnet6)) is compatible


def test_the_previous_subnet_is_kept_if_it_fits_and_is_free() -> None:
    network = config(Network="10.3.0.0/16", SubnetMin="10.3.1.0", SubnetMax="10.3.25.0")
    taken = v4_leases("10.3.1.0/24", "10.3.2.0/24", "10.3.4.0/24", "10.3.5.0/24", "10.3.31.0/24")
    free = {parse_prefix(f"10.3.{number}.0/24") for number in range(1, 26)} - {subnet for subnet, _ in taken}
    for wanted, kept in (
        ("10.3.6.0/24", True),
        ("10.4.1.0/24", False),  # another network
        ("10.3.31.0/24", False),  # outside of SubnetMin..SubnetMax
        ("10.3.6.0/25", False),  # another length
        ("10.3.5.0/24", False),  # taken
    ):
        chosen = {choose(network, taken, Previous(subnet=net(wanted)), seeded(seed))[0] for seed in range(20)}
        assert (chosen == {net(wanted)}) is kept, wanted
        assert chosen <= free


def test_a_taken_block_of_any_length_is_avoided() -> None:
    network = config(Network="10.3.0.0/16", SubnetMin="10.3.8.0", SubnetMax="10.3.15.0")
    taken = v4_leases("10.3.8.0/22", "10.3.12.128/25", "10.3.13.7/32", "10.0.0.0/21", "10.3.16.0/20")
    chosen = {choose(network, taken, Previous(), seeded(seed))[0] for seed in range(40)}
    assert chosen == {net("10.3.14.0/24"), net("10.3.15.0/24")}
    wish = Previous(subnet=net("10.3.12.0/24"))
    assert choose(network, taken, wish, seeded(1))[0] in chosen


def test_each_family_is_chosen_by_itself() -> None:
    network = config(**DUAL)
    old = Previous(subnet=net("10.3.7.0/24"))
    taken: list[tuple[Prefix | None, Prefix | None]] = [(net("10.3.8.0/24"), None), (None, net("fc00::/49"))]
    subnet, subnet6 = choose(network, taken, old, seeded(3))
    assert subnet == net("10.3.7.0/24")
    assert subnet6 is not None
    assert parse_prefix("fc00:0:0:8000::/49").contains(subnet6)
    assert choose(config(**V6_ONLY), taken, old, seeded(3))[0] is None
    assert choose(config(Network="10.3.0.0/16"), taken, old, seeded(3)) == (subnet, None)


def test_the_choice_is_uniform_over_the_whole_range() -> None:
    network = config(Network="10.0.0.0/8")
    random = seeded(7)
    taken = v4_leases("10.0.0.0/10")
    counts: Counter[int] = Counter()
    for _ in range(3000):
        subnet, _ = choose(network, taken, Previous(), random)
        assert subnet is not None
        counts[subnet.address[1] >> 6] += 1
    assert counts[0] == 0
    # Three quarters of 1000 each; five standard deviations are 130.
    assert all(abs(counts[quarter] - 1000) < 130 for quarter in (1, 2, 3))


def test_a_full_pool_says_so() -> None:
    network = config(Network="10.3.0.0/28")
    taken = v4_leases("10.3.0.0/29", "10.3.0.8/30", "10.3.0.12/30", "10.3.0.12/30")
    with pytest.raises(PoolFull, match=r"no free /30 subnet in 10\.3\.0\.0/28: 3 of 3 are taken"):
        choose(network, taken, Previous(), seeded(1))
    last = choose(network, taken[:2], Previous(), seeded(1))
    assert last == (net("10.3.0.12/30"), None)


def test_a_vast_pool_costs_no_more_than_its_leases() -> None:
    network = config(**{**V6_ONLY, "IPv6Network": "fc00::/8", "IPv6SubnetLen": 126})
    random = seeded(5)
    taken: list[tuple[Prefix | None, Prefix | None]] = []
    for _ in range(200):
        chosen = choose(network, taken, Previous(), random)
        assert chosen not in taken
        taken.append(chosen)


def test_thousands_of_leases_are_read_in_a_moment() -> None:
    value = (
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
    )
    keys = [f"10.{number >> 8}.{number & 255}.0-24" for number in range(5000)]
    start = time.process_time()
    leases = [(parse_key(key), decode_attrs(value)) for key in keys]
    took = time.process_time() - start
    assert len({pair for pair, _ in leases}) == 5000
    # About 45 ms on a slow host; a tenfold loss is a mistake, not noise.
    assert took < 0.4
