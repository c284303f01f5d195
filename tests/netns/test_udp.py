"""The udp backend as whole daemons with their forwarders, in network namespaces with a real etcd."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import LabError, run, stop, wait_ready, wait_until
from tests.netns.nodes import PROGRAM, leases, links, log_of, put_lease, reach, wait_for_log

pytestmark = [pytest.mark.root, pytest.mark.etcd]

UDP = {
    "Network": "10.5.0.0/16",
    "SubnetMin": "10.5.100.0",
    "SubnetMax": "10.5.190.0",
    "Backend": {"Type": "udp", "FastPath": "off"},
}
V6 = {"IPv6Network": "fd00:5::/48", "EnableIPv6": True}
FLANNELD = os.environ.get("FLANNELD", "")
needs_flannel = pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")


def cluster(lab: Lab, config: dict[str, Any] = UDP, nodes: int = 2) -> list[Node]:
    lab.put_config(config)
    for _number in range(nodes):
        lab.add_node()
    # Without probes of peers: packets are counted here.
    wait_ready([lab.start_daemon(node, flags=["--peer-probes=false"]) for node in lab.nodes])
    for node in lab.nodes:
        lab.add_pod(node)
    for source in lab.nodes:
        for target in lab.nodes:
            if source is not target:
                reach(lab, source, address(target))
    return lab.nodes


def address(node: Node) -> str:
    found = node.pods[0].address or node.pods[0].address6
    assert found is not None
    return str(found.ip)


def counters(node: Node) -> dict[str, int]:
    found: dict[str, int] = json.loads(
        run(sys.executable, "-m", "flannelpy.backends.udp", "--counters=flannel0", netns=node.netns)
    )
    return found


def forwarder(lab: Lab, node: Node) -> int:
    """The process that carries the node's packets."""
    assert node.daemon is not None
    log = log_of(node.daemon)
    return int(re.findall(r"started a forwarder of flannel0, process (\d+)", log)[-1])


def flow(lab: Lab, source: Node, target: Node, packets: int) -> Any:
    words = ["ping", "-n", "-i", "0.01", "-c", str(packets), "-W", "2", address(target)]
    return lab.start("flow", source.pods[0].netns, words)


def assert_none_lost(flowing: Any, *nodes: Node) -> None:
    assert flowing.popen.wait(40) == 0
    assert " 0% packet loss" in log_of(flowing), f"{log_of(flowing)[-120:]} {[counters(n) for n in nodes]}"


@pytest.mark.parametrize(
    ("config", "mtu"),
    [(UDP, 1472), ({**UDP, **V6}, 1472), ({**UDP, **V6, "EnableIPv4": False}, 1452)],
    ids=["v4", "dual", "v6"],
)
def test_pods_reach_each_other_with_full_packets(
    make_lab: Callable[..., Lab], config: dict[str, Any], mtu: int
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    nodes = cluster(lab, config, 3)
    for source in nodes:
        assert source.subnet_env()["FLANNEL_MTU"] == str(mtu)
        for target in nodes:
            for one in (target.pods[0].address, target.pods[0].address6):
                if one is not None and source is not target:
                    reach(lab, source, str(one.ip), mtu)
    (link,) = lab.ip_json(nodes[0].netns, "-d link show flannel0")
    assert (link["mtu"], link["txqlen"], link["linkinfo"]["info_data"]["persist"]) == (mtu, 1000, True)
    assert "fe80" not in run("ip", "-6", "address", "show", "dev", "flannel0", netns=nodes[0].netns)
    if config is UDP:
        (route,) = lab.ip_json(nodes[0].netns, "route show dev flannel0")
        assert (route["dst"], route["protocol"]) == ("10.5.0.0/16", "70")
        assert {tuple(value) for value in leases(lab).values()} == {("PublicIP", "PublicIPv6")}
        assert {value["PublicIPv6"] for value in leases(lab).values()} == {None}


def test_packets_flow_on_while_daemons_come_and_go(lab: Lab) -> None:
    """Stopped, killed, started again: one forwarder all along, and nothing is lost."""
    one, two = cluster(lab)
    process = forwarder(lab, one)
    flowing = flow(lab, two, one, 400)
    assert one.daemon is not None
    stop([one.daemon])
    again = lab.start_daemon(one)
    wait_ready([again])
    again.popen.kill()
    again.popen.wait()
    wait_ready([lab.start_daemon(one)])
    assert_none_lost(flowing, one, two)
    assert forwarder(lab, one) == process
    assert one.daemon is not None


def test_a_forwarder_has_no_privileges(lab: Lab) -> None:
    one, _two = cluster(lab)
    status = Path(f"/proc/{forwarder(lab, one)}/status").read_text()
    assert re.search(r"^Uid:\s+65534\s+65534\s+65534\s+65534$", status, re.MULTILINE)
    assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Amb):\s+(\w+)$", status, re.MULTILINE)) == {"0" * 16}
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    environ = Path(f"/proc/{forwarder(lab, one)}/environ").read_bytes()
    assert b"NOTIFY" not in environ


