"""Who may send encapsulated packets: spoofed ones between namespaces, counted or dropped, and real peers."""

import json
import re
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import LabError, inside, run, stop, wait_ready, wait_until
from tests.netns.nodes import V4, leases, log_of, reach, wait_for_log
from tests.netns.rules_lab import listener

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(120)]

STRANGER = "192.168.77.254"
"""An address of the underlay that has no lease."""
_SEND = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 8472))
"""


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return int(~(total + (total >> 16)) & 0xFFFF)


def vxlan(vtep: str, source_mac: str, target: str, port: int, word: str) -> bytes:
    """A VXLAN packet (RFC 7348) with a UDP packet from 10.5.1.1 in it."""
    udp = struct.pack("!HHHH", 4242, port, 8 + len(word), 0) + word.encode()
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0,
                       socket.inet_aton("10.5.1.1"), socket.inet_aton(target))  # fmt: skip
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    ethernet = bytes.fromhex((vtep + source_mac).replace(":", "")) + b"\x08\0"
    return b"\x08\0\0\0\0\0\x01\0" + ethernet + head + udp


def arrives(lab: Lab, node: Node, mac: str = "02:00:00:00:be:ef") -> bool:
    """Whether a spoofed packet from the underlay gets to the pod of a node."""
    vtep = lab.ip_json(node.netns, "link show flannel.1")[0]["address"]
    target = str(node.pods[0].address).partition("/")[0]
    with listener(lab, node.pods[0].netns, target) as (heard, port):
        data = vxlan(vtep, mac, target, port, "spoofed").hex()
        for _number in range(3):
            run(*inside(lab.underlay, sys.executable, "-c", _SEND, str(node.address), data))
        with suppress(LabError):
            return bool(wait_until(heard.heard, "the packet", 0.5))
    return False


def elements(node: Node, name: str) -> list[Any]:
    found = json.loads(run("nft", "-j", "list", "set", "inet", "flannelpy", name, netns=node.netns))
    items = found["nftables"][1]["set"].get("elem", [])
    return [item["elem"]["val"] if isinstance(item, dict) else item for item in items]


def exists(node: Node) -> bool:
    return "table inet flannelpy" in run("nft", "list", "tables", netns=node.netns)


def pair(lab: Lab, *flags: str) -> tuple[Node, Node]:
    lab.put_config(V4)
    one, two = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(one, flags=flags), lab.start_daemon(two)])
    for node in (one, two):
        lab.add_pod(node)
    wait_until(lambda: exists(one) and str(two.address) in elements(one, "peers4"), "the filter")
    # Packets of the overlay may come from anywhere inside; that is not what is tested here.
    run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", netns=one.netns)
    return one, two


def test_strangers_are_counted_and_named(lab: Lab) -> None:
    one, two = pair(lab)
    assert one.daemon is not None
    log = one.daemon
    assert arrives(lab, one)
    wait_until(lambda: f"peer filter: {STRANGER} sent" in log_of(log), "the name")
    assert "packet(s) to port 8472 that no lease explains; they are counted" in log_of(log)
    reach(lab, two, str(one.pods[0].address).partition("/")[0])
    assert elements(one, "strangers4") == [STRANGER]


def test_enforce_drops_strangers_and_never_a_peer(lab: Lab) -> None:
    one, two = pair(lab, "--peer-filter=enforce")
    assert one.daemon is not None
    target = str(one.pods[0].address).partition("/")[0]
    reach(lab, two, target)
    assert not arrives(lab, one)
    wait_for_log(one.daemon, "they are dropped")
    # A peer behind a NAT: its packets come from another address, with its VTEP's MAC.
    assert arrives(lab, one, lab.ip_json(two.netns, "link show flannel.1")[0]["address"])
    wait_for_log(one.daemon, "(NAT?); they are let through", 40)
    # Peers come and go.
    three = lab.add_node()
    wait_ready([lab.start_daemon(three)])
    lab.add_pod(three)
    reach(lab, three, target)
    reach(lab, one, str(three.pods[0].address).partition("/")[0])
    assert three.daemon is not None
    stop([three.daemon])
    (key,) = (key for key, value in leases(lab).items() if value["PublicIP"] == str(three.address))
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/{key}")
    wait_until(lambda: str(three.address) not in elements(one, "peers4"), "the peer to go")
    assert lab.ping(two.pods[0].netns, target, count=5).received == 5


def test_udp_names_strangers_and_its_forwarder_drops_them(lab: Lab) -> None:
    lab.put_config({**V4, "Backend": {"Type": "udp"}})
    one = lab.add_node()
    wait_ready([lab.start_daemon(one, flags=["--peer-filter=enforce"])])
    assert one.daemon is not None
    wait_until(lambda: exists(one), "the filter")
    wait_until(lambda: str(one.address) in elements(one, "armed4"), "the filter to be armed")
    run(*inside(lab.underlay, sys.executable, "-c", _SEND.replace("8472", "8285"), str(one.address), "45"))
    wait_for_log(one.daemon, f"peer filter: {STRANGER} sent 1 packet(s) to port 8285", 20)
    assert "that no lease explains; they are dropped by the forwarder" in log_of(one.daemon)
    assert " drop\n" not in run("nft", "list", "table", "inet", "flannelpy", netns=one.netns)


def test_udp_never_cuts_off_a_peer_behind_a_nat_where_the_network_is_open(lab: Lab) -> None:
    """Its packets come from another address, and nothing in them says whose they are."""
    lab.put_config({**V4, "Backend": {"Type": "udp", "AcceptAnySource": True, "FastPath": "off"}})
    one, two = lab.add_node(), lab.add_node()
    lab.ip(two.netns, "address add 192.168.77.250/24 dev eth0")
    run("iptables", "-t", "nat", "-A", "POSTROUTING", "-p", "udp", "--dport", "8285",
        "-j", "SNAT", "--to-source", "192.168.77.250", netns=two.netns)  # fmt: skip
    first, second = (lab.start_daemon(node, flags=["--peer-filter=enforce"]) for node in (one, two))
    wait_ready([first, second])
    for node in (one, two):
        lab.add_pod(node)
    target = str(one.pods[0].address).partition("/")[0]
    reach(lab, two, target)
    wait_for_log(first, "peer filter: 192.168.77.250 sent", 40)
    assert "they are let in, by AcceptAnySource" in log_of(first)
    assert lab.ping(two.pods[0].netns, target, count=5).received == 5


def test_without_a_daemon_the_filter_ends_by_itself(lab: Lab) -> None:
    one, _two = pair(lab, "--peer-filter=enforce")
    assert one.daemon is not None
    one.daemon.popen.kill()
    one.daemon.popen.wait()
    assert not arrives(lab, one)
    text = run("nft", "list", "set", "inet", "flannelpy", "armed4", netns=one.netns)
    assert "timeout 5m" in text
    assert re.search(rf"{one.address} expires 4m\d+s", text)
    # What five minutes do.
    run("nft", "delete", "element", "inet", "flannelpy", "armed4", f"{{ {one.address} }}", netns=one.netns)
    assert arrives(lab, one)


def test_a_damaged_filter_is_made_anew(lab: Lab) -> None:
    one, two = pair(lab, "--peer-filter=enforce")
    assert one.daemon is not None
    for command in (
        "nft delete table inet flannelpy",
        "nft flush chain inet flannelpy input",
        f"nft delete element inet flannelpy peers4 {{ {two.address} }}",
        f"nft delete element inet flannelpy armed4 {{ {one.address} }}",
    ):
        run(*command.split(), netns=one.netns)
        # The next look comes after some seconds; after a new start it is soon.
        stop([one.daemon])
        wait_ready([lab.start_daemon(one, flags=["--peer-filter=enforce"])])
        wait_until(lambda: str(two.address) in elements(one, "peers4"), command)
        wait_until(lambda: str(one.address) in elements(one, "armed4"), command)
        chain = ["nft", "list", "chain", "inet", "flannelpy", "input"]
        wait_until(lambda: "jump" in run(*chain, netns=one.netns), command)  # noqa: B023


def test_a_filter_that_is_deleted_is_noticed(lab: Lab) -> None:
    one, _two = pair(lab)
    assert one.daemon is not None
    run("nft", "delete", "table", "inet", "flannelpy", netns=one.netns)
    wait_until(lambda: exists(one), "the filter", 30)
    assert "peer filter: somebody changed it, it was made anew" in log_of(one.daemon)


def test_off_and_cleanup_leave_nothing(lab: Lab) -> None:
    one, _two = pair(lab)
    assert one.daemon is not None
    stop([one.daemon])
    assert exists(one)
    wait_ready([lab.start_daemon(one, flags=["--peer-filter=off"])])
    assert not exists(one)


def test_host_gw_has_no_filter(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    lab.start_etcd()
    lab.put_config({**V4, "Backend": {"Type": "host-gw"}})
    node = lab.add_node()
    wait_ready([lab.start_daemon(node)])
    assert not exists(node)
