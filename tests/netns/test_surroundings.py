"""A node in bad surroundings: each gets one clear line, and nothing that works is lost."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, Lab
from flannelpy.cli.processes import run, wait_ready, wait_until
from tests.netns.nodes import (
    PROGRAM,
    V4,
    assert_fails,
    exit_code,
    log_of,
    wait_for_log,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


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
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":0}}', "Backend.Port is 0"),
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
