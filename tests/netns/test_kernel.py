"""The same tests on the fake kernel and, in a network namespace, on the real one."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannelpy.kernel import codec, replies
from flannelpy.kernel.fake import FakeKernel
from flannelpy.kernel.linux import LinuxKernel
from flannelpy.model.address import Prefix, parse_mac, parse_prefix, parse_v4, parse_v6
from flannelpy.model.kernel import (
    ROUTE_PROTOCOL,
    DeviceAddress,
    FdbEntry,
    Forward,
    Item,
    Link,
    Neighbour,
    Route,
    Scope,
    Shaken,
    State,
    Tunnel,
    Vxlan,
    default_metric,
)
from flannelpy.model.plan import Put, Refusals, Remove, plan, stages
from flannelpy.outcome import Failure
from flannelpy.reconcile import Kernel

NETWORKS = (parse_prefix("10.5.0.0/16"), parse_prefix("fd00:5::/48"))
SCOPE = Scope(frozenset(["flannel.1", "flannel-v6.1"]), NETWORKS)
CLONE_NEWNET = 0x40000000


def run(*command: str) -> str:
    words = [word for part in command for word in part.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def bare_namespace() -> Iterator[str]:
    """A network namespace as the kernel makes it; this thread is in it."""
    name = f"fpk{os.getpid()}"
    run("ip", "netns", "add", name)
    with Path("/proc/self/ns/net").open("rb") as home, Path(f"/run/netns/{name}").open("rb") as new:
        setns(new.fileno())
        try:
            yield name
        finally:
            setns(home.fileno())
            run("ip", "netns", "delete", name)


@pytest.fixture
def namespace(bare_namespace: str) -> str:
    """The same with an uplink."""
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
    for device in ("lo", "eth0", "far"):
        run("ip", "link", "set", device, "up")
    run("ip", "address", "add", "192.0.2.1/24", "dev", "eth0")
    run("ip", "address", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
    return bare_namespace


def setns(descriptor: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param == "fake":
        yield FakeKernel(foreign=["eth0"], reachable=[parse_v4("192.0.2.2")])
        return
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces and netlink")
    request.getfixturevalue("namespace")
    real = LinuxKernel()
    yield real
    real.close()


def device(name: str = "flannel.1", mac: str = "02:00:00:00:00:01", mtu: int = 1450) -> Link:
    local = parse_v4("192.0.2.1") if name == "flannel.1" else parse_v6("2001:db8::1")
    return Link(name, "vxlan", parse_mac(mac), mtu, True, Vxlan(1, "eth0", local, 8472))


def own() -> list[Item]:
    return [
        device(),
        device("flannel-v6.1", "02:00:00:00:06:01", 1430),
        DeviceAddress("flannel.1", parse_prefix("10.5.1.0/32")),
        DeviceAddress("flannel-v6.1", parse_prefix("fd00:5:0:1::/128")),
    ]


def peer(number: int) -> list[Item]:
    items: list[Item] = []
    for name, subnet, public_ip, mac in (
        ("flannel.1", f"10.5.{number}.0/24", parse_v4(f"192.0.2.{number}"), f"02:00:00:00:00:{number:02x}"),
        (
            "flannel-v6.1",
            f"fd00:5:0:{number:x}::/64",
            parse_v6(f"2001:db8::{number:x}"),
            f"02:00:00:00:06:{number:02x}",
        ),
    ):
        prefix = parse_prefix(subnet)
        items += [
            FdbEntry(name, parse_mac(mac), public_ip),
            Neighbour(name, prefix.address, parse_mac(mac)),
            Route(prefix, name, prefix.address, onlink=True, metric=default_metric(prefix)),
        ]
    return items


def settle(kernel: Kernel, desired: State) -> None:
    """Apply until nothing is left to do, which must be at once."""
    assert [str(f) for f in kernel.apply(plan(desired, kernel.observe(SCOPE)))] == []
    assert [str(op) for op in plan(desired, kernel.observe(SCOPE))] == []


def test_what_is_applied_is_observed(kernel: Kernel) -> None:
    desired = State([*own(), *peer(2), *peer(3)])
    settle(kernel, desired)
    observed = kernel.observe(SCOPE)
    assert set(observed.items()) == set(desired.items())
    devices = kernel.observe(SCOPE, devices_only=True)
    assert set(devices.items()) == set(own())


def test_everything_is_removed_again(kernel: Kernel) -> None:
    settle(kernel, State([*own(), *peer(2)]))
    settle(kernel, State(own()))
    settle(kernel, State())
    assert len(kernel.observe(SCOPE)) == 0


def test_removing_what_is_not_there_is_no_failure(kernel: Kernel) -> None:
    settle(kernel, State(own()))
    assert kernel.apply([Remove(item) for item in peer(2)]) == []


def test_a_failure_names_its_operation_and_the_rest_is_done(kernel: Kernel) -> None:
    settle(kernel, State(own()))
    prefix = parse_prefix("10.5.9.0/24")
    bad = Put(Route(prefix, "flannel.9", prefix.address, onlink=True))
    good = [Put(item) for item in peer(2)]
    (failure,) = kernel.apply([good[0], bad, *good[1:]])
    assert failure.op is bad
    assert "10.5.9.0/24" in str(failure)
    assert {str(item) for item in peer(2)} <= {str(item) for item in kernel.observe(SCOPE).items()}


def test_what_needs_a_refused_object_is_not_put(kernel: Kernel) -> None:
    settle(kernel, State(own()))
    fdb, *others = peer(2)
    bad = fdb._replace(remote=parse_v6("2001:db8::2"))  # type: ignore[call-arg]  # not on an IPv4 device
    refusals, failures = Refusals(), list[Failure]()
    for stage in stages(plan(State([*own(), bad, *others, *peer(3)]), kernel.observe(SCOPE))):
        found = kernel.apply(refusals.allow(stage))
        failures += found
        for failure in found:
            refusals.add(failure.op)
    assert [failure.op.item for failure in failures] == [bad]
    present = kernel.observe(SCOPE)
    assert not any(item.key in present.table(item) for item in [fdb, *others[:2]])
    assert all(item.key in present.table(item) for item in [*others[2:], *peer(3)])


def test_a_changed_peer(kernel: Kernel) -> None:
    settle(kernel, State([*own(), *peer(2)]))
    moved = [
        item._replace(mac=parse_mac("02:00:00:00:00:77")) if isinstance(item, FdbEntry | Neighbour) else item
        for item in peer(2)
    ]
    settle(kernel, State([*own(), *moved]))
    rehomed = [
        item._replace(remote=parse_v4("192.0.2.200"))
        if isinstance(item, FdbEntry) and len(item.remote) == 4
        else item
        for item in moved
    ]
    settle(kernel, State([*own(), *rehomed]))


def test_a_device_with_other_attributes_is_made_anew_with_all_its_peers(kernel: Kernel) -> None:
    settle(kernel, State([*own(), *peer(2)]))
    other = device()
    assert other.vxlan is not None
    settle(kernel, State([*own(), other._replace(vxlan=other.vxlan._replace(gbp=True)), *peer(2)]))


def test_a_new_mac_and_mtu_are_set_in_place_and_neighbours_come_back(kernel: Kernel) -> None:
    settle(kernel, State([*own(), *peer(2)]))
    settle(kernel, State([*own(), device(mac="02:00:00:00:00:aa", mtu=1400), *peer(2)]))


def test_a_route_over_the_uplink(kernel: Kernel) -> None:
    direct = Route(parse_prefix("10.5.2.0/24"), "eth0", parse_v4("192.0.2.2"))
    settle(kernel, State([*own(), direct]))
    tunnelled = [item for item in peer(2) if len(getattr(item, "address", b"1234")) == 4]
    settle(kernel, State([*own(), *tunnelled]))
    settle(kernel, State([*own(), direct]))
    assert kernel.on_link({parse_v4("192.0.2.2")}, "eth0") == frozenset([parse_v4("192.0.2.2")])


# --- what only the real kernel can show --------------------------------------------------------------------


@pytest.fixture
def linux(namespace: str) -> Iterator[LinuxKernel]:
    real = LinuxKernel()
    yield real
    real.close()


@pytest.mark.root
def test_routes_go_through_nexthop_objects_of_ours_and_none_is_left_over(linux: LinuxKernel) -> None:
    settle(linux, State([*own(), *peer(2), *peer(3)]))
    route = run("ip", "route", "show", "10.5.2.0/24")
    assert "nhid" in route
    assert f"proto {ROUTE_PROTOCOL}" in route
    assert len(run("ip", "nexthop").splitlines()) == 4
    settle(linux, State([*own(), *peer(3)]))
    assert len(run("ip", "nexthop").splitlines()) == 2


@pytest.mark.root
def test_a_nexthop_left_by_a_crash_is_used_or_removed(linux: LinuxKernel) -> None:
    settle(linux, State(own()))
    for number, gateway in ((91, "10.5.2.0"), (92, "10.5.8.0")):
        run(
            "ip",
            "nexthop",
            "add",
            "id",
            str(number),
            "via",
            gateway,
            "dev",
            "flannel.1",
            "onlink",
            "proto",
            "70",
        )
    run("ip", "nexthop", "add", "id", "93", "via", "10.5.7.0", "dev", "flannel.1", "onlink")  # not ours
    settle(linux, State([*own(), *peer(2)]))
    ids = {line.split()[1] for line in run("ip", "nexthop").splitlines()}
    assert "91" in ids
    assert "92" not in ids
    assert "93" in ids


@pytest.mark.root
def test_nexthops_and_routes_of_others_are_never_used_replaced_or_removed(linux: LinuxKernel) -> None:
    settle(linux, State([*own(), *peer(2)]))
    (number, *_rest) = sorted(int(line.split()[1]) for line in run("ip nexthop").splitlines())
    for foreign in range(number + 2, number + 6):  # just the numbers that would come next: two are ours
        run(f"ip nexthop add id {foreign} via 192.0.2.200 dev eth0")
    run(f"ip route add 172.20.0.0/16 nhid {number + 2}")
    run("ip route add 10.5.4.0/24 via 192.0.2.4 dev eth0 proto static")
    failures = linux.apply([Put(item) for item in [*peer(3), *peer(4)]])
    assert [
        failure
        for failure in map(str, failures)
        if "10.5.4.0/24" not in failure and "File exists" not in failure
    ] == []
    assert "172.20.0.0/16" in run("ip route")
    assert "10.5.4.0/24 via 192.0.2.4 dev eth0 proto static" in run("ip route")
    assert len(run("ip nexthop show dev eth0").splitlines()) == 4
    settle(linux, State([*own(), *peer(2), *peer(3)]))


@pytest.mark.root
def test_a_table_of_a_device_that_is_gone_is_an_error_not_an_empty_table(linux: LinuxKernel) -> None:
    with pytest.raises(OSError, match="No such device"):
        linux._netlink.rows(codec.route_dump(codec.AF_INET, index=99999), replies.ROUTES)


@pytest.mark.root
@pytest.mark.usefixtures("bare_namespace")
def test_a_namespace_that_never_had_a_route_has_none() -> None:
    """The kernel makes the main table with its first route, and says ENOENT before."""
    kernel = LinuxKernel()
    try:
        assert not any(kernel.observe(SCOPE).items())
        takeover = SCOPE._replace(takeover=NETWORKS, takeover_lengths=(24,))
        assert not any(kernel.observe(takeover).items())
        run("ip link add eth0 type veth peer name far")
        run("ip link set eth0 up")
        run("ip address add 192.0.2.1/32 dev eth0")  # an address of this kind makes no route
        settle(kernel, State([device(), DeviceAddress("flannel.1", parse_prefix("10.5.1.0/32"))]))
    finally:
        kernel.close()


@pytest.mark.root
def test_without_nexthop_objects_plain_routes_do(linux: LinuxKernel) -> None:
    linux._use_nexthops = False
    settle(linux, State([*own(), *peer(2)]))
    assert "nhid" not in run("ip", "route", "show", "10.5.2.0/24")


@pytest.mark.root
def test_what_flannel_left_is_adopted_or_cleared(linux: LinuxKernel) -> None:
    """flannel's own commands, as its netlink calls amount to."""
    made = "ip link add flannel.1 address 02:00:00:00:00:01 mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0"
    run(made, "local", "192.0.2.1", "nolearning", "dstport", "8472")
    run("ip", "address", "add", "10.5.1.0/32", "dev", "flannel.1")
    run("ip", "link", "set", "flannel.1", "up")
    before = run("ip", "-o", "link", "show", "flannel.1").split(":")[0]
    for number in (2, 3):
        base, mac = f"10.5.{number}.0", f"02:00:00:00:00:0{number}"
        run("ip", "neigh", "replace", base, "lladdr", mac, "dev", "flannel.1", "nud", "permanent")
        run(
            "bridge",
            "fdb",
            "replace",
            mac,
            "dev",
            "flannel.1",
            "self",
            "dst",
            f"192.0.2.{number}",
            "permanent",
        )
        run("ip", "route", "replace", f"{base}/24", "via", base, "dev", "flannel.1", "onlink")
    run("ip", "route", "add", "10.5.8.0/24", "via", "192.0.2.8", "dev", "eth0")  # flannel's host-gw or direct
    run(
        "ip", "route", "add", "10.5.9.0/25", "via", "192.0.2.9", "dev", "eth0"
    )  # somebody else's: not a subnet
    run("ip", "route", "add", "10.6.0.0/24", "via", "192.0.2.9", "dev", "eth0")
    scope = SCOPE._replace(takeover=NETWORKS, takeover_lengths=(24, 64))
    desired = State(
        [item for item in [*own(), *peer(2)] if getattr(item, "device", "flannel.1") == "flannel.1"]
    )
    desired.links.pop("flannel-v6.1")
    assert linux.apply(plan(desired, linux.observe(scope))) == []
    assert run("ip", "-o", "link", "show", "flannel.1").split(":")[0] == before
    routes = run("ip", "route")
    assert "10.5.2.0/24 nhid" in routes
    assert "10.5.3.0/24" not in routes
    assert "10.5.8.0/24" not in routes
    assert "10.5.9.0/25" in routes
    assert "10.6.0.0/24" in routes
    assert "192.0.2.3" not in run("bridge", "fdb", "show", "dev", "flannel.1")


