"""Which leases are programmed, which are refused and why, and what a change touches."""

import pytest

from flannelpy.backend import load
from flannelpy.model.address import host, parse_prefix, parse_v4
from flannelpy.model.kernel import State
from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.model.peers import Peers
from tests.builders import config, facts, lease

OWN = lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:01")


def peers(own: Lease = OWN) -> Peers:
    backend = load(config())
    return Peers(config(), own, lambda one: backend.peer(one, facts()))


def snapshot(*leases: Lease, unreadable: tuple[tuple[str, str], ...] = ()) -> Snapshot:
    return Snapshot((OWN, *leases), 10, unreadable)


def programmed(found: Peers) -> set[str]:
    return {str(route.destination) for route in found.state.routes.values()}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lease("10.6.2.0/24"), "10.6.2.0/24 is not inside the network 10.5.0.0/16"),
        (lease("0.0.0.0/1"), "0.0.0.0/1 is not inside the network"),
        (lease("10.5.1.128/25"), "overlaps our own"),
        (lease("10.5.0.0/17"), "overlaps our own"),
        (lease(public_ip="127.0.0.1"), "127.0.0.1 is not a unicast address"),
        (lease(public_ip="224.0.0.5"), "224.0.0.5 is not a unicast address"),
        (lease(public_ip="255.255.255.255"), "not a unicast address"),
        (lease(public_ip="192.0.2.1"), "192.0.2.1 is our own"),
        (lease(public_ip="10.5.77.7"), "10.5.77.7 is inside the overlay network 10.5.0.0/16"),
        (lease(backend_type="host-gw"), "its backend type is 'host-gw', ours is 'vxlan'"),
        (lease(backend_type=""), "its backend type is ''"),
        (lease(data={"VNI": 2, "VtepMAC": "02:00:00:00:00:02"}), "its VNI is 2, ours is 1"),
        (lease(data={"VNI": True, "VtepMAC": "02:00:00:00:00:02"}), "its VNI is True"),
        (lease(data={"VNI": 1}), "its VtepMAC is missing"),
        (lease(data={"VNI": 1, "VtepMAC": "x" * 9999}), "is not a MAC address"),
        (lease(mac="01:00:5e:00:00:01"), "is not a unicast address"),
        (lease(mac="00:00:00:00:00:00"), "is not a unicast address"),
        (lease(data=[1, 2]), "it has no backend data"),
    ],
)
def test_a_bad_lease_is_refused_with_its_reason_and_harms_no_good_one(bad: Lease, reason: str) -> None:
    good = lease("10.5.9.0/24", "192.0.2.9", mac="02:00:00:00:00:09")
    found = peers()
    found.update(snapshot(bad, good))
    assert programmed(found) == {"10.5.9.0/24"}
    assert reason in found.refused[bad.key]
    assert len(found.refused[bad.key]) < 200


def test_an_earlier_lease_wins_an_overlap_whatever_the_order_of_arrival() -> None:
    early = lease("10.5.2.0/24", "192.0.2.2", mac="02:00:00:00:00:02", created=1)
    late = lease("10.5.2.128/25", "192.0.2.3", mac="02:00:00:00:00:03", created=2)
    found = peers()
    for order in ((early, late), (late, early)):
        found = peers()
        found.update(snapshot())
        for one in order:
            found.update(Delta((one,), (), 11))
        assert programmed(found) == {"10.5.2.0/24"}
        assert "overlaps that of the earlier lease 10.5.2.0-24" in found.refused[late.key]
    found.update(Delta((), (early.key,), 12))
    assert programmed(found) == {"10.5.2.128/25"}
    assert not found.refused


def test_an_earlier_lease_keeps_a_vtep_mac() -> None:
    early = lease("10.5.2.0/24", "192.0.2.2", created=1)
    clone = lease("10.5.3.0/24", "192.0.2.3", created=2)
    found = peers()
    found.update(snapshot(clone, early))
    assert programmed(found) == {"10.5.2.0/24"}
    assert "needs the same FDB entry" in found.refused[clone.key]


def test_a_node_with_two_leases_shares_its_fdb_entry_until_both_are_gone() -> None:
    old, new = lease("10.5.2.0/24", created=1), lease("10.5.3.0/24", created=2)
    found = peers()
    found.update(snapshot(old, new))
    assert programmed(found) == {"10.5.2.0/24", "10.5.3.0/24"}
    change = found.update(Delta((), (old.key,), 12))
    assert not change.full
    assert not change.touched.fdb
    assert len(found.state.fdb) == 1
    found.update(Delta((), (new.key,), 13))
    assert len(found.state) == 0


