"""The backends without a device of their own, as whole daemons in network namespaces with a real etcd."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from flannelpy.cli.lab import ETCD_PREFIX, UNDERLAY6, Lab, Node
from flannelpy.cli.processes import run, stop, wait_ready, wait_until
from tests.netns.nodes import assert_fails, leases, log_of, put_lease, reach, wait_for_log

pytestmark = [pytest.mark.root, pytest.mark.etcd]

HOSTGW = {
    "Network": "10.5.0.0/16",
    "SubnetMin": "10.5.100.0",
    "SubnetMax": "10.5.190.0",
    "Backend": {"Type": "host-gw"},
}
V6 = {"IPv6Network": "fd00:5::/48", "EnableIPv6": True}
ALLOC = {**HOSTGW, "Backend": {"Type": "alloc"}}
NOT_ON_LINK = "is not on-link on eth0: put the nodes in one L2 network, or use vxlan with DirectRouting"


def peer(address: str, **changes: Any) -> dict[str, Any]:
    return {"PublicIP": address, "PublicIPv6": None, "BackendType": "host-gw", **changes}


def routes(lab: Lab, node: Node) -> dict[str, tuple[str, str, str]]:
    """Every route of the main table over a gateway, but the default ones -> (gateway, device, protocol)."""
    found = lab.ip_json(node.netns, "route show") + lab.ip_json(node.netns, "-6 route show")
    return {
        route["dst"]: (route["gateway"], route["dev"], route.get("protocol", "boot"))
        for route in found
        if route["dst"] != "default" and "gateway" in route
    }


def wanted(lab: Lab, node: Node) -> dict[str, tuple[str, str, str]]:
    """What host-gw must have on a node: the subnets of all others via their addresses."""
    found = {}
    for other in lab.nodes:
        if other is not node:
            key = next(
                key for key, value in leases(lab).items() if _address(value) in map(str, _addresses(other))
            )
            v4, _, v6 = key.partition("&")
            if not v4.startswith("0.0.0.0"):
                found[v4.replace("-", "/")] = (str(other.address), "eth0", "70")
            if v6:
                found[v6.replace("-", "/")] = (str(UNDERLAY6[other.number]), "eth0", "70")
    return found


def _address(value: dict[str, Any]) -> str:
    return str(value["PublicIP"] if value["PublicIP"] != "0.0.0.0" else value["PublicIPv6"])


def _addresses(node: Node) -> tuple[Any, Any]:
    return node.address, UNDERLAY6[node.number]


def start(lab: Lab, config: dict[str, Any], nodes: int) -> list[Node]:
    lab.put_config(config)
    for _number in range(nodes):
        lab.add_node()
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    return lab.nodes


def watch_routes(lab: Lab, node: Node) -> Callable[[], list[str]]:
    """Watch the routes inside the network; the call that this returns tells what changed since."""
    monitor = lab.start("monitor", node.netns, ["ip", "monitor", "route"])

    def has_heard(marker: str) -> bool:
        lab.ip(node.netns, f"route add {marker} dev lo", f"route del {marker}")
        return marker in log_of(monitor)

    wait_until(lambda: has_heard("10.9.1.0/24"), "ip monitor to listen")

    def changes() -> list[str]:
        wait_until(lambda: has_heard("10.9.2.0/24"), "ip monitor to catch up")
        return [line for line in log_of(monitor).splitlines() if "10.5." in line]

    return changes


# --- host-gw ---


@pytest.mark.parametrize(
    "config", [HOSTGW, {**HOSTGW, **V6}, {**HOSTGW, **V6, "EnableIPv4": False}], ids=["v4", "dual", "v6"]
)
def test_pods_reach_each_other_with_full_packets(
    make_lab: Callable[..., Lab], config: dict[str, Any]
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    nodes = start(lab, config, 3)
    for node in nodes:
        wait_until(lambda node=node: routes(lab, node) == wanted(lab, node), f"the routes of {node.name}")  # type: ignore[misc]
        shown = run("ip", "route", "show", "proto", "70", netns=node.netns)
        shown += run("ip", "-6", "route", "show", "proto", "70", netns=node.netns)
        assert len(shown.splitlines()) == len(wanted(lab, node))
        assert "nhid" not in shown
        assert "onlink" not in shown
        assert lab.ip_json(node.netns, "nexthop show") == []
        assert {link["ifname"] for link in lab.ip_json(node.netns, "link show")} <= {"lo", "eth0", "sit0"}
        assert node.subnet_env()["FLANNEL_MTU"] == "1500"
        lab.add_pod(node)
    for source in nodes:
        for target in nodes:
            for address in (target.pods[0].address, target.pods[0].address6):
                if address is not None and source is not target:
                    reach(lab, source, str(address.ip), 1500)
    values = [{**value, "PublicIP": "", "PublicIPv6": ""} for value in leases(lab).values()]
    assert values == [{"PublicIP": "", "PublicIPv6": "", "BackendType": "host-gw"}] * 3


def test_a_peer_that_is_not_on_link_is_named_and_not_programmed(lab: Lab) -> None:
    (node,) = start(lab, HOSTGW, 1)
    assert node.daemon is not None
    put_lease(lab, "10.5.200.0-24", peer("198.51.100.9"))  # over the default route
    put_lease(lab, "10.5.201.0-24", peer("192.168.77.1"))  # ourselves
    put_lease(lab, "10.5.202.0-24", peer("192.168.77.8", BackendType="vxlan"))
    put_lease(lab, "10.5.203.0-24", peer("192.168.77.9"))
    wait_until(lambda: routes(lab, node), "the good peer's route")
    assert routes(lab, node) == {"10.5.203.0/24": ("192.168.77.9", "eth0", "70")}
    wait_for_log(
        node.daemon, f"lease 10.5.200.0-24 is not programmed: its public IP 198.51.100.9 {NOT_ON_LINK}"
    )
    wait_for_log(node.daemon, "lease 10.5.202.0-24 is not programmed: its backend type is 'vxlan'")
    # Now on another link of ours, which is not the uplink; then moved into our network.
    lab.ip(
        node.netns,
        "link add eth1 type veth peer name far1",
        "link set eth1 up",
        "address add 198.51.100.1/24 dev eth1",
    )
    put_lease(lab, "10.5.200.0-24", peer("198.51.100.10"))
    wait_for_log(node.daemon, f"its public IP 198.51.100.10 {NOT_ON_LINK}")
    assert "10.5.200.0/24" not in routes(lab, node)
    put_lease(lab, "10.5.200.0-24", peer("192.168.77.10"))
    wait_until(lambda: "10.5.200.0/24" in routes(lab, node), "the moved peer's route")
    # And away: the route may not stay, for it would lead to where nobody answers.
    put_lease(lab, "10.5.200.0-24", peer("203.0.113.10"))
    wait_until(lambda: "10.5.200.0/24" not in routes(lab, node), "its route to go")
    assert log_of(node.daemon).count("lease 10.5.202.0-24 ") == 1


def test_routes_of_peers_that_left_go_and_foreign_ones_stay(lab: Lab) -> None:
    """Also those of peers that left while the daemon was down; nothing else on the uplink is touched."""
    (node,) = start(lab, HOSTGW, 1)
    assert node.daemon is not None
    foreign = {
        "10.9.0.0/24": ("192.168.77.254", "eth0", "70"),  # our number, but not our network
        "10.5.99.0/24": ("192.168.77.254", "eth0", "static"),
        "10.8.0.0/24": ("192.168.77.254", "eth0", "boot"),
    }
    for destination, (gateway, device, protocol) in foreign.items():
        lab.ip(node.netns, f"route add {destination} via {gateway} dev {device} proto {protocol}")
    for number in (2, 3):
        put_lease(lab, f"10.5.20{number}.0-24", peer(f"192.168.77.{number}"))
    theirs = {f"10.5.20{number}.0/24": (f"192.168.77.{number}", "eth0", "70") for number in (2, 3)}
    wait_until(lambda: routes(lab, node) == {**foreign, **theirs}, "both routes")
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.202.0-24")
    del theirs["10.5.202.0/24"]
    wait_until(lambda: routes(lab, node) == {**foreign, **theirs}, "the first route to go")
    stop([node.daemon])
    assert routes(lab, node) == {**foreign, **theirs}
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.203.0-24")
    wait_ready([lab.start_daemon(node)])
    wait_until(lambda: routes(lab, node) == foreign, "the second route to go")


def test_a_restart_interrupts_nothing(lab: Lab) -> None:
    one, two = start(lab, HOSTGW, 2)
    for node in lab.nodes:
        wait_until(lambda node=node: routes(lab, node) == wanted(lab, node), "the routes")  # type: ignore[misc]
        lab.add_pod(node)
    assert one.daemon is not None
    assert two.pods[0].address is not None
    reach(lab, one, str(two.pods[0].address.ip), 1500)
    flow = lab.start(
        "flow",
        one.pods[0].netns,
        ["ping", "-n", "-i", "0.01", "-c", "250", "-W", "1", str(two.pods[0].address.ip)],
    )
    changes = watch_routes(lab, one)
    for number in (signal.SIGTERM, signal.SIGKILL):
        one.daemon.popen.send_signal(number)
        one.daemon.popen.wait(5)
        wait_ready([lab.start_daemon(one)])
    assert flow.popen.wait(20) == 0
    assert " 0% packet loss" in log_of(flow)
    assert changes() == [], "there was nothing to do"


def test_a_restart_takes_our_own_routes_for_no_overlap(lab: Lab) -> None:
    (node,) = start(lab, HOSTGW, 1)
    put_lease(lab, "10.5.200.0-24", peer("192.168.77.9"))
    wait_until(lambda: routes(lab, node), "the route")
    assert node.daemon is not None
    stop([node.daemon])
    wait_ready([lab.start_daemon(node)])
    put_lease(lab, "10.5.201.0-24", peer("192.168.77.10"))  # the check comes with ready, or just after it
    wait_until(lambda: len(routes(lab, node)) == 2, "the second route")
    assert "overlaps" not in log_of(node.daemon)


def test_a_network_that_changes_its_backend_keeps_no_route_of_the_old_one(lab: Lab) -> None:
    nodes = start(lab, HOSTGW, 2)
    for backend_type in ("vxlan", "host-gw"):
        stop([node.daemon for node in nodes if node.daemon is not None])
        lab.put_config({**HOSTGW, "Backend": {"Type": backend_type}})
        wait_ready([lab.start_daemon(node) for node in nodes])
        device = "flannel.1" if backend_type == "vxlan" else "eth0"
        for node in nodes:
            wait_until(
                lambda node=node, device=device: [  # type: ignore[misc]
                    (way[1], way[2]) for way in routes(lab, node).values()
                ] == [(device, "70")],
                f"the route of {node.name} over {device}",
            )  # fmt: skip
    for node in nodes:
        assert routes(lab, node) == wanted(lab, node)
        assert "nhid" not in run("ip", "route", netns=node.netns)


def test_a_translated_public_ip_is_refused(lab: Lab) -> None:
    lab.put_config(HOSTGW)
    flags = ["--iface=eth0", "--public-ip=198.51.100.1"]
    daemon = lab.start_daemon(lab.add_node(), flags=flags)
    assert_fails(daemon, 3, "--public-ip 198.51.100.1 is not the address 192.168.77.1 of eth0")
    assert leases(lab) == {}


# --- alloc ---


@pytest.mark.parametrize("config", [ALLOC, {**ALLOC, **V6}], ids=["v4", "dual"])
def test_alloc_leases_and_touches_nothing(make_lab: Callable[..., Lab], config: dict[str, Any]) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config)
    node = lab.add_node()

    def kernel() -> str:
        shown = [
            run("ip", *words.split(), netns=node.netns)
            for words in ("-o link", "-o address", "route", "-6 route", "nexthop", "neigh show nud permanent")
        ]
        # A link-local address is tentative for a second.
        return "".join(shown).replace(" tentative", "")

    before = kernel()
    put_lease(lab, "10.5.200.0-24", {"PublicIP": "192.168.77.9", "PublicIPv6": None})
    put_lease(lab, "10.5.201.0-24", peer("192.168.77.10"))
    daemon = lab.start_daemon(node)
    wait_ready([daemon])
    assert kernel() == before
    (key,) = leases(lab).keys() - {"10.5.200.0-24", "10.5.201.0-24"}
    v6 = '"fd77::1"' if config is not ALLOC else "null"
    value = lab.etcdctl("get", "--print-value-only", f"{ETCD_PREFIX}/subnets/{key}")
    assert value == f'{{"PublicIP":"192.168.77.1","PublicIPv6":{v6}}}\n'
    env = node.subnet_env()
    assert env["FLANNEL_MTU"] == "1500"
    assert env["FLANNEL_SUBNET"] == key.partition("&")[0].replace(".0-", ".1/")
    assert ("FLANNEL_IPV6_SUBNET" in env) == (config is not ALLOC)
    assert "WARNING" not in log_of(daemon)


def test_alloc_leaves_an_operators_own_routes_alone(lab: Lab) -> None:
    """Who chooses alloc routes by other means, and `ip route add` looks just as flannel's host-gw does."""
    lab.put_config(ALLOC)
    node = lab.add_node()
    lab.ip(node.netns, "route add 10.5.200.0/24 via 192.168.77.9 dev eth0")
    daemon = lab.start_daemon(node)
    wait_ready([daemon])
    put_lease(lab, "10.5.200.0-24", {"PublicIP": "192.168.77.9", "PublicIPv6": None})
    assert routes(lab, node) == {"10.5.200.0/24": ("192.168.77.9", "eth0", "boot")}