@pytest.mark.root
def test_strangers_on_our_device_are_found_and_others_are_not_ours(linux: LinuxKernel) -> None:
    desired = State([*own(), *peer(2)])
    settle(linux, desired)
    run("ip", "route", "add", "203.0.113.0/24", "dev", "flannel.1")
    run("ip", "address", "add", "10.99.0.1/32", "dev", "flannel.1")
    for remote in ("192.0.2.66", "192.0.2.67"):  # a flood entry: the only MAC that may have several
        run("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", "flannel.1", "dst", remote)
    run("bridge", "fdb", "add", "02:00:00:00:00:99", "dev", "flannel.1", "dst", "192.0.2.99")
    run("ip neigh add 10.5.99.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent")
    run("ip route change 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink mtu 1300")
    run("ip", "route", "add", "10.5.50.0/24", "via", "192.0.2.50", "dev", "eth0", "proto", "static")
    ops = plan(desired, linux.observe(SCOPE))
    assert len(ops) == 6, [str(op) for op in ops]
    settle(linux, desired)
    assert "10.5.50.0/24" in run("ip", "route")


def carried(entries: int, *, port: int = 8285, first: int = 2) -> State:
    """What udp needs, with so many peers' subnets."""
    base = parse_v4("10.5.0.0")
    subnets = (Prefix((0x0A050000 + (number + 1 << 4)).to_bytes(4), 28) for number in range(entries))
    return State(
        [
            Link("flannel0", "tun", b"", 1472, True),
            DeviceAddress("flannel0", Prefix(base, 32)),
            Tunnel("flannel0", parse_v4("192.0.2.1"), port, 1472, (base,)),
            *(Forward("flannel0", subnet, parse_v4(f"192.0.2.{first}")) for subnet in subnets),
            Route(NETWORKS[0], "flannel0", None),
        ]
    )


