"""Whole daemons as processes, in network namespaces, with a real etcd: a node joins the overlay."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import LabError, Process, run, stop, wait_ready, wait_until
from tests.certificates import Authority

pytestmark = [pytest.mark.root, pytest.mark.etcd]

PROGRAM = (sys.executable, "-m", "flannelpy")
V4 = {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}
V6 = {"IPv6Network": "fd00:5::/48", "EnableIPv6": True}
DUAL = {**V4, **V6}
V6_ONLY = {**V6, "EnableIPv4": False, "Backend": {"Type": "vxlan"}}


def log_of(process: Process) -> str:
    return process.log.read_text(errors="replace")


def wait_for_log(process: Process, words: str, timeout: float = 10) -> None:
    try:
        wait_until(lambda: words in log_of(process) or process.popen.poll() is not None, words, timeout)
    finally:
        assert words in log_of(process)


def exit_code(process: Process, timeout: float = 10) -> int:
    return process.popen.wait(timeout)


def cluster(lab: Lab, config: dict[str, Any], nodes: int = 2) -> list[Node]:
    """Nodes whose daemons are ready, a pod on each."""
    lab.put_config(config)
    for _number in range(nodes):
        lab.add_node()
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    for node in lab.nodes:
        lab.add_pod(node)
    # Ready means: all peers that were there are programmed. The ones that came later follow at once.
    for node in lab.nodes:
        wait_until(lambda node=node: routes(lab, node) >= nodes - 1, f"{nodes - 1} routes on {node.name}")  # type: ignore[misc]
    return lab.nodes


def reach(lab: Lab, source: Node, address: str, size: int = 84) -> None:
    """A pod's packet gets there; its first IPv6 packets may wait for neighbour discovery on its bridge."""
    pod = source.pods[0]
    wait_until(
        lambda: lab.ping(pod.netns, address, size=size, count=1).received, f"{pod.netns} to reach {address}"
    )


def routes(lab: Lab, node: Node, family: str = "") -> int:
    found = lab.ip_json(node.netns, "route show proto 70") + lab.ip_json(node.netns, "-6 route show proto 70")
    return len({route["dst"] for route in found})


def leases(lab: Lab) -> dict[str, Any]:
    lines = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/").splitlines()
    return {
        key.rpartition("/")[2]: json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)
    }


