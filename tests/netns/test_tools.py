"""trace, capture, bench, report: what they show of real daemons and packets."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import inside, run, wait_ready, wait_until
from tests.certificates import Authority
from tests.netns.nodes import PROGRAM, V4, cluster, log_of, reach

pytestmark = [pytest.mark.root, pytest.mark.etcd]

DUAL = {**V4, "IPv6Network": "fd00:5::/48", "EnableIPv6": True}
UDP = {**V4, "Backend": {"Type": "udp", "FastPath": "off"}}
HOSTGW = {**V4, "Backend": {"Type": "host-gw"}}


def tool(node: Node, *words: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command beside the node's daemon."""
    whole = inside(node.netns, *PROGRAM, *words, f"--subnet-file={node.subnet_file}")
    done = subprocess.run(whole, capture_output=True, text=True, timeout=90, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def pod(node: Node, family: int = 4) -> str:
    address = node.pods[0].address if family == 4 else node.pods[0].address6
    assert address is not None
    return str(address.ip)


@pytest.mark.parametrize("config", [DUAL, UDP, HOSTGW], ids=["vxlan", "udp", "host-gw"])
def test_a_packet_is_followed_and_captured(make_lab: Callable[..., Lab], config: dict[str, Any]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    one, two = cluster(lab, config)
    device = {"vxlan": "flannel.1", "udp": "flannel0"}.get(config["Backend"]["Type"])
    for family in (4, 6) if config is DUAL else (4,):
        reach(lab, one, pod(two, family))
        code, text, _errors = tool(one, "trace", pod(two, family), "--output=json")
        found = json.loads(text)
        assert code == 0, found
        assert not [step for step in found["steps"] if step["wrong"]]
        seen = [(each["device"], each["outgoing"]) for each in found["probe"]["packets"]]
        tunnel = device if family == 4 else "flannel-v6.1"
        ends = [tunnel, "eth0"] if tunnel else ["eth0"]
        assert seen == [(end, True) for end in ends] + [(end, False) for end in reversed(ends)]
        on_wire = "\n".join(found["probe"]["packets"][len(ends) - 1]["layers"])
        assert f"dst={pod(two, family)}" in on_wire
        assert ("VXLAN: vni=1" in on_wire) == (config is DUAL)
        assert "X" not in [line[:1] for line in tool(one, "trace", pod(two, family))[1].splitlines()]

    file = lab.folder / "seen.pcap"
    lab.start("flow", one.pods[0].netns, ["ping", "-n", "-i", "0.05", pod(two)])
    words = ("--count=4", "--seconds=20", f"--pod={pod(two)}", f"--peer={two.address}")
    code, text, _errors = tool(one, "capture", *words, f"--write={file}")
    assert code == 0
    assert len(re.findall(rf"ICMP \S+ > {pod(two)} echo-request", text)) == 2
    assert len(re.findall(rf"ICMP {pod(two)} > \S+ echo-reply", text)) == 2
    read = run("tcpdump", "-nn", "-r", str(file))
    assert read.count("ICMP echo") == 4 if config is not UDP else read.count("UDP") == 4
    assert ("instance 1" in read) == (config is DUAL)  # tcpdump takes port 8472 for OTV: the same format
    assert tool(one, "capture", "--count=1", "--seconds=1", "--pod=10.5.99.99")[1] == ""


def test_a_trace_names_the_step_that_is_wrong(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    reach(lab, one, pod(two))
    assert one.daemon is not None
    one.daemon.popen.send_signal(19)
    try:
        mac = lab.ip_json(two.netns, "link show flannel.1")[0]["address"]
        bridge = f"bridge fdb replace {mac} dev flannel.1 dst 192.168.77.99 self permanent"
        run(*bridge.split(), netns=one.netns)
        code, text, _errors = tool(one, "trace", pod(two), "--output=json")
        found = json.loads(text)
        assert code == 11
        assert [step["name"] for step in found["steps"] if step["wrong"]] == ["FDB"]
        assert found["probe"]["seconds"] is None
        assert all(each["outgoing"] for each in found["probe"]["packets"])
        code, text, _errors = tool(one, "trace", "10.5.7.7", "--no-probe")
        assert code == 11
        assert "no lease has it" in text
    finally:
        one.daemon.popen.send_signal(18)


def test_bench_measures_both_ways_and_serves_nobody_else(lab: Lab) -> None:
    one, two = cluster(lab, V4)
    code, _text, errors = tool(one, "bench", str(two.address), "--seconds=1", "--rounds=1")
    assert code == 1
    assert "--serve" in errors
    words = ("bench", "--serve", "--seconds=60", f"--subnet-file={two.subnet_file}")
    server = lab.start("serve", two.netns, [*PROGRAM, *words])
    wait_until(lambda: "serving" in log_of(server), "the serving side")
    code, text, errors = tool(one, "bench", pod(two), "--seconds=1", "--rounds=1", "--output=json")
    assert code == 0, errors
    found = json.loads(text)
    for way in ("underlay", "overlay"):
        assert found[way]["gigabits"] > 0.01
        assert 0 < found[way]["trip"] < 1
    assert found["ratio"]["gigabits"] == pytest.approx(
        found["overlay"]["gigabits"] / found["underlay"]["gigabits"]
    )
    # The underlay's gateway is no node: it is let in by nobody.
    ask = (
        "import socket,sys; s=socket.create_connection((sys.argv[1],7979),5); s.settimeout(5);"
        " s.sendall(b'E.'); print(s.recv(1))"
    )
    done = subprocess.run(
        inside(lab.underlay, sys.executable, "-c", ask, str(two.address)),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout.strip() in ("b''", "")


def test_a_report_has_what_is_asked_for_and_no_secret(lab: Lab) -> None:
    lab.put_config(V4)
    node = lab.add_node()
    password, key = "hunter2-of-etcd", "MHcCAQEEIplantedKeyMaterial0123456789"
    log = lab.folder / "extra.log"
    log.write_text(
        f"https://root:{password}@x\nAuthorization: Bearer abcdefgh.planted\n"
        f"-----BEGIN EC PRIVATE KEY-----\n{key}\n-----END EC PRIVATE KEY-----\nlast line\n"
    )
    command = ("env", f"FLANNELD_ETCD_PASSWORD={password}", "FLANNELD_ETCD_USERNAME=root", *PROGRAM)
    wait_ready([lab.start_daemon(node, command)])
    wait_until(lambda: list((node.folder / "state").glob("*.json")), "the saved state")
    # A planted record and a rule's comment, too: text of others that comes in.
    lab.etcdctl("put", "/coreos.com/network/subnets/10.5.150.0-24", f'{{"Password":"{password}"}}')
    run("nft", f'add table ip mine {{ comment "token={password}" ; }}', netns=node.netns)
    archive = lab.folder / "report.tar.gz"
    code, text, errors = tool(node, "report", f"--file={archive}", f"--log={log}")
    assert code == 0, errors
    assert str(archive) in text
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as packed:
        parts = {
            member.name.partition("/")[2]: packed.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in packed.getmembers()
        }
    wanted = {
        "about.json",
        "settings.txt",
        "doctor.txt",
        "doctor.json",
        "status.json",
        "etcd.txt",
        "subnet.env",
    }
    assert wanted <= parts.keys()
    assert "logs/extra.log" in parts
    assert any(name.startswith("state/") for name in parts)
    assert sum(name.startswith("commands/") for name in parts) > 10
    assert "flannel.1" in parts["commands/ip_-d_-s_link.txt"]
    assert "last line" in parts["logs/extra.log"]
    for name, content in parts.items():
        for planted in (password, key, "abcdefgh.planted"):
            assert planted not in content, name
    # It replaces nothing.
    code, _text, errors = tool(node, "report", f"--file={archive}")
    assert code == 1
    assert "File exists" in errors


def test_secrets_in_files_are_taken_out_wherever_they_turn_up(lab: Lab) -> None:
    """Of the password's and the key's file, in prose that no pattern would notice; no daemon, no etcd."""
    node = lab.add_node()
    client = Authority(lab.folder, "ca").issue("client")
    phrase = "correct horse battery"
    (lab.folder / "password").write_text(f"{phrase}\n")
    key_lines = [line for line in Path(client.key).read_text().splitlines() if "-----" not in line]
    log = lab.folder / "extra.log"
    log.write_text(f"they said {phrase} to me\nthen {key_lines[0]} and\n{key_lines[-1]}\nlast line\n")
    archive = lab.folder / "report.tar.gz"
    code, _text, errors = tool(
        node,
        "report",
        f"--file={archive}",
        f"--log={log}",
        "--etcd-endpoints=https://127.0.0.1:9",
        "--etcd-username=root",
        f"--etcd-password-file={lab.folder / 'password'}",
        f"--etcd-certfile={client.certificate}",
        f"--etcd-keyfile={client.key}",
    )
    assert code == 0, errors
    with tarfile.open(archive) as packed:
        texts = [packed.extractfile(member).read().decode() for member in packed.getmembers()]  # type: ignore[union-attr]
    assert any("last line" in text for text in texts)
    for planted in (phrase, *key_lines):
        assert not any(planted in text for text in texts), planted
