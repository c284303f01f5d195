"""What flannel's CNI plugin does, seen from outside: asked of ours, and of flannel's if FLANNEL_CNI names it.

The other plugin is Debian's bridge with its host-local (CNI_PLUGINS names another folder), in namespaces.
"""

import ipaddress
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.processes import run
from tests.unit.cni.calls import OURS, Answer, Host

FLANNEL_CNI = os.environ.get("FLANNEL_CNI", "")
PLUGINS = os.environ.get("CNI_PLUGINS", "/usr/lib/cni")
PREFIX = f"fpc{os.getpid()}-"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes network namespaces"),
    pytest.mark.skipif(
        not Path(PLUGINS, "bridge").exists(),
        reason="needs bridge: apt-get install containernetworking-plugins",
    ),
]

V4 = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\n"
TWO = V4.replace("10.1.0.0/16", "10.1.0.0/16,192.168.244.0/24,10.1.0.0/16")
V6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\n"
REST = "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"


@pytest.fixture(params=["flannelpy", "flannel"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "flannelpy":
        return OURS
    if not FLANNEL_CNI:
        pytest.skip("FLANNEL_CNI does not name flannel's plugin to compare with")
    return (FLANNEL_CNI,)


@pytest.fixture
def host(command: tuple[str, ...], tmp_path: Path) -> Iterator[Host]:
    """A host and a pod, each a namespace, and real plugins."""
    names = f"{PREFIX}host", f"{PREFIX}pod"
    for name in names:
        run("ip", "netns", "add", name)
    try:
        made = Host(tmp_path, command=command, netns=names[0], path=PLUGINS)
        made.conf["ipam"] = {"dataDir": str(tmp_path / "ipam")}
        yield made
    finally:
        for name in names:
            run("ip", "netns", "del", name)


def call(host: Host, command: str, **more: Any) -> Answer:
    return host.call(
        command, variables={"CNI_NETNS": f"/run/netns/{PREFIX}pod", "CNI_IFNAME": "eth0"}, **more
    )


def routes(*networks: str) -> list[dict[str, str]]:
    return [{"dst": network} for network in networks]


@pytest.mark.parametrize(
    ("env", "ranges", "networks"),
    [
        (V4, ["10.1.17.0/24"], ["10.1.0.0/16"]),
        (TWO, ["10.1.17.0/24"], ["10.1.0.0/16", "192.168.244.0/24"]),
        (V6, ["fc00::/64"], ["fc00::/48"]),
        (V4 + V6, ["10.1.17.0/24", "fc00::/64"], ["10.1.0.0/16", "fc00::/48"]),
    ],
    ids=["IPv4", "two networks", "IPv6", "dual stack"],
)
def test_a_pod_comes_and_goes(host: Host, env: str, ranges: list[str], networks: list[str]) -> None:
    """What bridge is asked for, what the pod gets, and the state that lasts from ADD to DEL."""
    host.subnet_file.write_text(env + REST)
    state = host.state / "c1"
    answer = call(host, "ADD")
    assert answer.code == 0, answer
    assert json.loads(state.read_text()) == {
        "cniVersion": "1.0.0",
        "name": "cbr0",
        "type": "bridge",
        "ipMasq": False,
        "isGateway": True,
        "mtu": 1472,
        "ipam": {
            "type": "host-local",
            "dataDir": host.conf["ipam"]["dataDir"],
            "ranges": [[{"subnet": block}] for block in ranges],
            "routes": routes(*networks),
        },
    }
    addresses = [ipaddress.ip_interface(ip["address"]) for ip in answer.json["ips"]]
    assert [str(address.network) for address in addresses] == ranges
    assert [route["dst"] for route in answer.json["routes"]] == networks
    assert "mtu 1472" in run("ip", "link", "show", "eth0", netns=f"{PREFIX}pod")
    assert call(host, "DEL").code == 0
    assert not state.exists()
    assert call(host, "DEL").code == 0
    assert "eth0" not in run("ip", "link", netns=f"{PREFIX}pod")


def test_adding_twice_is_an_error_that_harms_nothing(host: Host) -> None:
    host.subnet_file.write_text(V4 + REST)
    assert call(host, "ADD").code == 0
    again = call(host, "ADD")
    assert (again.code, "msg" in again.json) == (1, True)
    assert "10.1.17.2/24" in run("ip", "address", netns=f"{PREFIX}pod")
    assert call(host, "DEL").code == 0
    assert "eth0" not in run("ip", "link", netns=f"{PREFIX}pod")
    leased = Path(host.conf["ipam"]["dataDir"], "cbr0")
    assert [path.name for path in leased.iterdir() if path.name[0].isdigit()] == []


def test_masquerading_is_left_to_one_of_the_two(host: Host) -> None:
    host.subnet_file.write_text(V4 + REST.replace("true", "false"))
    assert call(host, "ADD").code == 0
    assert json.loads((host.state / "c1").read_text())["ipMasq"] is True
    assert call(host, "DEL").code == 0


def test_what_is_asked_for_is_merged(host: Host) -> None:
    """An IPAM plugin of another type, with keys of its own, and routes that come before the network's."""
    host.subnet_file.write_text(TWO + REST)
    host.path = str(host.recorder())
    own = [*routes("10.96.0.0/12"), {"dst": "192.168.244.0/24", "gw": "10.1.17.20"}]
    host.conf["ipam"] = {"type": "mine", "one": 1, "two": ["x"], "routes": own}
    assert call(host, "ADD").code == 0
    assert host.recorded("ADD")["ipam"] == {
        "type": "mine",
        "one": 1,
        "two": ["x"],
        "ranges": [[{"subnet": "10.1.17.0/24"}]],
        "routes": [*own, *routes("10.1.0.0/16", "192.168.244.0/24")],
    }


def test_what_subnet_env_lacks_is_named_in_order(host: Host) -> None:
    host.subnet_file.write_text("foo=bar\n")
    answer = call(host, "ADD")
    kinds = ("NETWORK", "IPV6_NETWORK", "SUBNET", "IPV6_SUBNET", "MTU", "IPMASQ")
    missing = ", ".join(f"FLANNEL_{kind}" for kind in kinds)
    assert answer.code == 1
    assert missing in answer.json["msg"]
    assert not host.state.exists()


def test_a_missing_subnet_env_is_an_error(host: Host) -> None:
    host.subnet_file.unlink()
    answer = call(host, "ADD")
    assert answer.code == 1
    assert str(host.subnet_file) in answer.json["msg"]


@pytest.mark.parametrize("key", ["name", "ipam"])
def test_delegate_must_not_hold(host: Host, key: str) -> None:
    host.conf["delegate"] = {key: {}}
    answer = call(host, "ADD")
    assert answer.code == 1
    assert key in answer.json["msg"]


def test_the_paths_are_flannels(host: Host) -> None:
    """Without subnetFile and dataDir they are below /run and /var/lib, here in mounts of our own."""
    source, keep, plugins = host.subnet_file, host.folder / "keep", host.recorder()
    source.write_text(V4 + REST)
    keep.mkdir()
    script = """
        mount -t tmpfs none /run; mkdir /run/flannel; cp "$1" /run/flannel/subnet.env
        mount -t tmpfs none /var/lib; mkdir /var/lib/cni; mount --bind "$2" /var/lib/cni
        shift 2; exec "$@"
    """
    assert shutil.which("unshare")
    host.command = ("unshare", "--mount", "sh", "-ec", script, "sh", str(source), str(keep), *host.command)
    host.path = str(plugins)
    del host.conf["subnetFile"], host.conf["dataDir"]
    for command, there in (("ADD", True), ("DEL", False)):
        assert host.call(command).code == 0
        assert (keep / "flannel" / "c1").exists() is there


def test_version_answers(host: Host) -> None:
    answer = host.call("VERSION", stdin=b'{"cniVersion":"1.0.0"}')
    assert answer.json == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


def test_the_commands_of_cni_1_1(host: Host) -> None:
    """With a bridge that knows them: version 1.6 and newer."""
    if "1.1.0" not in host.call("VERSION", stdin=b"{}").text or host.command != OURS:
        pytest.skip("flannel's plugin has neither STATUS nor GC")
    bridge = Host(host.folder, command=(f"{PLUGINS}/bridge",))
    if "1.1.0" not in bridge.call("VERSION", stdin=b'{"cniVersion":"1.0.0"}').json["supportedVersions"]:
        pytest.skip(f"the bridge in {PLUGINS} does not know CNI 1.1.0; CNI_PLUGINS names another folder")
    host.subnet_file.write_text(V4 + V6 + REST)
    host.conf["cniVersion"] = "1.1.0"
    assert call(host, "STATUS").code == 0
    added = call(host, "ADD")
    assert added.code == 0
    assert call(host, "CHECK", conf={**host.conf, "prevResult": added.json}).code == 0
    here = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    leased = Path(host.conf["ipam"]["dataDir"], "cbr0")
    for valid, left in ((here, 2), ({"cni.dev/valid-attachments": []}, 0)):
        assert call(host, "GC", conf={**host.conf, **valid}).code == 0
        assert len([path for path in leased.iterdir() if path.name[0] in "1f"]) == left
        assert (host.state / "c1").exists() is bool(left)


@pytest.mark.skipif(not FLANNEL_CNI, reason="FLANNEL_CNI does not name flannel's plugin to compare with")
@pytest.mark.parametrize("first", ["flannel", "flannelpy"])
def test_one_deletes_what_the_other_has_added(first: str, tmp_path: Path) -> None:
    """And their states have the same bytes."""
    both = {"flannel": (FLANNEL_CNI,), "flannelpy": OURS}
    host = Host(tmp_path, command=both[first])
    odd = {"bridge": "cni1", "hairpinMode": True, "isDefaultGateway": True, "vlan": 5}
    host.conf["delegate"] = odd
    assert host.call("ADD").code == 0
    state = (host.state / "c1").read_bytes()
    host.command = next(command for name, command in both.items() if name != first)
    assert host.call("DEL").code == 0
    assert not (host.state / "c1").exists()
    assert {key: host.recorded("DEL")[key] for key in odd} == odd
    assert host.call("ADD").code == 0
    assert (host.state / "c1").read_bytes() == state
