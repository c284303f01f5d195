"""A plan converges from any state, and a route that is present can deliver after every single step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flannelpy.kernel.fake import FakeKernel
from flannelpy.model.address import Prefix, parse_v4
from flannelpy.model.kernel import (
    PROTOCOL_BOOT,
    DeviceAddress,
    FdbEntry,
    Item,
    Link,
    Neighbour,
    Route,
    State,
    Vxlan,
)
from flannelpy.model.plan import Op, Refusals, plan, plan_part, stages

DEVICE = "flannel.1"
MACS = [bytes([2, 0, 0, 0, 0, n]) for n in range(6)]
PUBLIC_IPS = [parse_v4(f"192.0.2.{n}") for n in range(1, 6)]
SUBNETS = [Prefix(parse_v4(f"10.5.{n}.0"), 24) for n in range(1, 7)]


def link(mac: bytes = MACS[0], *, vni: int = 1, up: bool = True, mtu: int = 1450) -> Link:
    return Link(DEVICE, "vxlan", mac, mtu, up, Vxlan(vni, "eth0", PUBLIC_IPS[0], 8472))


def tunnelled(subnet: Prefix, mac: bytes, public_ip: bytes) -> list[Item]:
    return [
        FdbEntry(DEVICE, mac, public_ip),
        Neighbour(DEVICE, subnet.address, mac),
        Route(subnet, DEVICE, subnet.address, onlink=True),
    ]


def direct(subnet: Prefix, public_ip: bytes) -> list[Item]:
    return [Route(subnet, "eth0", public_ip)]


@st.composite
def overlays(draw: st.DrawFn) -> State:
    """A consistent desired state: some peers, each with its own MAC, tunnelled or direct."""
    state = State([link(draw(st.sampled_from(MACS[:2])), vni=draw(st.sampled_from([1, 1, 1, 2])))])
    state.add([DeviceAddress(DEVICE, Prefix(parse_v4("10.5.0.0"), 32))])
    subnets = draw(st.lists(st.sampled_from(SUBNETS), unique=True))
    macs = draw(st.permutations(MACS))
    for subnet, mac in zip(subnets, macs, strict=False):
        public_ip = draw(st.sampled_from(PUBLIC_IPS))
        state.add(direct(subnet, public_ip) if draw(st.booleans()) else tunnelled(subnet, mac, public_ip))
    return state


@st.composite
def damaged(draw: st.DrawFn) -> State:
    """Any state that a kernel may be found in: parts missing, parts wrong, strangers."""
    state = State()
    if draw(st.booleans()):
        found = link(draw(st.sampled_from(MACS[:3])), vni=draw(st.sampled_from([1, 2])))
        state.add([found._replace(up=draw(st.booleans()), mtu=draw(st.sampled_from([1450, 9000])))])
        for subnet in draw(st.lists(st.sampled_from(SUBNETS), unique=True)):
            mac = draw(st.sampled_from(MACS))
            public_ip = draw(st.sampled_from(PUBLIC_IPS))
            items: list[Item] = [*tunnelled(subnet, mac, public_ip)]
            items[0] = FdbEntry(DEVICE, mac, public_ip, others=draw(st.sampled_from([(), (PUBLIC_IPS[0],)])))
            items[2] = Route(subnet, DEVICE, subnet.address, True, draw(st.sampled_from([70, PROTOCOL_BOOT])))
            state.add(draw(st.lists(st.sampled_from(items), unique=True)))
    for subnet in draw(st.lists(st.sampled_from(SUBNETS), unique=True)):
        state.add(direct(subnet, draw(st.sampled_from(PUBLIC_IPS))))
    return state


def kernel_with(state: State) -> FakeKernel:
    kernel = FakeKernel(foreign=["eth0"])
    kernel.state = State(state.items())
    return kernel


def cannot_deliver(state: State) -> str | None:
    """A route without its neighbour, a neighbour without its FDB entry, or a device that is away."""
    for route in state.routes.values():
        if route.device == "eth0":
            continue
        device = state.links.get(route.device)
        if device is None or not device.up:
            return f"{route}: no device"
        neighbour = state.neighbours.get((route.device, route.gateway or b""))
        if neighbour is None:
            return f"{route}: no neighbour"
        if (route.device, neighbour.mac) not in state.fdb:
            return f"{route}: {neighbour} has no FDB entry"
    return None


def same(left: State, right: State) -> bool:
    return set(left.items()) == set(right.items())


@given(desired=overlays(), found=damaged())
def test_converges_from_any_state(desired: State, found: State) -> None:
    kernel = kernel_with(found)
    assert kernel.apply(plan(desired, kernel.state)) == []
    assert same(kernel.state, desired)
    assert plan(desired, kernel.state) == []


@given(before=overlays(), after=overlays())
def test_a_present_route_delivers_after_every_step(before: State, after: State) -> None:
    # A new MAC on a device makes the kernel drop its neighbours: no order of ours can prevent that step.
    before.add([before.links[DEVICE]._replace(mac=after.links[DEVICE].mac)])
    kernel = kernel_with(before)

    def check(op: Op) -> None:
        assert cannot_deliver(kernel.state) is None, f"after {op}"

    kernel.after_each = check
    assert kernel.apply(plan(after, kernel.state)) == []
    assert same(kernel.state, after)


@given(before=overlays(), after=overlays(), done=st.integers(0, 40))
def test_an_interrupted_plan_is_resumed(before: State, after: State, done: int) -> None:
    kernel = kernel_with(before)
    kernel.apply(plan(after, kernel.state)[:done])
    assert kernel.apply(plan(after, kernel.state)) == []
    assert same(kernel.state, after)


@given(before=overlays(), after=overlays(), bad=st.sets(st.integers(0, 40)))
@settings(max_examples=300)
def test_refusals_leave_no_route_that_cannot_deliver_and_stay_in_the_difference(
    before: State, after: State, bad: set[int]
) -> None:
    before.add([before.links[DEVICE]._replace(mac=after.links[DEVICE].mac, vxlan=after.links[DEVICE].vxlan)])
    kernel = kernel_with(before)
    ops = plan(after, kernel.state)
    refused = {id(op) for position, op in enumerate(ops) if position in bad}

    def check(op: Op) -> None:
        assert cannot_deliver(kernel.state) is None, f"after {op}"

    kernel.refuse, kernel.after_each = lambda op: 12 if id(op) in refused else 0, check
    refusals = Refusals()
    for stage in stages(ops):
        for failure in kernel.apply(refusals.allow(stage)):
            refusals.add(failure.op)
    kernel.refuse = lambda _op: 0
    kernel.apply(plan(after, kernel.state))
    assert same(kernel.state, after)


@given(before=overlays(), after=overlays())
@settings(max_examples=200)
def test_a_part_equals_the_whole_where_it_looked(before: State, after: State) -> None:
    """With the same device, comparing just the touched keys does what comparing everything does."""
    for state in (before, after):
        state.links.clear()
        state.addresses.clear()
        state.add([link()])
    touched = State(
        [item for state in (before, after) for item in state.items() if not isinstance(item, Link)]
    )
    whole = plan(after, before)
    part = plan_part([after], before, touched)
    assert sorted(map(str, whole)) == sorted(map(str, part))