@pytest.mark.parametrize("entries", [3, 4000])
def test_a_forwarder_and_its_entries_are_kept_like_any_table(kernel: Kernel, entries: int) -> None:
    scope = Scope(frozenset(["flannel0"]), NETWORKS)
    for desired in (
        carried(entries),
        carried(entries - 1, first=3),  # another peer, one less
        carried(entries - 1, first=3, port=9000),  # another socket for the same table
        State(),
    ):
        assert kernel.apply(plan(desired, kernel.observe(scope))) == []
        assert kernel.observe(scope) == desired


@pytest.mark.root
def test_a_tunnel_device_is_quiet(linux: LinuxKernel) -> None:
    settle(linux, State(own()))
    assert "fe80" not in run("ip", "-6", "address", "show", "dev", "flannel.1")
    assert "tentative" not in run("ip", "-6", "address", "show", "dev", "flannel-v6.1")
    assert "qlen" not in run("ip", "link", "show", "flannel.1")
    for name in ("flannel.1", "flannel-v6.1"):
        assert Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").exists()


@pytest.mark.root
def test_another_device_with_our_vni_is_named(linux: LinuxKernel) -> None:
    run("ip", "link", "add", "intruder", "type", "vxlan", "id", "1", "dev", "eth0", "dstport", "8472")
    (failure, *_rest) = linux.apply(plan(State([device()]), linux.observe(SCOPE)))
    assert "device intruder holds VNI 1" in str(failure)