def test_a_forwarder_that_dies_is_back_within_a_second_with_the_reason(lab: Lab) -> None:
    one, two = cluster(lab)
    before = forwarder(lab, one)
    flowing = flow(lab, two, one, 200)
    began = time.monotonic()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: forwarder(lab, one) != before, "another forwarder", 5)
    reach(lab, one, address(two))
    took = time.monotonic() - began
    assert one.daemon is not None
    wait_for_log(one.daemon, "the forwarder of flannel0 ended: signal 9")
    assert_none_lost(flowing, one, two)  # what came in between has waited in the descriptors' queues
    assert took < 3, "a second on an idle machine"


def test_a_forwarder_of_another_version_hands_its_descriptors_over(lab: Lab) -> None:
    one, two = cluster(lab)
    before = forwarder(lab, one)
    assert one.daemon is not None
    stop([one.daemon])
    flowing = flow(lab, two, one, 300)
    newer = "import flannelpy; flannelpy.__version__ = '99.0'; from flannelpy.__main__ import main; main()"
    wait_ready([lab.start_daemon(one, [sys.executable, "-c", newer])])
    assert one.daemon is not None
    wait_for_log(one.daemon, "is of version 0.1.0, not 99.0: replacing it")
    assert_none_lost(flowing, one, two)
    wait_until(lambda: not Path(f"/proc/{before}").exists(), "the old forwarder to go")


def test_a_forwarder_that_systemd_started_is_used(lab: Lab) -> None:
    """As flannelpy-udp.service does it: a listener that root made, in a network namespace of its own."""
    lab.put_config(UDP)
    one, two = lab.add_node(), lab.add_node()
    script = (
        "import ctypes, os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.bind('\\0flannelpy/udp/flannel0'); s.listen(8);"
        "os.dup2(s.fileno(), 3); os.set_inheritable(3, True);"
        "ctypes.CDLL(None).unshare(0x40000000); print('listens', flush=True);"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'flannelpy.backends.udp'])"
    )
    unit = lab.start("unit", one.netns, [sys.executable, "-c", script])
    wait_for_log(unit, "listens")
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    for node in (one, two):
        lab.add_pod(node)
    reach(lab, one, address(two), 1472)
    assert one.daemon is not None
    assert "started a forwarder" not in log_of(one.daemon)


def test_strangers_and_liars_are_shut_out_and_counted(lab: Lab) -> None:
    one, two = cluster(lab)
    stranger = lab.add_node()
    target = one.pods[0].address
    assert target is not None
    before = counters(one)
    own = two.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]
    assert inject(stranger, one, f"{own}.77", str(target.ip)) == 1  # from the right subnet, by the wrong host
    assert inject(two, one, "10.5.222.9", str(target.ip)) == 1  # by a peer, from a wrong subnet
    assert inject(two, one, f"{own}.77", str(target.ip)) == 1
    assert inject(two, one, str(two.address), str(target.ip)) == 1  # a process bound to its host's address
    inject(two, one, "", "")
    wait_until(lambda: gain(one, before).get("drop_malformed"), "the last one")
    found = gain(one, before)
    assert {name: found.get(name, 0) for name in ("drop_stranger", "drop_spoofed", "drop_malformed")} == {
        "drop_stranger": 1,
        "drop_spoofed": 1,
        "drop_malformed": 1,
    }
    assert found["received_packets"] == 2


def test_an_option_lets_everybody_in(lab: Lab) -> None:
    one, _two = cluster(lab, {**UDP, "Backend": {"Type": "udp", "AcceptAnySource": True, "FastPath": "off"}})
    stranger = lab.add_node()
    before = counters(one)
    inject(stranger, one, "10.5.222.9", address(one))
    wait_until(lambda: gain(one, before).get("received_packets"), "the stranger's packet")
    assert not {"drop_stranger", "drop_spoofed"} & gain(one, before).keys()


def gain(node: Node, before: dict[str, int]) -> dict[str, int]:
    now = counters(node)
    return {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)}