def put_lease(lab: Lab, key: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    words = ("put", f"{ETCD_PREFIX}/subnets/{key}")
    lab.etcdctl(*words, stdin=text) if text else lab.etcdctl(*words, "")


def peer(number: int, **changes: Any) -> dict[str, Any]:
    mac = f"02:00:00:00:01:{number:02x}"
    lease = {"PublicIP": f"192.168.77.{number}", "PublicIPv6": None, "BackendType": "vxlan",
             "BackendData": {"VNI": 1, "VtepMAC": mac}}  # fmt: skip
    return {**lease, **changes}


# --- the main job ---


@pytest.mark.parametrize(
    ("config", "mtu"), [(V4, 1450), (DUAL, 1430), (V6_ONLY, 1430)], ids=["v4", "dual", "v6"]
)
def test_pods_on_three_nodes_reach_each_other(
    make_lab: Callable[..., Lab], config: dict[str, Any], mtu: int
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    nodes = cluster(lab, config, 3)
    for node in nodes:
        assert node.subnet_env()["FLANNEL_MTU"] == str(mtu)
    for source in nodes:
        for target in nodes:
            pod = target.pods[0]
            for address in (pod.address, pod.address6):
                if address is not None and source is not target:
                    reach(lab, source, str(address.ip), mtu)
    if config is not V4:
        assert nodes[0].pods[0].address6 is not None
        assert "fe80" not in run("ip", "-6", "address", "show", "dev", "flannel-v6.1", netns=nodes[0].netns)


def test_key_value_and_subnet_env_are_flannels_byte_for_byte(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    key, value = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/").splitlines()
    mac = lab.ip_json(node.netns, "link show flannel.1")[0]["address"]
    assert value == (
        f'{{"PublicIP":"192.168.77.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
    )
    subnet = key.rpartition("/")[2].replace("-", "/")
    base = subnet.rpartition(".")[0]
    assert node.subnet_file.read_text() == (
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={base}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert node.subnet_file.stat().st_mode & 0o777 == 0o644
    address = lab.ip_json(node.netns, "address show flannel.1")[0]["addr_info"]
    assert [(entry["local"], entry["prefixlen"]) for entry in address] == [(f"{base}.0", 32)]
    ttl = json.loads(lab.etcdctl("lease", "list", "-w", "json"))["leases"]
    assert len(ttl) == 1


def test_stop_and_start_again_interrupt_nothing(lab: Lab) -> None:
    """The lease, the device and its MAC stay, packets flow on; a stop takes less than a second."""
    one, two = cluster(lab, V4)
    before = lab.ip_json(one.netns, "link show flannel.1")[0]
    env, lease = one.subnet_env(), leases(lab)
    target = str(two.pods[0].address).partition("/")[0]
    assert one.daemon is not None
    flow = ["ping", "-n", "-i", "0.01", "-c", "400", "-W", "1", target]
    pinging = lab.start("flow", one.pods[0].netns, flow)
    began = time.monotonic()
    one.daemon.popen.terminate()
    assert exit_code(one.daemon) == 0
    assert time.monotonic() - began < 1
    assert lab.ping(one.pods[0].netns, target, count=3).received == 3
    again = lab.start_daemon(one)
    wait_ready([again])
    again.popen.send_signal(signal.SIGKILL)
    again.popen.wait()
    wait_ready([lab.start_daemon(one)])
    assert exit_code(pinging, 20) == 0
    assert " 0% packet loss" in log_of(pinging)
    after = lab.ip_json(one.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
    assert (one.subnet_env(), leases(lab)) == (env, lease)


def test_a_peer_that_left_while_the_daemon_was_down_is_removed(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    put_lease(lab, "10.5.200.0-24", peer(200))
    wait_until(lambda: routes(lab, node) == 1, "the peer's route")
    assert node.daemon is not None
    stop([node.daemon])
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.200.0-24")
    wait_ready([lab.start_daemon(node)])
    wait_until(lambda: routes(lab, node) == 0, "the peer's route to go")
    assert "02:00:00:00:01:c8" not in run("bridge", "fdb", "show", "dev", "flannel.1", netns=node.netns)


def test_two_hundred_leases_in_two_transactions_all_appear(lab: Lab) -> None:
    (node,) = cluster(lab, {**V4, "Network": "10.4.0.0/14", "SubnetLen": 24}, 1)
    subnets = [f"10.{4 + number // 250}.{number % 250 + 1}.0" for number in range(200)]
    own = node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    subnets = [subnet for subnet in subnets if not subnet.startswith(f"{own}.")]
    for half in (subnets[:100], subnets[100:]):
        puts = ""
        for subnet in half:
            _, second, third, _ = subnet.split(".")
            mac = f"02:00:00:00:{int(second):02x}:{int(third):02x}"
            value = json.dumps(peer(99, BackendData={"VNI": 1, "VtepMAC": mac}))
            puts += f"put {ETCD_PREFIX}/subnets/{subnet}-24 {json.dumps(value)}\n"
        lab.etcdctl("txn", stdin=f"\n{puts}\n\n")
    wait_until(lambda: routes(lab, node) == len(subnets), f"{len(subnets)} routes")


def test_direct_routing_over_the_shared_underlay(lab: Lab) -> None:
    one, two = cluster(lab, {**V4, "Backend": {"Type": "vxlan", "DirectRouting": True}})
    (route,) = lab.ip_json(one.netns, "route show proto 70")
    assert (route["dev"], route["gateway"]) == ("eth0", str(two.address))
    assert lab.ping(one.pods[0].netns, str(two.pods[0].address).partition("/")[0], size=1450).received == 3
    put_lease(lab, "10.5.200.0-24", peer(9, PublicIP="198.51.100.9"))
    wait_until(lambda: routes(lab, one) == 2, "the far peer's route")
    far = lab.ip_json(one.netns, "route show 10.5.200.0/24")[0]
    assert far["dev"] == "flannel.1"


# --- adoption ---


def test_a_device_that_flannel_made_is_adopted_with_its_mac(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    mac = "c6:d2:32:6f:8f:44"
    lab.ip(
        node.netns,
        f"link add flannel.1 address {mac} mtu 1450 txqueuelen 0"
        f" type vxlan id 1 dev eth0 local {node.address} nolearning dstport 8472",
        "link set flannel.1 up",
    )
    before = lab.ip_json(node.netns, "link show flannel.1")[0]["ifindex"]
    wait_ready([lab.start_daemon(node)])
    after = lab.ip_json(node.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before, mac)
    assert next(iter(leases(lab).values()))["BackendData"]["VtepMAC"] == mac


def test_a_lost_device_comes_back_with_the_mac_that_peers_know(lab: Lab) -> None:
    """As after a reboot: no device, but our lease is still there; and without the lease, the same hash."""
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    for lose_the_lease in (False, True):
        assert node.daemon is not None
        stop([node.daemon])
        lab.ip(node.netns, "link delete flannel.1")
        if lose_the_lease:
            lab.etcdctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/")
        wait_ready([lab.start_daemon(node)])
        assert leases(lab) == before


def test_a_deleted_lease_is_taken_back_with_the_same_subnet(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    lab.etcdctl("del", "--prefix", f"{ETCD_PREFIX}/subnets/")
    wait_until(lambda: leases(lab) == before, "the lease to come back")
    assert node.daemon is not None
    assert node.daemon.popen.poll() is None
    assert "taking it back" in log_of(node.daemon)


# --- one daemon per network ---


def test_a_second_daemon_is_refused_and_names_the_first(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    assert node.daemon is not None
    first = run("pgrep", "-f", "-o", str(node.subnet_file)).strip()
    second = lab.start("second", node.netns, [*PROGRAM, f"--etcd-endpoints={lab.etcd_url}"])
    assert exit_code(second) == 5
    assert f"(process {first}) serves network /coreos.com/network" in log_of(second)
    # Another network that would use the same device.
    lab.put_config({**V4, "Network": "10.9.0.0/16"}, "/other")
    flags = [
        f"--etcd-endpoints={lab.etcd_url}",
        "--etcd-prefix=/other",
        f"--subnet-file={lab.folder}/third.env",
    ]
    third = lab.start("third", node.netns, [*PROGRAM, *flags])
    assert exit_code(third) == 5
    assert "serves device flannel.1" in log_of(third)
    # The same network in another namespace is another node.
    other = lab.add_node()
    wait_ready([lab.start_daemon(other)])


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, "the same network /coreos.com/network"),
        ({"FLANNELD_ETCD_PREFIX": "/other"}, "the same device (its subnet is 10.5.7.0/24)"),
    ],
)
def test_a_running_flannel_is_detected_and_named(lab: Lab, environ: dict[str, str], reason: str) -> None:
    """A stand-in with flannel's name: what is looked at is the process and its files, not what it does."""
    lab.put_config(V4)
    node = lab.add_node()
    flanneld, env = lab.folder / "flanneld", lab.folder / "flannel.env"
    shutil.copy(shutil.which("sleep") or "", flanneld)
    env.write_text("FLANNEL_SUBNET=10.5.7.1/24\n")
    lab.ip(
        node.netns,
        f"link add flannel.1 type vxlan id 1 dev eth0 local {node.address} dstport 8472",
        "address add 10.5.7.0/32 dev flannel.1",
    )
    variables = [f"{name}={value}" for name, value in {**environ, "FLANNELD_SUBNET_FILE": str(env)}.items()]
    running = lab.start("flannel", node.netns, ["env", *variables, str(flanneld), "60"])
    comm = Path(f"/proc/{running.popen.pid}/comm")
    wait_until(lambda: comm.read_text().strip() == "flanneld", "the stand-in")
    daemon = lab.start_daemon(node)
    assert exit_code(daemon) == 5
    assert f"flanneld (process {running.popen.pid}) serves {reason}" in log_of(daemon)
    assert leases(lab) == {}


# --- bad surroundings ---


def test_waits_for_etcd_and_for_a_config_and_says_so_once(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    daemon = lab.start_daemon(lab.add_node())
    wait_for_log(daemon, "connection refused")
    daemon.listen()
    assert "192.168.77.254:2379" in daemon.status
    lab.start_etcd()
    wait_for_log(daemon, "no network config yet: put one at /coreos.com/network/config")
    for text, words in (
        ('{"Network":', "not usable JSON"),
        ('{"Network":"10.5.0.0/16"}', "udp, which is not in this version yet; one that works is"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":-1}}', "Backend.VNI is -1"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"pigeon"}}', "'pigeon' is not in this version"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.1.0"}', "SubnetMin is 10.5.9.0"),
    ):
        lab.etcdctl("put", f"{ETCD_PREFIX}/config", text)
        wait_for_log(daemon, words)
        daemon.listen()
        assert daemon.status.startswith("waiting: ")
        assert daemon.ready_after is None
    lab.put_config(V4)
    wait_ready([daemon])
    warnings = [line for line in log_of(daemon).splitlines() if "WARNING" in line]
    assert len(warnings) == len({re.sub(r"^\S+ ", "", line) for line in warnings}), "each said once"
    assert len(warnings) < 12


def test_bad_leases_harm_nobody_and_are_named_once(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    assert node.daemon is not None
    own = node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    bad: dict[str, Any] = {
        "foo": "hello",
        "10.5.201.0-24": "{",
        "10.5.202.0-24": peer(202, PublicIP="127.0.0.1"),
        "10.5.203.0-24": peer(203, PublicIP="224.1.1.1"),
        "10.5.204.0-24": peer(204, PublicIP=str(node.address)),
        "10.5.205.0-24": peer(205, PublicIP="10.5.9.9"),
        "10.5.206.0-24": peer(206, BackendType="host-gw"),
        "10.5.207.0-24": peer(207, BackendData={"VNI": 1, "VtepMAC": "$(reboot)"}),
        "10.5.208.0-24": peer(208, BackendData=[[[[]]]]),
        "10.5.209.0-24": peer(209, PublicIP=None),
        "10.5.210.0-24": "x" * 200_000,
        "10.5.211.0-24": "",
        "0.0.0.0-1": peer(212),
        "192.168.77.0-24": peer(213),
        f"{own}.128-25": peer(214),
        "10.5.300.0-24": peer(215),
    }
    good = peer(220)
    for key, value in bad.items():
        put_lease(lab, key, value)
    put_lease(lab, "10.5.220.0-24", good)
    wait_until(lambda: routes(lab, node) >= 1, "the good peer's route")
    assert [route["dst"] for route in lab.ip_json(node.netns, "route show proto 70")] == ["10.5.220.0/24"]
    for key, value in bad.items():
        put_lease(lab, key, value)
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.220.0-24")
    wait_until(lambda: routes(lab, node) == 0, "the good peer's route to go")
    text = log_of(node.daemon)
    for key in bad:
        assert len(re.findall(rf"lease {re.escape(key)} is (?:not programmed|unreadable): ", text)) == 1, key
    assert node.daemon.popen.poll() is None
    assert all(len(line) < 500 for line in text.splitlines())
    # And the same from a listing.
    put_lease(lab, "10.5.220.0-24", good)
    stop([node.daemon])
    wait_ready([lab.start_daemon(node)])
    assert [route["dst"] for route in lab.ip_json(node.netns, "route show proto 70")] == ["10.5.220.0/24"]


def test_a_lease_that_contains_the_uplink_or_etcd_does_not_cut_the_node_off(lab: Lab) -> None:
    lab.put_config({"Network": "192.168.0.0/16", "Backend": {"Type": "vxlan"}})
    node = lab.add_node()
    lab.ip(node.netns, "route add 192.168.200.0/24 via 192.168.77.254 dev eth0 proto static")
    before = run("ip", "route", "show", "dev", "eth0", netns=node.netns)
    daemon = lab.start_daemon(node)
    wait_ready([daemon])
    for key in ("192.168.77.0-24", "192.168.77.254-31", "192.168.64.0-18", "192.168.200.0-24"):
        put_lease(lab, key, peer(9, PublicIP="172.30.0.9"))
        put_lease(lab, "192.168.222.0-24", peer(10, PublicIP="172.30.0.10"))
        wait_until(lambda: "192.168.222.0/24" in run("ip", "route", netns=node.netns), "the good peer")
        assert run("ip", "route", "show", "dev", "eth0", netns=node.netns) == before
        lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/{key}")
        lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/192.168.222.0-24")
        wait_until(
            lambda: "192.168.222.0/24" not in run("ip", "route", netns=node.netns), "the good peer to go"
        )
        assert run("ip", "route", "show", "dev", "eth0", netns=node.netns) == before
    text = log_of(daemon)
    assert "lease 192.168.77.0-24 is not programmed: its subnet 192.168.77.0/24 contains 192.168.77.1" in text
    assert "192.168.77.254, where the store is" in text
    assert "add route 192.168.200.0/24 via 192.168.200.0 dev flannel.1: eth0 has a route to it" in text


def test_the_uplink_is_not_left_for_a_second_address_or_another_default_route(lab: Lab) -> None:
    (node,) = cluster(lab, V4, 1)
    before = leases(lab)
    lab.ip(
        node.netns,
        "address add 192.168.77.50/24 dev eth0",
        "link add vpn0 type veth peer name far0",
        "link set vpn0 up",
        "address add 10.99.0.2/24 dev vpn0",
        "route replace default via 10.99.0.1 dev vpn0",
        "link set eth0 mtu 1450",
    )
    wait_until(lambda: node.subnet_env()["FLANNEL_MTU"] == "1400", "the MTU change that follows it")
    assert leases(lab) == before


def test_a_bridge_that_holds_a_peers_subnet_is_named_and_left_alone(lab: Lab) -> None:
    """The classic: docker0 is still on the subnet that the node had before."""
    (node,) = cluster(lab, V4, 1)
    lab.ip(
        node.netns,
        "link add docker0 type bridge",
        "link set docker0 up",
        "address add 10.5.99.1/24 dev docker0",
    )
    put_lease(lab, "10.5.99.0-24", peer(9))
    assert node.daemon is not None
    wait_for_log(node.daemon, "add route 10.5.99.0/24 via 10.5.99.0 dev flannel.1: docker0 has a route to it")
    assert "dev docker0" in run("ip", "route", "show", "10.5.99.0/24", netns=node.netns)
    lab.ip(node.netns, "link del docker0")
    wait_until(lambda: routes(lab, node) == 1, "the peer once the bridge is gone", 20)


def test_an_emptied_etcd_gets_every_lease_back(lab: Lab) -> None:
    nodes = cluster(lab, V4)
    before = leases(lab)
    assert lab.etcd is not None
    lab.etcd.popen.kill()
    lab.etcd.popen.wait()
    shutil.rmtree(lab.folder / "etcd")
    lab.start_etcd()
    lab.put_config(V4)
    wait_until(lambda: leases(lab) == before, "the leases", 20)
    for node in nodes:
        wait_until(lambda node=node: routes(lab, node) == 1, "the peer")  # type: ignore[misc]
        assert node.daemon is not None
        assert node.daemon.popen.poll() is None


def test_a_subnet_taken_by_somebody_else_is_left_to_him(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    wait_ready([lab.start_daemon(node)])
    (key,) = leases(lab)
    put_lease(lab, key, peer(9))
    wait_until(lambda: len(leases(lab)) == 2, "another lease of ours")
    wait_until(lambda: routes(lab, node) == 1, "the new owner as a peer")
    (route,) = lab.ip_json(node.netns, "route show proto 70")
    assert route["dst"] == key.replace("-", "/")
    own = next(name for name, lease in leases(lab).items() if lease["PublicIP"] == "192.168.77.1")
    wait_until(lambda: node.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0] + ".0-24" == own, "subnet.env")
    address = lab.ip_json(node.netns, "address show flannel.1")[0]["addr_info"]
    assert [entry["local"] for entry in address] == [own.partition("-")[0]]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00garbage", b"FLANNEL_SUBNET=10.5.", b"", None],
    ids=["binary", "truncated", "empty", "a folder"],
)
def test_an_unusable_subnet_env_means_no_previous_subnet(lab: Lab, content: bytes | None) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    if content is None:
        node.subnet_file.mkdir()
        daemon = lab.start_daemon(node)
        assert exit_code(daemon) == 1
        assert f"cannot write {node.subnet_file}" in log_of(daemon)
        return
    node.subnet_file.write_bytes(content)
    wait_ready([lab.start_daemon(node)])
    assert node.subnet_env()["FLANNEL_SUBNET"].startswith("10.5.")


def test_the_previous_subnet_is_asked_for_again(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    node.subnet_file.write_text("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.123.1/24\n")
    wait_ready([lab.start_daemon(node)])
    assert node.subnet_env()["FLANNEL_SUBNET"] == "10.5.123.1/24"


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ("route del default", [], "default route"),
        ("link add eth1 type veth peer name far1", ["--iface=eth1"], "eth1"),
        ("link set lo up", ["--iface=eth9"], "eth9"),
        ("link set lo up", ["--public-ip=198.51.100.1"], "--iface"),
        ("address add 198.51.100.1/24 dev lo", ["--iface=198.51.100.2"], "198.51.100.2"),
    ],
)
def test_no_usable_uplink(lab: Lab, change: str, flags: list[str], words: str) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    lab.ip(node.netns, change)
    assert_fails(lab.start_daemon(node, flags=flags), 3, words)


def test_an_uplink_with_too_small_an_mtu(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    lab.ip(node.netns, "link add eth1 mtu 100 type veth peer name far1", "link set eth1 up")
    lab.ip(node.netns, "address add 198.51.100.1/24 dev eth1")
    assert_fails(lab.start_daemon(node, flags=["--iface=eth1"]), 3, "MTU 100 leaves 50 bytes")


def assert_fails(daemon: Process, code: int, words: str) -> None:
    """One clear last line, a non-zero exit code, no traceback."""
    assert exit_code(daemon) == code
    last = log_of(daemon).splitlines()[-1]
    assert "ERROR" in last
    assert words in last
    assert "Traceback" not in log_of(daemon)


def test_no_privileges(lab: Lab) -> None:
    node = lab.add_node()
    daemon = lab.start("plain", node.netns, ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *PROGRAM])
    assert exit_code(daemon) == 4
    assert "CAP_NET_ADMIN" in log_of(daemon)


def test_net_admin_is_enough(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    keep = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", *PROGRAM]
    wait_ready([lab.start_daemon(node, keep)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["waiting for etcd", "waiting for a config", "half-open etcd"])
def test_a_stop_takes_less_than_a_second_in_every_phase(
    make_lab: Callable[..., Lab], phase: str, number: signal.Signals
) -> None:
    lab = make_lab()
    node = lab.add_node()
    if phase == "waiting for a config":
        lab.start_etcd()
    if phase == "half-open etcd":
        code = "import socket, time; s = socket.create_server(('192.168.77.254', 2379)); time.sleep(60)"
        lab.start("silent", lab.underlay, [sys.executable, "-c", code])
    daemon = lab.start_daemon(node)
    wait_until(lambda: "flannelpy 0" in log_of(daemon), "the first line")
    if phase == "waiting for a config":
        wait_for_log(daemon, "no network config yet")
    pid = int(run("pgrep", "-f", "-o", str(node.subnet_file)).strip())
    began = time.monotonic()
    os.kill(pid, number)
    assert exit_code(daemon) == 0
    assert time.monotonic() - began < 1


def secure_etcd(lab: Lab, authority: Authority, *, expired: bool = False) -> str:
    """An etcd in the underlay that speaks TLS only; its URL."""
    server = authority.issue("server", address="192.168.77.254", expired=expired)
    url = "https://192.168.77.254:2379"
    urls = [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
    files = [
        f"--data-dir={lab.folder / 'tls'}",
        f"--cert-file={server.certificate}",
        f"--key-file={server.key}",
    ]
    lab.start("etcd-tls", lab.underlay, ["etcd", *urls, *files])
    ctl = [
        "env",
        "ETCDCTL_API=3",
        "etcdctl",
        f"--endpoints={url}",
        "--insecure-skip-tls-verify",
        "--insecure-transport=false",
    ]

    def serves() -> bool:
        with suppress(LabError):
            run(*ctl, "put", f"{ETCD_PREFIX}/config", json.dumps(V4), netns=lab.underlay)
            return True
        return False

    wait_until(serves, "etcd with TLS")
    return url


def test_tls_with_just_a_ca(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    authority = Authority(lab.folder, "ca")
    url = secure_etcd(lab, authority)
    wait_ready(
        [
            lab.start_daemon(
                lab.add_node(), flags=[f"--etcd-endpoints={url}", f"--etcd-cafile={authority.file}"]
            )
        ]
    )


@pytest.mark.parametrize(("expired", "words"), [(False, "certificate"), (True, "expired")])
def test_a_certificate_that_cannot_be_trusted_is_said_and_waited_for(
    make_lab: Callable[..., Lab], expired: bool, words: str
) -> None:
    lab = make_lab()
    authority, stranger = Authority(lab.folder, "ca"), Authority(lab.folder, "stranger")
    url = secure_etcd(lab, authority, expired=expired)
    trusted = authority if expired else stranger
    daemon = lab.start_daemon(
        lab.add_node(), flags=[f"--etcd-endpoints={url}", f"--etcd-cafile={trusted.file}"]
    )
    wait_for_log(daemon, words)
    assert daemon.popen.poll() is None
    assert len(log_of(daemon).splitlines()) < 6, "said once"


def test_a_ca_file_that_cannot_be_read(lab: Lab) -> None:
    flags = ["--etcd-endpoints=https://192.168.77.254:2379", "--etcd-cafile=/nowhere/ca.pem"]
    daemon = lab.start_daemon(lab.add_node(), flags=flags)
    assert_fails(daemon, 6, "/nowhere/ca.pem")


def test_user_and_password(lab: Lab) -> None:
    lab.put_config(V4)
    for command in ("user add root:secret-1", "role add root", "user grant-role root root", "auth enable"):
        lab.etcdctl(*command.split())
    node = lab.add_node()
    wrong = lab.start_daemon(node, flags=["--etcd-username=root", "--etcd-password=secret-2"])
    assert_fails(wrong, 6, "password")
    assert "secret-2" not in log_of(wrong)
    wait_ready([lab.start_daemon(node, flags=["--etcd-username=root", "--etcd-password=secret-1"])])


def test_secrets_are_not_logged(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    secret = "correct-horse-battery"  # noqa: S105
    daemon = lab.start_daemon(node, flags=["--etcd-username=root", f"--etcd-password={secret}", "--v=9"])
    wait_until(lambda: len(log_of(daemon).splitlines()) > 2 or daemon.popen.poll() is not None, "some log")
    assert secret not in log_of(daemon)


def test_an_overlap_with_the_hosts_own_network_is_warned_of(lab: Lab) -> None:
    lab.put_config({"Network": "192.168.0.0/16", "Backend": {"Type": "vxlan"}})
    daemon = lab.start_daemon(lab.add_node())
    wait_ready([daemon])
    wait_for_log(daemon, "192.168.77.1/24 on eth0 overlaps Network 192.168.0.0/16")


def test_json_log(lab: Lab) -> None:
    lab.put_config(V4)
    daemon = lab.start_daemon(lab.add_node(), flags=["--log-format=json"])
    wait_ready([daemon])
    for line in log_of(daemon).splitlines():
        assert {"time", "level", "msg"} <= json.loads(line).keys()


@pytest.mark.parametrize(
    "change", [{"Backend": {"Type": "vxlan", "VNI": 7}}, {"Backend": {"Type": "host-gw"}}]
)
def test_what_a_former_config_made_is_removed(lab: Lab, change: dict[str, Any]) -> None:
    one, _two = cluster(lab, V4)
    lab.ip(
        one.netns,
        "link add flannel.9 type vxlan id 9 dev eth0 dstport 8472",
        "address add 10.99.0.0/32 dev flannel.9",
    )
    for node in lab.nodes:
        assert node.daemon is not None
        stop([node.daemon])
    lab.put_config({**V4, **change})
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    names = wait_until(
        lambda: [names for names in [links(lab, one)] if "flannel.1" not in names], "the old device to go"
    )[0]
    assert "flannel.9" in names, "another network's device stays"
    wait_until(lambda: routes(lab, one) == 1, "the peer by the new backend")
    assert lab.ip_json(one.netns, "nexthop show dev flannel.9") == []
    for source, target in (lab.nodes, lab.nodes[::-1]):
        reach(lab, source, str(target.pods[0].address).partition("/")[0])


def links(lab: Lab, node: Node) -> set[str]:
    return {link["ifname"] for link in lab.ip_json(node.netns, "link show")}


def test_cleanup_shows_first_and_then_removes_what_is_ours(lab: Lab) -> None:
    one, _two = cluster(lab, V4)
    lab.ip(one.netns, "route add 10.5.0.0/24 via 192.168.77.254 dev eth0")
    command = (*PROGRAM, "cleanup", f"--subnet-file={one.subnet_file}")
    with pytest.raises(LabError, match="serves"):
        run(*command, "--yes", netns=one.netns)
    assert one.daemon is not None
    stop([one.daemon])
    shown = run(*command, netns=one.netns)
    assert "would remove: device flannel.1" in shown
    assert f"would remove: file {one.subnet_file}" in shown
    assert "flannel.1" in links(lab, one), "only shown"
    removed = json.loads(run(*command, "--yes", "--output=json", netns=one.netns))
    assert removed["removed"]
    assert removed["failed"] == []
    assert "flannel.1" not in links(lab, one)
    assert "proto 70" not in run("ip", "route", netns=one.netns)
    assert run("ip", "nexthop", netns=one.netns) == ""
    assert "10.5.0.0/24" in run("ip", "route", netns=one.netns)
    assert not one.subnet_file.exists()
    assert "nothing of flannelpy's is here" in run(*command, netns=one.netns)
    assert len(leases(lab)) == 2, "the lease is for etcd to expire"


# --- beside a real flannel ---


FLANNELD = os.environ.get("FLANNELD", "")
needs_flannel = pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")


@needs_flannel
def test_a_mixed_cluster_exchanges_packets(lab: Lab) -> None:
    lab.put_config(V4)
    ours, theirs, third = lab.add_node(), lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(ours)])
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(third)])
    for node in lab.nodes:
        lab.add_pod(node)
    for source in lab.nodes:
        for target in lab.nodes:
            if source is not target:
                address = str(target.pods[0].address).partition("/")[0]
                wait_until(
                    lambda s=source, a=address: lab.ping(s.pods[0].netns, a, size=1450, count=1).received,  # type: ignore[misc]
                    f"{source.name} to {target.name}",
                )


@needs_flannel
@pytest.mark.parametrize("first", ["flannel", "flannelpy"])
def test_one_daemon_takes_over_from_the_other(lab: Lab, first: str) -> None:
    """Lease, device, MAC and forwarding stay, in both directions."""
    lab.put_config(V4)
    one, two = lab.add_node(), lab.add_node()
    commands = {"flannel": [FLANNELD], "flannelpy": []}
    second = "flannelpy" if first == "flannel" else "flannel"
    wait_ready([lab.start_daemon(two)])
    wait_ready([lab.start_daemon(one, commands[first])])
    lab.add_pod(one)
    lab.add_pod(two)
    target = str(two.pods[0].address).partition("/")[0]
    wait_until(lambda: lab.ping(one.pods[0].netns, target, count=1).received, "the first daemon's overlay")
    before = lab.ip_json(one.netns, "link show flannel.1")[0]
    lease = leases(lab)
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([lab.start_daemon(one, commands[second])])
    after = lab.ip_json(one.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
    assert leases(lab) == lease
    assert lab.ping(one.pods[0].netns, target, count=5).received == 5


def test_the_lab_itself_is_sound(lab: Lab) -> None:
    """Nothing is reached before a daemon runs: the pings above prove something."""
    one, two = lab.add_node(), lab.add_node()
    with pytest.raises(LabError):
        lab.add_pod(one)
    assert lab.ping(one.netns, "10.5.1.1", count=1).received == 0
    assert lab.ping(one.netns, str(two.address), count=1).received == 1
