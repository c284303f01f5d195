"""Masquerade and forward rules, in every way to keep them: damaged, proven with packets, taken over.

Set FLANNELPY_TABLE=1 to see the table of times.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable

import pytest

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import LabError, run, stop, wait_ready, wait_until
from tests.netns.nodes import reach
from tests.netns.rules_lab import (
    ALL,
    HIDDEN,
    MODES,
    children_ended,
    cluster,
    config,
    cpu_seconds,
    listener,
    listing,
    lone,
    send,
    source_of,
    start,
    started,
    tool,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(300)]

every_mode = pytest.mark.parametrize("mode", MODES)
OUTSIDE = "192.168.77.254"
"""An address of the underlay: the world, as pods see it."""
FLANNELD = os.environ.get("FLANNELD", "")


# --- damage ---

IPTABLES = {
    "all of FORWARD flushed": "{t} -F FORWARD",
    "all of nat flushed": "{t} -t nat -F",
    "our chain flushed": "{t} -F FLANNEL-FWD",
    "jump deleted": '{t} -D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    "masquerade jump deleted": "{t} -t nat -D POSTROUTING 1",
    "jump doubled": '{t} -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    "odd jump": "{t} -t nat -I POSTROUTING -p udp -j FLANNEL-POSTRTG",
    # The repair may be there before the third of these.
    "chain deleted": "{t} -F FORWARD; {t} -F FLANNEL-FWD; {t} -X FLANNEL-FWD || true",
    "foreign rule in our chain": "{t} -t nat -I FLANNEL-POSTRTG 1 -p tcp -j ACCEPT",
    "rules of our chain changed places": (
        '{t} -D FLANNEL-FWD 1; {t} -A FLANNEL-FWD -s {net} -m comment --comment "flanneld forward" -j ACCEPT'
    ),
    "a rule that nothing passes before our jump": "{t} -I FORWARD 1 -j REJECT",
    "a rule of an old flannel": (
        '{t} -t nat -A POSTROUTING -s {net} -m comment --comment "flanneld masq" -j RETURN'
    ),
    **{f"masquerade rule {n} deleted": f"{{t}} -t nat -D FLANNEL-POSTRTG {n}" for n in range(1, 7)},
    **{f"forward rule {n} deleted": f"{{t}} -D FLANNEL-FWD {n}" for n in (1, 2)},
}  # fmt: skip
NFT = {
    "everything flushed": "nft flush ruleset",
    "table deleted": "nft delete table {f} flannel-{v}",
    "table flushed": "nft flush table {f} flannel-{v}",
    "forward chain flushed": "nft flush chain {f} flannel-{v} forward",
    "masquerade chain flushed": "nft flush chain {f} flannel-{v} postrtg",
    "chain deleted": "nft flush chain {f} flannel-{v} forward; nft delete chain {f} flannel-{v} forward",
    "policy changed": "nft chain {f} flannel-{v} forward '{{ policy drop; }}'",
    "foreign rule in our chain": "nft insert rule {f} flannel-{v} postrtg meta l4proto tcp accept",
    "foreign chain in our table": (
        "nft add chain {f} flannel-{v} mine '{{ type filter hook forward priority 5; policy drop; }}'"
    ),
    "rule replaced": "nft replace rule {f} flannel-{v} postrtg handle {handle} {f} saddr {net} return",
}


def damages(node: Node, mode: str) -> dict[str, str]:
    """What is done to this node, by name: everything for IPv4, and the first ones for IPv6."""
    if mode != "nftables":
        found = {
            name: command.format(t=tool(mode, 32), net="10.5.0.0/16") for name, command in IPTABLES.items()
        }
        if mode == "iptables-nft":
            found["everything flushed"] = "nft flush ruleset"
        return found | {
            f"IPv6: {name}": IPTABLES[name].format(t=tool(mode, 128)) for name in list(IPTABLES)[:4]
        }
    v4 = {"f": "ip", "v": "ipv4", "net": "10.5.0.0/16"}
    v6 = {"f": "ip6", "v": "ipv6", "net": "fd00:5::/48"}
    found = {
        name: command.format(**v4, handle="{handles[2]}")
        for name, command in NFT.items()
    }  # fmt: skip
    found |= {f"IPv6: {name}": NFT[name].format(**v6) for name in list(NFT)[1:5]}
    delete = "nft delete rule ip flannel-ipv4"
    for chain, first, count in (("forward", 0, 2), ("postrtg", 2, 6)):
        for n in range(count):
            found[f"rule {n + 1} of {chain} deleted"] = f"{delete} {chain} handle {{handles[{first + n}]}}"
    return found


def handles(node: Node) -> list[int]:
    """Of the IPv4 rules, in order; a repair gives them new ones."""
    found = json.loads(run("nft", "-j", "-a", "list", "table", "ip", "flannel-ipv4", netns=node.netns))
    return [item["rule"]["handle"] for item in found["nftables"] if "rule" in item]


def healed(node: Node, mode: str, whole: str, command: str) -> tuple[float, int]:
    """Do the damage and wait for its end; milliseconds as seen from here, and as told."""
    assert node.daemon is not None
    log = node.daemon.log
    if "{handles" in command:
        command = command.format(handles=handles(node))
    before = log.stat().st_size
    began = time.monotonic()
    run("sh", "-c", command, netns=node.netns)
    wait_until(lambda: b"repaired in" in log.read_bytes()[before:], f"a repair after: {command}", 5)
    seen = time.monotonic() - began
    wait_until(lambda: listing(node, mode) == whole, f"rules as before after: {command}", 5)
    text = log.read_bytes()[before:].decode()
    told = [int(number) for number in re.findall(r"repaired in (\d+) ms", text)]
    if mode != "iptables-legacy":
        assert re.search(r"\((\w+ (in )?ip6? .* was (removed|changed) by (nft|ip6?tables)|resync)", text), (
            text
        )
    return seen * 1000, max(told)


@every_mode
def test_every_damage_is_repaired(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = make_lab(ipv6=True)
    node = lone(lab, mode)
    assert node.daemon is not None
    # The period is 1 s; half of it more for a machine that is loaded with other tests.
    limit = 1.5 if mode == "iptables-legacy" else 1.0
    whole = listing(node, mode)
    assert len(whole.splitlines()) >= 20
    table = []
    for name, command in damages(node, mode).items():
        table.append((name, *healed(node, mode, whole, command)))
    lines = [f"{name:44} {seen:6.0f} {told:6.0f}" for name, seen, told in table]
    report = f"{mode}\n{'damage':44} {'seen':>6} {'told':>6}  (ms)\n" + "\n".join(lines)
    if os.environ.get("FLANNELPY_TABLE"):
        sys.stderr.write(f"\n{report}\n")
    assert [row for row in table if row[1] > limit * 1000] == [], report


# --- packets ---


@every_mode
def test_what_is_masqueraded_and_what_is_not(make_lab: Callable[..., Lab], mode: str) -> None:
    lab: Lab = make_lab(ipv6=True)
    one, two = cluster(lab, mode, 2)
    pod1, pod2 = one.pods[0], two.pods[0]
    address1, address2 = (str(pod.address).partition("/")[0] for pod in (pod1, pod2))
    address6 = str(pod1.address6).partition("/")[0]
    wait_until(lambda: lab.ping(pod1.netns, address2, count=1).received, "the overlay")
    # Pods to pods: as they are. Pods to the world: masqueraded, both families.
    assert source_of(lab, pod1.netns, pod2.netns, address2) == address1
    assert source_of(lab, pod1.netns, lab.underlay, OUTSIDE) == "192.168.77.1"
    assert source_of(lab, pod1.netns, lab.underlay, "fd77::fe") == "fd77::1"
    pod6 = str(pod2.address6).partition("/")[0]
    wait_until(lambda: lab.ping(pod1.netns, pod6, count=1).received, "the overlay with IPv6")
    assert source_of(lab, pod1.netns, pod2.netns, pod6) == address6
    # The world to our pods: as it is.
    lab.ip(
        lab.underlay,
        f"route add {one.subnet_env()['FLANNEL_SUBNET'].replace('.1/', '.0/')} via {one.address}",
    )
    assert source_of(lab, lab.underlay, pod1.netns, address1) == OUTSIDE
    # A host to another node's pods: masqueraded, or the answer would not come back this way.
    gateway2 = two.subnet_env()["FLANNEL_SUBNET"].partition("/")[0]
    vtep = re.sub(r"\.1$", ".0", gateway2)
    assert source_of(lab, two.netns, pod1.netns, address1, source=str(two.address)) == vtep
    # ... unless kube-proxy's bit says that it is done, whatever other bits there are.
    for mark, expected in ((0x4000, str(two.address)), (0xC000, str(two.address)), (0x8000, vtep)):
        how = {"source": str(two.address), "mark": mark}
        assert source_of(lab, two.netns, pod1.netns, address1, **how) == expected, hex(mark)
    # Multicast from inside the network is not masqueraded.
    seen = source_of(lab, two.netns, lab.underlay, "224.0.0.77", interface=OUTSIDE, source=gateway2)
    assert seen == gateway2


@every_mode
def test_without_the_flag_nothing_is_masqueraded(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = make_lab(ipv6=True)
    (one,) = cluster(lab, mode, 1, "--iptables-forward-rules", "--iptables-resync=1")
    address = str(one.pods[0].address).partition("/")[0]
    assert source_of(lab, one.pods[0].netns, lab.underlay, OUTSIDE) == address
    # The flag of the next start takes effect, and so does its absence.
    for flags, expected in ((ALL, str(one.address)), (("--iptables-resync=1",), address)):
        assert one.daemon is not None
        stop([one.daemon])
        wait_ready([start(lab, one, mode, *flags)])
        assert source_of(lab, one.pods[0].netns, lab.underlay, OUTSIDE) == expected
    assert listing(one, mode) == ""


@every_mode
def test_forwarded_packets_pass_a_policy_that_drops(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = make_lab(ipv6=True)
    one, two = cluster(lab, mode, 2, "--iptables-forward-rules=false")
    pod, target = one.pods[0], str(two.pods[0].address).partition("/")[0]
    target6 = str(two.pods[0].address6).partition("/")[0]
    kind = "iptables-nft" if mode == "nftables" else mode
    for bits in (32, 128):
        run(tool(kind, bits), "-P", "FORWARD", "DROP", netns=one.netns)
    assert not lab.ping(pod.netns, target, count=2, timeout=0.3).received
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([start(lab, one, mode)])
    for address in (target, target6):
        reach(lab, one, address)


# --- without the programs, and among many rules ---


def test_a_missing_program_matters_only_where_it_is_needed(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    lab.start_etcd()
    lab.put_config({**config("nftables"), "EnableIPv6": False})
    node = lab.add_node()
    command = (sys.executable, "-c", HIDDEN)
    wait_ready([lab.start_daemon(node, command, flags=ALL)])
    assert node.daemon is not None
    stop([node.daemon])
    lab.put_config({**config("iptables-nft"), "EnableIPv6": False})
    daemon = lab.start_daemon(node, command, flags=ALL)
    assert daemon.popen.wait(10) == 4
    last = daemon.log.read_text().splitlines()[-1]
    assert "iptables is not installed" in last
    assert '"EnableNFTables":true' in last
    # Forward rules that nobody asked for by name are no reason to stay without a network.
    by_default = "sys.argv.remove('--iptables-forward-rules=false')\nsys.exit"
    code = HIDDEN.replace("sys.exit", by_default)
    wait_ready([lab.start_daemon(node, (sys.executable, "-c", code))])
    assert "no forward rules: iptables is not installed" in node.daemon.log.read_text()


def foreign(node: Node, kind: str, count: int) -> None:
    """Somebody else's rules in the very chains that ours hang in."""
    lines = [f"-A FORWARD -s 172.16.{n >> 8}.{n & 255}/32 -j ACCEPT" for n in range(count)]
    text = "*filter\n:FORWARD ACCEPT [0:0]\n" + "\n".join(lines) + "\nCOMMIT\n"
    run(f"{kind}-restore", "--noflush", netns=node.netns, stdin=text, timeout=60)


