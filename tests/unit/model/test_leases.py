"""Peers are held when the store begins a new history, and each way in which a hold ends."""

from flannelpy.model.lease import Delta, Lease, Snapshot
from flannelpy.model.leases import Held, Leases
from tests.builders import lease

OWN = lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:01", created=100)


def peer(number: int, *, public_ip: int = 0, revision: int = 50) -> Lease:
    address = public_ip or number
    mac = f"02:00:00:00:00:{address:02x}"
    return lease(f"10.5.{number}.0/24", f"192.0.2.{address}", mac=mac, created=revision)


PEERS = tuple(peer(number) for number in range(2, 7))


def restored(*found: Lease) -> tuple[Leases, set[str]]:
    """What is known after a store with OWN and PEERS comes back with these records; the keys."""
    leases = Leases()
    leases.after(Snapshot((OWN, *PEERS), 100), OWN)
    told = leases.after(Snapshot(found, 10, new_history=True), OWN)
    assert isinstance(told, Snapshot)
    assert {one.key for one in told.leases} == set(leases.known)
    return leases, set(leases.known)


def test_a_listing_of_the_same_history_is_the_truth() -> None:
    leases = Leases()
    leases.after(Snapshot((OWN, *PEERS), 100), OWN)
    leases.after(Snapshot((OWN,), 200), OWN)
    assert set(leases.known) == {OWN.key}
    assert leases.held == {}


def test_who_is_absent_from_a_new_history_is_held_but_not_ourselves() -> None:
    leases, known = restored(PEERS[0]._replace(revision=5))
    assert known == {one.key for one in PEERS}
    assert set(leases.held) == {one.key for one in PEERS[1:]}


def test_an_older_record_of_a_backup_does_not_count_until_it_is_written_again() -> None:
    older = peer(3, public_ip=77, revision=5)
    leases, known = restored(older)
    assert leases.known[older.key].attrs == PEERS[1].attrs
    assert older.key in known
    # The same stale record in another listing of that history changes nothing; a new one does.
    leases.after(Snapshot((older,), 11), OWN)
    assert leases.known[older.key].attrs == PEERS[1].attrs
    leases.after(Snapshot((older._replace(revision=12),), 12), OWN)
    assert leases.known[older.key].attrs == older.attrs
    assert older.key not in leases.held


def test_who_has_moved_while_we_did_not_look_is_not_held_where_it_was() -> None:
    """As told by a listing of the same history after a restart, from a copy that is older than the move."""
    former, now = peer(9, public_ip=2), PEERS[0]
    held = [Held(former, 0), *(Held(one, 0) for one in PEERS)]
    leases = Leases((OWN,), held, began=5)
    leases.after(Snapshot((OWN, now._replace(revision=9)), 9), OWN)
    assert former.key not in leases.known
    assert set(leases.held) == {one.key for one in PEERS if one.key != now.key}
    # What may be from the backup says nothing of the kind.
    leases = Leases((OWN,), held, began=9)
    leases.after(Snapshot((OWN, now._replace(revision=9)), 9), OWN)
    assert former.key in leases.held


def test_each_comes_back_by_itself() -> None:
    leases, _known = restored()
    for number, one in enumerate(PEERS, 11):
        told = leases.after(Delta((one._replace(revision=number),), (), number), OWN)
        assert told.gone == ()  # type: ignore[union-attr]
    assert leases.held == {}
    assert set(leases.known) == {one.key for one in PEERS}


def test_a_held_peer_gives_way_to_who_lives() -> None:
    leases, _known = restored()
    moved = peer(60, public_ip=2, revision=11)
    told = leases.after(Delta((moved,), (), 11), OWN)
    assert isinstance(told, Delta)
    assert told.gone == (PEERS[0].key,), "the same node with another subnet"
    part = lease("10.5.3.128/25", "192.0.2.99", mac="02:00:00:00:00:99", created=12)
    told = leases.after(Delta((part,), (), 12), OWN)
    assert isinstance(told, Delta)
    assert told.gone == (PEERS[1].key,), "another node with a part of its subnet"
    assert set(leases.held) == {one.key for one in PEERS[2:]}
    assert {moved.key, part.key} <= set(leases.known)


