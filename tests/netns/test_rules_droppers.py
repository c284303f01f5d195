"""Who drops what our forward rules accept: accepts go where they help; where none helps, that is said."""

import subprocess
from collections.abc import Callable

import pytest

from flannelpy import control
from flannelpy.cli.lab import Lab
from flannelpy.cli.processes import inside, run, wait_ready, wait_until
from tests.netns.nodes import log_of, wait_for_log
from tests.netns.rules_lab import children_ended, config, listing, lone, start

pytestmark = [pytest.mark.root, pytest.mark.etcd]


def test_accepts_follow_docker(make_lab: Callable[..., Lab]) -> None:
    """In nftables mode: into DOCKER-USER once Docker is there, out again when nothing drops any more."""
    lab = make_lab(ipv6=True)
    node = lone(lab, "nftables")

    def rules() -> list[str]:
        lines = run("iptables-nft", "-S", netns=node.netns).splitlines()
        return [line.split(" -m ")[0] for line in lines if "flanneld forward" in line]

    run("iptables-nft", "-P", "FORWARD", "DROP", netns=node.netns)
    wait_until(lambda: rules() == ["-A FORWARD -s 10.5.0.0/16", "-A FORWARD -d 10.5.0.0/16"], "accepts", 1)
    run("sh", "-c", "iptables-nft -N DOCKER-USER; iptables-nft -A DOCKER-USER -j RETURN;"
        " iptables-nft -I FORWARD -j DOCKER-USER", netns=node.netns)  # fmt: skip
    there = ["-A DOCKER-USER -s 10.5.0.0/16", "-A DOCKER-USER -d 10.5.0.0/16"]
    wait_until(lambda: rules() == there, "accepts in DOCKER-USER", 1)
    run("iptables-nft", "-F", "DOCKER-USER", netns=node.netns)
    wait_until(lambda: rules() == there, "accepts after a flush", 1)
    run("iptables-nft", "-P", "FORWARD", "ACCEPT", netns=node.netns)
    wait_until(lambda: rules() == [], "no accepts", 1)


def test_a_forward_chain_that_takes_no_accept_is_named(make_lab: Callable[..., Lab]) -> None:
    """It belongs to one program alone: nobody else may change it. Our own table stands all the same."""
    lab = make_lab(ipv6=True)
    node = lone(lab, "nftables")
    assert node.daemon is not None
    log = node.daemon.log
    whole = listing(node, "nftables")
    owner = subprocess.Popen(inside(node.netns, "nft", "-i"), stdin=subprocess.PIPE, text=True)
    assert owner.stdin is not None
    owner.stdin.write("add table ip filter { flags owner; }\n")
    owner.stdin.write("add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }\n")
    owner.stdin.flush()
    try:
        named = "dropped by the policy of chain ip filter FORWARD, which no rule of ours overrides"
        wait_until(lambda: named in log.read_text(), "the warning", 5)
        found = control.ask(control.path_for(str(node.subnet_file)), "status")
        assert found["state"] == "not ready"
        assert named in found["faults"][0]
        run("nft", "delete table ip flannel-ipv4", netns=node.netns)
        wait_until(lambda: listing(node, "nftables") == whole, "our own table", 5)
    finally:
        owner.communicate(timeout=5)
    wait_until(lambda: "the rules are well again" in log.read_text(), "the end of it", 7)


def test_another_table_that_drops_is_named(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ipv6=True)
    node = lone(lab, "nftables")
    assert node.daemon is not None
    log = node.daemon.log
    run("nft", "add table inet strict;"
        " add chain inet strict f { type filter hook forward priority 0; policy drop; }",
        netns=node.netns)  # fmt: skip
    wait_until(lambda: "dropped by the policy of chain inet strict f" in log.read_text(), "the warning", 2)
    found = control.ask(control.path_for(str(node.subnet_file)), "status")
    assert found["state"] == "not ready"  # as /readyz says
    assert "dropped by the policy of chain inet strict f" in found["faults"][0]
    run("nft", "delete table inet strict", netns=node.netns)
    wait_until(lambda: "the rules are well again" in log.read_text(), "the end of it", 7)
    assert control.ask(control.path_for(str(node.subnet_file)), "status")["state"] == "ready"


@pytest.mark.parametrize("mode", ["nftables", "iptables-nft"])
def test_a_legacy_policy_that_drops_is_named_by_the_first_look_and_when_it_is_set_later(
    make_lab: Callable[..., Lab], mode: str
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config(mode))
    node = lab.add_node()
    run("iptables-legacy", "-P", "FORWARD", "DROP", netns=node.netns)
    daemon = start(lab, node, mode)
    wait_ready([daemon])
    found = control.ask(control.path_for(str(node.subnet_file)), "status")
    assert found["state"] == "not ready"
    assert "dropped by the FORWARD policy of legacy iptables" in found["faults"][0]
    run("iptables-legacy", "-P", "FORWARD", "ACCEPT", netns=node.netns)
    wait_for_log(daemon, "the rules are well again", 7)
    # The tables are loaded already, and nobody announces a policy: the next look sees it.
    ended = children_ended(daemon)
    run("iptables-legacy", "-P", "FORWARD", "DROP", netns=node.netns)
    damage = "nft delete table ip flannel-ipv4" if mode == "nftables" else "iptables-nft -t nat -F"
    run(*damage.split(), netns=node.netns)
    named = "dropped by the FORWARD policy of legacy iptables"
    wait_until(lambda: log_of(daemon).count(named) == 2, "it is named", 5)
    if mode == "nftables":
        assert children_ended(daemon) == ended, "to look takes no program"