@every_mode
def test_idle_among_20000_foreign_rules(make_lab: Callable[..., Lab], mode: str) -> None:
    """No process with nf_tables, one for each family and period with legacy iptables; and still repaired."""
    lab = make_lab(ipv6=True)
    node = lone(lab, mode)
    daemon = node.daemon
    assert daemon is not None
    kind = "iptables-legacy" if mode == "iptables-legacy" else "iptables-nft"
    foreign(node, kind, 20_000)
    whole = listing(node, mode)
    time.sleep(3)  # what the foreign rules caused is over
    programs_before, ended, cpu = len(started(lab.folder, mode)), children_ended(daemon), cpu_seconds(daemon)
    seconds = 10
    time.sleep(seconds)
    count = len(started(lab.folder, mode)) - programs_before
    spent = cpu_seconds(daemon) - cpu
    if mode == "iptables-legacy":
        assert 2 <= count <= 2 * (seconds / 0.9 + 1)  # one for each family and look
    else:
        assert count == 0
        assert children_ended(daemon) == ended
    # Somebody rewrites rules of his own all the time.
    cpu, began, changes = cpu_seconds(daemon), time.monotonic(), 0
    rewrite = f"{kind} -t nat -A PREROUTING -p tcp -j ACCEPT; {kind} -t nat -F PREROUTING"
    while time.monotonic() < began + 5:
        run("sh", "-c", rewrite, netns=node.netns)
        changes += 2
    if mode != "iptables-legacy":
        assert len(started(lab.folder, mode)) == programs_before
    storm = cpu_seconds(daemon) - cpu
    before = daemon.log.stat().st_size
    damage = "nft delete table ip flannel-ipv4" if mode == "nftables" else f"{kind} -t nat -F"
    run(*damage.split(), netns=node.netns)
    began = time.monotonic()
    wait_until(lambda: b"repaired in" in daemon.log.read_bytes()[before:], "the repair", 15)
    seen = (time.monotonic() - began) * 1000
    wait_until(lambda: listing(node, mode) == whole, "rules as before")
    if os.environ.get("FLANNELPY_TABLE"):
        sys.stderr.write(
            f"\n{mode}, 20,000 foreign rules: idle {seconds} s {count} processes, {spent:.2f} s CPU; "
            f"{changes} foreign changes in 5 s {storm:.2f} s CPU; repaired after {seen:.0f} ms\n"
        )
    assert spent < (5 if mode == "iptables-legacy" else 0.5)


def test_the_tests_can_fail(make_lab: Callable[..., Lab]) -> None:
    """Without a daemon nothing is masqueraded, and nothing is heard where nothing was sent."""
    lab = make_lab()
    node = lab.add_node()
    lab.ip(node.netns, "address add 10.5.9.1/32 dev lo")
    assert source_of(lab, node.netns, lab.underlay, OUTSIDE, source="10.5.9.1") == "10.5.9.1"
    with listener(lab, lab.underlay, OUTSIDE) as (heard, port):
        send(node.netns, OUTSIDE, port + 1, "word")
        with pytest.raises(LabError):
            wait_until(heard.heard, "a packet", 0.3)