def inject(sender: Node, receiver: Node, source: str, destination: str, *, no_sum: bool = False) -> int:
    """Send one UDP packet from `source` to `destination` in a datagram; without a source, garbage.

    `no_sum`: without an outer checksum, as a fast path sends it.
    """
    script = (
        "import socket, sys; from tests.packets import Packet;"
        "data = Packet(*sys.argv[3:5], protocol=17).bytes() if sys.argv[3] else b'garbage';"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 0));"
        f"s.setsockopt(socket.SOL_SOCKET, 11, {int(no_sum)});"  # SO_NO_CHECK
        "s.sendto(data, (sys.argv[2], 8285))"
    )
    run(sys.executable, "-c", script, str(sender.address), str(receiver.address), source, destination,
        netns=sender.netns)  # fmt: skip
    return 1


def test_each_host_is_one_hop_and_says_what_it_cannot_carry(lab: Lab) -> None:
    one, two = cluster(lab)
    pod = one.pods[0].netns

    def ping(target: str, *words: str) -> str:
        try:
            return run("ping", "-n", "-c", "1", "-W", "2", *words, target, netns=pod)
        except LabError as error:
            return str(error)

    def exceeded(hop: int) -> str | None:
        found = re.search(r"From (\S+?):? .*Time to live exceeded", ping(address(two), "-t", str(hop)))
        return found[1] if found else None

    gateway, far = (node.subnet_env()["FLANNEL_SUBNET"].partition("/")[0] for node in (one, two))
    assert exceeded(1) == gateway
    assert exceeded(2) == re.sub(r"1$", "0", far)  # flannel0's own address
    assert "1 received" in ping(address(two), "-t", "3")
    assert "1 received" in ping(address(two), "-s", "4000")  # fragmented before the tunnel
    lab.ip(one.netns, "link set pods0 mtu 1500", "link set pod1 mtu 1500")
    lab.ip(pod, "link set eth0 mtu 1500")
    assert "mtu = 1472" in ping(address(two), "-M", "do", "-s", "1472")
    before = counters(one)
    assert "Destination Net Unreachable" in ping("10.5.250.1")
    assert gain(one, before)["drop_no_peer"] == gain(one, before)["icmp_sent"] == 1


def test_peers_come_and_go(lab: Lab) -> None:
    (one,) = cluster(lab, nodes=1)
    before = counters(one)
    put_lease(lab, "10.5.200.0-24", {"PublicIP": "192.168.77.9", "PublicIPv6": None})
    put_lease(lab, "10.5.201.0-24", {"PublicIP": "192.168.77.9", "PublicIPv6": None, "BackendType": "vxlan"})
    pod = one.pods[0].netns

    def answered() -> bool:
        lab.ping(pod, "10.5.200.1", count=1, timeout=0.1)
        return gain(one, before).get("sent_packets", 0) > 0

    wait_until(answered, "a packet for the new peer")
    assert one.daemon is not None
    wait_for_log(one.daemon, "lease 10.5.201.0-24 is not programmed: its backend type is 'vxlan'")
    lab.etcdctl("del", "/coreos.com/network/subnets/10.5.200.0-24")
    wait_until(lambda: "Net Unreachable" in lab.ping(pod, "10.5.200.1", count=1).text, "the peer to be gone")


def test_the_device_is_made_anew_and_follows_the_uplinks_mtu(lab: Lab) -> None:
    one, two = cluster(lab)
    lab.ip(one.netns, "link delete flannel0")
    wait_until(lambda: "flannel0" in links(lab, one), "flannel0")
    reach(lab, one, address(two))
    for uplink, ours in ((1400, 1372), (1500, 1472)):
        for node in (one, two):
            lab.ip(node.netns, f"link set eth0 mtu {uplink}")
        for node in (one, two):
            wait_until(lambda netns=node.netns, ours=ours: mtu(lab, netns) == ours, f"MTU {ours}")  # type: ignore[misc]
        reach(lab, one, address(two), ours)


def mtu(lab: Lab, netns: str) -> int:
    return int(lab.ip_json(netns, "link show flannel0")[0]["mtu"])


def test_clean_up_ends_the_forwarder_too(lab: Lab) -> None:
    one, _two = cluster(lab)
    process = forwarder(lab, one)
    assert one.daemon is not None
    stop([one.daemon])
    words = [*PROGRAM, "cleanup", "--yes", f"--subnet-file={one.subnet_file}"]
    said = run(*words, netns=one.netns)
    assert "forwarder of flannel0 on UDP 192.168.77.1 port 8285" in said
    assert "flannel0" not in links(lab, one)
    wait_until(lambda: not Path(f"/proc/{process}").exists(), "the forwarder to end")