@pytest.mark.root
def test_links_and_routes_are_told_as_they_are(linux: LinuxKernel) -> None:
    run("ip", "route", "add", "default", "via", "192.0.2.254")
    eth0 = next(interface for interface in linux.interfaces() if interface.name == "eth0")
    assert Prefix(parse_v4("192.0.2.1"), 24) in [address.prefix for address in eth0.addresses]
    assert [(route.bits, route.ifindex) for route in linux.default_routes()] == [(32, eth0.ifindex)]
    assert linux.route_to(parse_v4("198.51.100.1")) == (eth0.ifindex, parse_v4("192.0.2.1"))
    assert linux.route_to(parse_v6("2001:db9::1")) is None
    assert ("eth0", parse_prefix("192.0.2.0/24")) in linux.routed()
    assert sys.platform == "linux"


@pytest.mark.root
@pytest.mark.parametrize("question", ["interfaces", "links", "routed"])
def test_a_question_takes_no_notice_away(linux: LinuxKernel, question: str) -> None:
    """The daemon asks for the links when it is ready or writes its lease: what comes is still news."""
    settle(linux, State([*own()]))
    linux.subscribe()
    linux.observe(SCOPE)
    monitor = linux._monitor
    assert monitor is not None
    monitor._read()
    run("ip", "link", "del", "flannel.1")
    {
        "interfaces": linux.interfaces,
        "links": lambda: linux.links(["flannel.1"]),
        "routed": linux.routed,
    }[question]()
    assert Shaken("device flannel.1 was deleted") in monitor._read()


def test_lost_notifications_are_said(linux: LinuxKernel) -> None:
    linux.subscribe()
    settle(linux, State(own()))
    monitor = linux._monitor
    assert monitor is not None
    monitor._read()
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel gives its minimum
    words = "lladdr 02:00:00:00:be:ef dev flannel.1 nud permanent"
    lines = [f"neigh add 10.5.99.{n} {words}" for n in range(100)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)
    notices = monitor._read()
    assert Shaken("notifications were lost") in notices
    assert len(notices) < 100