def test_a_node_that_comes_back_as_it_was_is_in_one_place_only() -> None:
    """It may have had another subnet, or another address, before: a copy on disk still knows."""
    subnet = peer(60, public_ip=2)
    address = peer(61)._replace(attrs=PEERS[0].attrs._replace(public_ip=bytes((192, 0, 2, 61))))
    leases = Leases([subnet, address, *PEERS], (), 0)
    leases.after(Snapshot((), 10, new_history=True), OWN)
    assert {subnet.key, address.key, PEERS[0].key} <= leases.held.keys()
    told = leases.after(Delta((PEERS[0]._replace(revision=11),), (), 11), OWN)
    assert isinstance(told, Delta)
    assert {*told.gone} == {subnet.key, address.key}
    assert set(leases.known) == {one.key for one in PEERS}


def test_a_node_that_comes_back_takes_its_subnet_from_whoever_had_half_of_its_pair() -> None:
    now, then = (
        lease("10.5.2.0/24", f"192.0.2.{host}", mac=f"02:00:00:00:00:0{host}", mac6=f"02:00:00:00:06:0{host}",
              subnet6=f"fd00:5:0:{host}::/64", public_ipv6=f"2001:db8::{host}")
        for host in (2, 3)
    )  # fmt: skip
    leases = Leases([now, then, *PEERS[2:]], (), 0)
    leases.after(Snapshot((), 10, new_history=True), OWN)
    told = leases.after(Delta((now._replace(revision=11),), (), 11), OWN)
    assert isinstance(told, Delta)
    assert told.gone == (then.key,)


def test_from_memory_the_address_that_the_store_tells_counts() -> None:
    moved = peer(60)._replace(attrs=PEERS[0].attrs._replace(public_ip=bytes((192, 0, 2, 60))))
    leases = Leases(PEERS, (), 0)
    leases.after(Snapshot((moved,), 10, new_history=True), OWN)
    assert PEERS[0].key not in leases.held
    assert PEERS[1].key in leases.held


def test_a_record_with_a_former_address_of_a_held_peer_waits() -> None:
    """Its MAC can be sent to one address only, and where the peer was once is not the one."""
    former = peer(60)._replace(attrs=PEERS[0].attrs._replace(public_ip=bytes((192, 0, 2, 60))), revision=5)
    leases, known = restored(former)
    assert known == {one.key for one in PEERS}
    # Once it is written again it counts; or when the held one is let go.
    again, _known = restored(former)
    told = again.after(Delta((former._replace(revision=12),), (), 12), OWN)
    assert isinstance(told, Delta)
    assert told.gone == (PEERS[0].key,)
    assert leases.let_go().put == (former,)


def test_a_record_of_equal_revision_that_differs_is_from_a_backup() -> None:
    other = peer(3, public_ip=77)
    leases, _known = restored(other)
    assert leases.known[other.key].attrs == PEERS[1].attrs


def test_what_came_and_went_between_two_looks_is_gone() -> None:
    leases, _known = restored()
    told = leases.after(Delta((), (PEERS[0].key,), 13), OWN)
    assert PEERS[0].key not in leases.known
    assert told.gone == (PEERS[0].key,)  # type: ignore[union-attr]


def test_an_operator_lets_them_go() -> None:
    leases, _known = restored(PEERS[0]._replace(revision=5))
    gone = leases.let_go()
    assert set(gone.gone) == {one.key for one in PEERS[1:]}
    assert set(leases.known) == {PEERS[0].key}
    assert leases.let_go().gone == ()


def test_a_second_new_history_during_a_hold_holds_all() -> None:
    leases, _known = restored()
    leases.after(Delta((PEERS[0]._replace(revision=11),), (), 11), OWN)
    leases.after(Snapshot((), 3, new_history=True), OWN)
    assert set(leases.held) == {one.key for one in PEERS}


def test_an_unreadable_record_keeps_what_was_known() -> None:
    leases = Leases()
    leases.after(Snapshot((OWN, *PEERS), 100), OWN)
    leases.after(Snapshot((OWN,), 101, ((PEERS[0].key, "not JSON"),)), OWN)
    assert set(leases.known) == {OWN.key, PEERS[0].key}


def test_after_a_restart_a_record_later_than_all_that_was_seen_is_no_backups() -> None:
    """Everything had expired while the cluster slept; the peer has another subnet since."""
    former, now = PEERS[0], peer(9, public_ip=2, revision=60)
    leases = Leases(PEERS)
    leases.after(Snapshot((OWN, now), 60, new_history=True), OWN)
    assert former.key not in leases.known
    older = Leases(PEERS)
    older.after(Snapshot((OWN, now._replace(revision=40)), 60, new_history=True), OWN)
    assert former.key in older.held