# --- beside a real flannel ---


FLANNELD = os.environ.get("FLANNELD", "")
needs_flannel = pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")


@needs_flannel
@pytest.mark.parametrize("config", [HOSTGW, {**HOSTGW, **V6}], ids=["v4", "dual"])
def test_a_mixed_host_gw_cluster_exchanges_packets(
    make_lab: Callable[..., Lab], config: dict[str, Any]
) -> None:
    lab = make_lab(ipv6=True)
    lab.start_etcd()
    lab.put_config(config)
    ours, theirs, third = lab.add_node(), lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(ours)])
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(third)])
    for node in lab.nodes:
        lab.add_pod(node)
    for source in lab.nodes:
        for target in lab.nodes:
            for address in (target.pods[0].address, target.pods[0].address6):
                if address is not None and source is not target:
                    reach(lab, source, str(address.ip), 1500)
    # A lease that flannel wrote and one of ours differ in nothing but addresses.
    assert len({tuple(value) for value in leases(lab).values()}) == 1


@needs_flannel
def test_routes_are_taken_over_from_flannel_and_given_back(lab: Lab) -> None:
    """The same route under another protocol number: replaced in place, and left alone by flannel."""
    lab.put_config(HOSTGW)
    one, two = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(two)])
    wait_ready([lab.start_daemon(one, [FLANNELD])])
    for node in lab.nodes:
        lab.add_pod(node)
    assert two.pods[0].address is not None
    target = str(two.pods[0].address.ip)
    reach(lab, one, target, 1500)
    assert [way[2] for way in routes(lab, one).values()] == ["boot"]
    put_lease(lab, "10.5.200.0-24", peer("192.168.77.9"))
    wait_until(lambda: len(routes(lab, one)) == 2, "flannel's second route")
    before = leases(lab)
    assert one.daemon is not None
    stop([one.daemon])
    lab.etcdctl("del", f"{ETCD_PREFIX}/subnets/10.5.200.0-24")  # what flannel would never clean up
    del before["10.5.200.0-24"]
    changes = watch_routes(lab, one)
    wait_ready([lab.start_daemon(one)])
    wait_until(lambda: routes(lab, one) == wanted(lab, one), "ours")
    (destination,) = wanted(lab, one)
    assert sorted(line.split(" proto")[0].strip() for line in changes()) == [
        f"{destination} via {two.address} dev eth0",
        "Deleted 10.5.200.0/24 via 192.168.77.9 dev eth0",
    ]
    stop([one.daemon])
    wait_ready([lab.start_daemon(one, [FLANNELD])])
    reach(lab, one, target, 1500)
    assert routes(lab, one) == wanted(lab, one)
    assert leases(lab) == before
