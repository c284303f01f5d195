import json
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from flannelpy.model.address import Address, Prefix, format_address, parse_v4, parse_v6
from flannelpy.model.config import ConfigError, NetworkConfig, parse_config
from flannelpy.model.lease import LeaseAttrs
from flannelpy.model.subnet import (
    PoolFull,
    Previous,
    choose,
    decode_attrs,
    encode_attrs,
    format_key,
    is_compatible,
    parse_key,
    pool_size,
)

JSON_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=8,
)
V4 = st.binary(min_size=4, max_size=4).filter(any)
# Mapped and compatible addresses share Go's dotted text with IPv4; nothing can be sent to them.
V6 = st.binary(min_size=16, max_size=16).filter(lambda address: any(address[:10]))
TEN = parse_v4("10.0.0.0")
FC = parse_v6("fc00::")


def subnets(address: st.SearchStrategy[Address], bits: int) -> st.SearchStrategy[Prefix]:
    return st.builds(lambda a, length: Prefix(a, length).network(), address, st.integers(1, bits - 1))


@st.composite
def small_networks(draw: st.DrawFn) -> NetworkConfig:
    """A network of at most 32 subnets in a family or both, with any bounds."""
    keys: dict[str, object] = {}
    stack = draw(st.sampled_from(["4", "6", "46"]))
    keys["EnableIPv4"], keys["EnableIPv6"] = "4" in stack, "6" in stack
    for prefix, base in (("", TEN), ("IPv6", FC)):
        length = draw(st.integers(16, 24))
        split = draw(st.integers(2, 5))
        network = Prefix(base, length)
        low, high = sorted((draw(st.integers(0, 2**split - 1)), draw(st.integers(0, 2**split - 1))))
        size = 1 << (network.bits - length - split)
        keys[f"{prefix}Network"] = str(network.network())
        keys[f"{prefix}SubnetLen"] = length + split
        keys[f"{prefix}SubnetMin"] = format_address(network.nth(low * size))
        keys[f"{prefix}SubnetMax"] = format_address(network.nth(high * size))
    return parse_config(json.dumps(keys))


def inside(base: Address) -> st.SearchStrategy[Prefix]:
    """Leases in and around the networks of `small_networks`."""
    bits = len(base) * 8
    return st.builds(
        lambda number, length: Prefix(
            (int.from_bytes(base) + (number << (bits - 32))).to_bytes(len(base)), length
        ).network(),
        st.integers(0, 2**18 - 1),
        st.integers(14, 32),
    )


LEASES = st.lists(
    st.tuples(
        st.none() | inside(TEN),
        st.none() | inside(FC),
    ),
    max_size=40,
)


@given(st.none() | subnets(V4, 32), st.none() | subnets(V6, 128))
def test_keys_round_trip(subnet: Prefix | None, subnet6: Prefix | None) -> None:
    if subnet is not None or subnet6 is not None:
        assert parse_key(format_key(subnet, subnet6)) == (subnet, subnet6)


@given(st.builds(LeaseAttrs, st.none() | V4, st.none() | V6, JSON_TEXT, JSON, JSON))
def test_attributes_round_trip(attrs: LeaseAttrs) -> None:
    text = encode_attrs(attrs)
    assert decode_attrs(text) == attrs
    assert decode_attrs(text.encode()) == attrs
    assert not set("<>&\u2028\u2029") & set(text)


@given(st.text() | st.from_regex(r"[0-9.]{0,16}-[0-9]{0,4}(&[a-f0-9:]{0,40}-[0-9]{0,4})?", fullmatch=True))
def test_a_key_is_read_or_a_value_error(text: str) -> None:
    try:
        subnet, subnet6 = parse_key(text)
    except ValueError:
        return
    assert parse_key(format_key(subnet, subnet6)) == (subnet, subnet6)


@given(
    st.text()
    | st.binary()
    | JSON.map(json.dumps)
    | st.dictionaries(
        st.sampled_from(["PublicIP", "publicip", "PublicIPv6", "BackendType", "BackendData"]), JSON
    ).map(json.dumps)
)
def test_a_value_is_read_or_a_value_error(text: str | bytes) -> None:
    try:
        attrs = decode_attrs(text)
    except ValueError:
        return
    encode_attrs(attrs._replace(backend_data=None, backend_v6_data=None)).encode()


CONFIG_KEYS = [
    "Network",
    "network",
    "IPv6Network",
    "EnableIPv4",
    "EnableIPv6",
    "SubnetLen",
    "SubnetMin",
    "Backend",
]


@given(
    st.text()
    | JSON.map(json.dumps)
    | st.dictionaries(
        st.sampled_from(CONFIG_KEYS),
        JSON | st.sampled_from(["10.3.0.0/16", "10.3.9.0", "fc00::/48", "1.2.3.4/-1"]) | st.integers(0, 40),
    ).map(json.dumps)
)
def test_a_config_is_read_or_a_config_error_of_one_line(text: str) -> None:
    try:
        config = parse_config(text)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
        assert any(pool_size(config))
    assert "\n" not in message


@given(small_networks(), LEASES, inside(TEN), inside(FC), st.randoms())
def test_a_choice_fits_and_is_free(
    config: NetworkConfig,
    taken: list[tuple[Prefix | None, Prefix | None]],
    wish: Prefix,
    wish6: Prefix,
    random: Random,
) -> None:
    """Against a plain search through all subnets, for both families."""
    expected = [free_subnets(config, taken, family) for family in (0, 1)]
    wanted = [family for family, on in enumerate((config.enable_ipv4, config.enable_ipv6)) if on]
    try:
        chosen = choose(config, taken, Previous(subnet=wish, subnet6=wish6), random)
    except PoolFull:
        assert any(not expected[family] for family in wanted)
        return
    assert is_compatible(config, *chosen)
    for family in wanted:
        assert chosen[family] in expected[family]
        if (wish, wish6)[family] in expected[family]:
            assert chosen[family] == (wish, wish6)[family]


def free_subnets(
    config: NetworkConfig, taken: list[tuple[Prefix | None, Prefix | None]], family: int
) -> set[Prefix]:
    if family == 0:
        low, high, length = config.subnet_min, config.subnet_max, config.subnet_len
    else:
        low, high, length = config.subnet6_min, config.subnet6_max, config.subnet6_len
    if low is None or high is None:
        return set()
    step = 1 << (len(low) * 8 - length)
    leased = [lease[family] for lease in taken]
    every = (
        Prefix(number.to_bytes(len(low)), length)
        for number in range(int.from_bytes(low), int.from_bytes(high) + 1, step)
    )
    return {subnet for subnet in every if not any(one is not None and one.overlaps(subnet) for one in leased)}