def test_a_changed_lease_touches_only_its_own_objects() -> None:
    found = peers()
    found.update(snapshot(lease(), lease("10.5.9.0/24", "192.0.2.9", mac="02:00:00:00:00:09")))
    change = found.update(Delta((lease(mac="02:00:00:00:00:22"),), (), 11))
    assert {str(item) for item in change.touched.items()} == {
        "FDB entry 02:00:00:00:00:02 -> 192.0.2.2 on flannel.1",
        "FDB entry 02:00:00:00:00:22 -> 192.0.2.2 on flannel.1",
        "neighbour 10.5.2.0 -> 02:00:00:00:00:22 on flannel.1",
        "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1",
    }


def test_the_same_again_and_an_empty_delta_change_nothing() -> None:
    found = peers()
    found.update(snapshot(lease()))
    before = State(found.state.items())
    for update in (snapshot(lease()), Delta((), (), 11), Delta((lease(),), (), 12)):
        change = found.update(update)
        assert len(change.touched) == 0
        assert not change.full
    assert found.state == before


def test_a_snapshot_removes_who_is_absent_but_not_who_became_unreadable() -> None:
    gone, garbled = lease("10.5.2.0/24"), lease("10.5.3.0/24", "192.0.2.3", mac="02:00:00:00:00:03")
    found = peers()
    found.update(snapshot(gone, garbled))
    found.update(snapshot(unreadable=((garbled.key, "not JSON"),)))
    assert programmed(found) == {"10.5.3.0/24"}


def test_our_own_lease_is_no_peer() -> None:
    found = peers()
    found.update(snapshot())
    assert not programmed(found)
    found.update(Delta((OWN._replace(revision=20),), (), 11))
    assert not programmed(found)
    assert not found.refused
    # Another key of ours, written before we were told that we have it.
    found.update(Delta((OWN._replace(key="10.5.7.0-24", subnet=parse_prefix("10.5.7.0/24")),), (), 12))
    assert not programmed(found)
    assert not found.refused


def test_the_new_owner_of_our_old_subnet_is_a_peer() -> None:
    thief = lease("10.5.1.0/24", "192.0.2.9", mac="02:00:00:00:00:09", created=5)
    found = peers()
    found.update(snapshot())
    found.update(Delta((thief,), (), 11))
    assert not programmed(found)
    moved = lease("10.5.8.0/24", "192.0.2.1", mac="02:00:00:00:00:01", created=6)
    found.rebase(moved, found._needs)
    assert programmed(found) == {"10.5.1.0/24"}


def test_a_subnet_that_contains_what_the_node_stands_on_is_refused() -> None:
    backend = load(config())
    block = ("10.5.77.1, an address of eth0", host(parse_v4("10.5.77.1")))
    found = Peers(config(), OWN, lambda one: backend.peer(one, facts()), [block])
    found.update(snapshot(lease("10.5.77.0/24"), lease("10.5.78.0/24", "192.0.2.8", mac="02:00:00:00:00:08")))
    assert programmed(found) == {"10.5.78.0/24"}
    assert found.refused == {"10.5.77.0-24": "its subnet 10.5.77.0/24 contains 10.5.77.1, an address of eth0"}


def test_renewals_touch_nothing_even_beside_a_clash() -> None:
    early, clone = lease(created=1), lease("10.5.3.0/24", "192.0.2.3", created=2)
    others = [
        lease(f"10.5.{n}.0/24", f"192.0.2.{n}", mac=f"02:00:00:00:00:{n:02x}", created=n)
        for n in range(10, 20)
    ]
    found = peers()
    found.update(snapshot(early, clone, *others))
    assert set(found.refused) == {clone.key}
    for renewed in (early, others[0]):
        change = found.update(Delta((renewed._replace(revision=99, etcd_lease_id=7),), (), 99))
        assert not change.full
        assert len(change.touched) == 0
    assert not found.update(Delta((), (), 100)).full
    found.update(Delta((), (early.key,), 101))
    assert "10.5.3.0/24" in programmed(found), "it gets what the earlier one left"
