"""What the options file may hold, and the look at the routing table."""

import sys

import pytest

from flannelpy.docker import DockerOptsError, is_routed, output, subnet
from flannelpy.model.address import parse_prefix


def make(variables: dict[str, str], *, key: str = "DOCKER_OPTS", ip_masq: bool = True) -> str:
    return output(variables, individual=True, combined=True, key=key, ip_masq=ip_masq)


@pytest.mark.parametrize("char", ['"', "$", "`", "\\", "\n", "\x00", "\u2028"])
@pytest.mark.parametrize("name", ["DOCKER_OPT_X", "DOCKER_OPTS"])
def test_a_value_that_could_mean_more_than_itself_is_refused(name: str, char: str) -> None:
    with pytest.raises(DockerOptsError, match=rf"^{name} holds ") as caught:
        make({name: f"--label=a{char}b"})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLANNEL_SUBNET", "10.1.74.1/24 --privileged"),
        ("FLANNEL_SUBNET", "10.1.74.1"),
        ("FLANNEL_SUBNET", "fd00::1/64"),
        ("FLANNEL_MTU", "14x"),
        ("FLANNEL_MTU", "-1"),
        ("FLANNEL_IPMASQ", "yes"),
    ],
)
def test_a_foreign_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(DockerOptsError, match=f"^{name}="):
        make({name: value})


def test_without_the_masquerade_option_its_value_is_not_looked_at() -> None:
    assert make({"FLANNEL_IPMASQ": "yes"}, ip_masq=False) == 'DOCKER_OPTS=""\n'


@pytest.mark.parametrize("key", ["", "1A", "A-B", 'A="x"\nB', "ä"])
def test_the_key_is_a_variable_name(key: str) -> None:
    with pytest.raises(DockerOptsError, match="-k"):
        make({}, key=key)


def test_options_of_the_environment_are_kept_in_order_and_flannels_win() -> None:
    text = make(
        {
            "DOCKER_OPT_Z": "--z",
            "DOCKER_OPT_BIP": "old",
            "DOCKER_OPT_A-B": "no",
            "FLANNEL_SUBNET": "10.1.2.1/24",
        }
    )
    assert text == (
        'DOCKER_OPT_BIP="--bip=10.1.2.1/24"\nDOCKER_OPT_Z="--z"\nDOCKER_OPTS=" --bip=10.1.2.1/24 --z"\n'
    )


def route(destination: str, mask: str, flags: str, *, order: str = sys.byteorder) -> str:
    def column(address: str) -> str:
        packed = parse_prefix(address + "/32").address
        return packed[::-1].hex() if order == "little" else packed.hex()

    return f"eth0\t{column(destination)}\t0100000A\t{flags}\t0\t0\t0\t{column(mask)}\t0\t0\t0\n"


HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


@pytest.mark.parametrize(
    ("line", "routed"),
    [
        (route("10.1.74.0", "255.255.255.0", "0003"), True),
        (route("10.1.74.0", "255.255.255.0", "0001"), False),
        (route("10.1.74.0", "255.255.254.0", "0003"), False),
        (route("10.1.75.0", "255.255.255.0", "0003"), False),
        ("garbage\n", False),
        ("eth0\tx\ty\tz\t0\t0\t0\tFFFFFFFFFF\n", False),
    ],
)
def test_only_a_gateway_route_to_exactly_the_subnet_counts(line: str, routed: bool) -> None:
    own = subnet({"FLANNEL_SUBNET": "10.1.74.1/24"})
    assert own is not None
    assert is_routed(own, HEAD + line) is routed
