"""Peers come one by one, in any order, or all at once: the same is programmed, and the same refused."""

from hypothesis import given
from hypothesis import strategies as st

from flannelpy.backend import load
from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.model.peers import Peers
from tests.builders import config, facts, lease

OWN = lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:01")
SUBNETS = (
    "10.5.1.0/25",
    "10.5.2.0/24",
    "10.5.2.128/25",
    "10.5.3.0/24",
    "10.5.4.0/23",
    "10.5.4.0/24",
    "10.6.0.0/24",
)


@st.composite
def some_leases(draw: st.DrawFn) -> list[Lease]:
    """Leases of which some overlap, share a MAC or a whole node, or are of no use."""
    nodes = st.integers(1, 4)
    leases: list[Lease] = []
    for subnet in draw(st.lists(st.sampled_from(SUBNETS), unique=True)):
        node, kind = draw(nodes), draw(st.sampled_from(["vxlan", "vxlan", "vxlan", "host-gw"]))
        public_ip = f"192.0.2.{draw(st.sampled_from([node, node, 1]))}"
        mac = f"02:00:00:00:00:{node:02x}"
        leases.append(lease(subnet, public_ip, mac=mac, backend_type=kind, created=len(leases)))
    return leases


def peers() -> Peers:
    backend = load(config())
    return Peers(config(), OWN, lambda one: backend.peer(one, facts()))


@given(leases=some_leases(), data=st.data())
def test_one_by_one_in_any_order_is_the_same_as_all_at_once(leases: list[Lease], data: st.DataObject) -> None:
    at_once, one_by_one = peers(), peers()
    at_once.update(Snapshot((OWN, *leases), 10))
    one_by_one.update(Snapshot((OWN,), 1))
    for revision, one in enumerate(data.draw(st.permutations(leases)), 2):
        one_by_one.update(Delta((one,), (), revision))
    assert at_once.state == one_by_one.state
    assert at_once.refused.keys() == one_by_one.refused.keys()
    goes = {one.key for one in leases if data.draw(st.booleans(), "goes")}
    for key in sorted(goes):
        one_by_one.update(Delta((), (key,), 20))
    at_once.update(Snapshot((OWN, *(one for one in leases if one.key not in goes)), 20))
    assert at_once.state == one_by_one.state
    assert at_once.refused.keys() == one_by_one.refused.keys()