def test_another_backend_leaves_nothing_of_this_one(lab: Lab) -> None:
    one, two = cluster(lab)
    process = forwarder(lab, one)
    for node in (one, two):
        assert node.daemon is not None
        stop([node.daemon])
    lab.put_config({**UDP, "Backend": {"Type": "vxlan"}})
    wait_ready([lab.start_daemon(node) for node in (one, two)])
    wait_until(lambda: "flannel0" not in links(lab, one), "flannel0 to go")
    wait_until(lambda: not Path(f"/proc/{process}").exists(), "the forwarder to end")
    reach(lab, one, address(two), 1450)


def test_a_port_that_is_taken_is_named(lab: Lab) -> None:
    lab.put_config(UDP)
    node = lab.add_node()
    script = (
        "import socket, time; s = socket.socket(2, 2); s.bind(('192.168.77.1', 8285));"
        "print('bound', flush=True); time.sleep(60)"
    )
    thief = lab.start("thief", node.netns, [sys.executable, "-c", script])
    wait_for_log(thief, "bound")
    daemon = lab.start_daemon(node)
    wait_for_log(daemon, "UDP port 8285 of 192.168.77.1 is taken: stop what uses it")
    thief.popen.terminate()
    thief.popen.wait()
    wait_until(
        lambda: "started a forwarder" in log_of(daemon) and counters(node) is not None, "the forwarder"
    )
    wait_ready([daemon])


def test_nobody_else_may_speak_to_a_forwarder(lab: Lab) -> None:
    one, _two = cluster(lab)
    words = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "--no-new-privs")
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.connect('\\0flannelpy/udp/flannel0'); s.send(b'{\"do\":\"stop\"}'); print(s.recv(99))"
    )
    try:
        said = run(*words, "/usr/bin/python3", "-c", script, netns=one.netns)
    except LabError as error:
        said = str(error)
    assert "b''" in said or "Broken pipe" in said or "reset" in said
    assert counters(one)["received_packets"] > 0


@needs_flannel
def test_a_mixed_cluster_exchanges_packets(lab: Lab) -> None:
    """Ping, full and fragmented; TCP both ways."""
    lab.put_config(UDP)
    ours, theirs, third = lab.add_node(), lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(ours)])
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(third)])
    for node in lab.nodes:
        lab.add_pod(node)
    for source in lab.nodes:
        for target in lab.nodes:
            if source is not target:
                reach(lab, source, address(target), 1472)
                words = ("ping", "-n", "-c", "1", "-W", "2", "-s", "4000", address(target))
                assert "1 received" in run(*words, netns=source.pods[0].netns)
    for source, target in ((ours, theirs), (theirs, ours)):
        assert transfer(lab, source, target) == 1 << 22
    # A lease that flannel wrote and one of ours differ in nothing but addresses.
    assert len({tuple(value) for value in leases(lab).values()}) == 1


def transfer(lab: Lab, source: Node, target: Node) -> int:
    """Four MiB over TCP; how many bytes came, all of them right."""
    listen = (
        "import socket; s = socket.create_server(('', 7000)); print('listens', flush=True);"
        "c, _ = s.accept();"
        "d = b''.join(iter(lambda: c.recv(65536), b''));"
        "print('got', len(d), d == bytes(range(256)) * (len(d) // 256), flush=True)"
    )
    send = (
        f"import socket; s = socket.create_connection(('{address(target)}', 7000));"
        "s.sendall(bytes(range(256)) * (1 << 14))"
    )
    server = lab.start(f"server-{target.name}", target.pods[0].netns, [sys.executable, "-c", listen])
    wait_for_log(server, "listens")
    run(sys.executable, "-c", send, netns=source.pods[0].netns)
    wait_for_log(server, "got")
    found = re.search(r"got (\d+) True", log_of(server))
    assert found is not None, log_of(server)
    return int(found[1])


@needs_flannel
def test_our_daemon_takes_over_from_flannel(lab: Lab) -> None:
    """Lease and subnet stay; flannel's TUN goes with flannel, ours comes in its place."""
    lab.put_config(UDP)
    one, two = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(two)])
    wait_ready([lab.start_daemon(one, [FLANNELD])])
    lab.add_pod(one)
    lab.add_pod(two)
    reach(lab, one, address(two))
    before = leases(lab)
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([lab.start_daemon(one)])
    reach(lab, one, address(two), 1472)
    assert leases(lab) == before


def test_full_speed_tcp_arrives_whole(lab: Lab) -> None:
    one, two = cluster(lab)
    before = counters(two)
    assert transfer(lab, one, two) == 1 << 22
    assert transfer(lab, two, one) == 1 << 22
    found = gain(two, before)
    assert not any(name.startswith("drop") for name in found), found
