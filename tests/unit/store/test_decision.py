"""Which record a node claims: whose lease is ours, and which one is in the way."""

from random import Random

import pytest

from flannelpy.model.address import parse_prefix, parse_v4, parse_v6
from flannelpy.model.config import parse_config
from flannelpy.model.lease import LeaseAttrs, same_node
from flannelpy.model.subnet import PoolFull, Previous, encode_attrs
from flannelpy.store import Running
from flannelpy.store.decision import Create, MakeRoom, TakeOver, decide, has_rival, stale_leases
from flannelpy.store.etcd_codec import Listing, Record, read_listing

SMALL = parse_config('{"Network":"10.5.0.0/22","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0"}')


def node(v4: str = "", v6: str = "") -> LeaseAttrs:
    return LeaseAttrs(parse_v4(v4) if v4 else None, parse_v6(v6) if v6 else None, "vxlan")


ME, OTHER = node("192.0.2.1"), node("192.0.2.2")


def listing(**records: LeaseAttrs) -> Listing:
    """`_10_5_1_0_24=attrs` for the key 10.5.1.0-24."""
    values = []
    for revision, (name, attrs) in enumerate(records.items(), start=1):
        *address, length = name.strip("_").split("_")
        key = f"{'.'.join(address)}-{length}"
        values.append(Record(key, encode_attrs(attrs).encode(), revision, revision, revision))
    return read_listing(values, 100)


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        (node("192.0.2.1"), node("192.0.2.1"), True),
        (node("192.0.2.1", "fd00::1"), node("192.0.2.2", "fd00::1"), False),
        (node("192.0.2.1", "fd00::9"), node("192.0.2.1", "fd00::1"), True),
        (node("", "fd00::1"), node("", "fd00::1"), True),
        (node("", "fd00::1"), node("", "fd00::2"), False),
        (node("", "fd00::1"), node("192.0.2.1", "fd00::1"), True),
        (node("192.0.2.1", "fd00::1"), node("", "fd00::1"), True),
        (node("", ""), node("", ""), False),
        (node("192.0.2.1"), node("", "fd00::1"), False),
    ],
)
def test_a_node_is_its_public_ip(theirs: LeaseAttrs, ours: LeaseAttrs, *, same: bool) -> None:
    assert same_node(theirs, ours) is same


def test_decisions() -> None:
    def choice(table: Listing) -> TakeOver | Create | MakeRoom:
        return decide(SMALL, table, ME, Previous(), [], Random(1))

    found = choice(listing(_10_5_1_0_24=OTHER, _10_5_2_0_24=ME))
    assert isinstance(found, TakeOver)
    assert found.lease.key == "10.5.2.0-24"
    made = choice(listing(_10_5_1_0_24=OTHER, _10_9_2_0_24=ME))
    assert isinstance(made, Create)
    assert made.key == "10.5.2.0-24"
    room = choice(listing(_10_5_1_0_24=OTHER, _10_5_2_0_25=ME))
    assert isinstance(room, MakeRoom)
    assert [lease.key for lease in room.leases] == ["10.5.2.0-25"]
    with pytest.raises(PoolFull):
        choice(listing(_10_5_1_0_24=OTHER, _10_5_2_0_24=OTHER))


def test_refused_subnets_are_not_tried_again() -> None:
    first = decide(SMALL, listing(), ME, Previous(), [], Random(1))
    assert isinstance(first, Create)
    second = decide(SMALL, listing(), ME, Previous(), [(first.subnet, None)], Random(1))
    assert isinstance(second, Create)
    assert second.subnet != first.subnet
    with pytest.raises(PoolFull):
        decide(SMALL, listing(), ME, Previous(), [(first.subnet, None), (second.subnet, None)], Random(1))


def test_the_older_of_two_that_overlap_wins() -> None:
    table = listing(_10_5_1_0_24=OTHER, _10_5_1_128_25=ME, _10_5_2_0_24=OTHER)
    older, younger, apart = table.leases.values()
    assert has_rival(table, younger)
    assert not has_rival(table, older)
    assert not has_rival(table, apart)


def test_a_running_node_knows_its_record_by_what_it_wrote_last() -> None:
    """Restored after our address changed, without a MAC to tell it by (host-gw): it is ours all the same."""
    table = listing(_10_5_1_0_24=ME, _10_5_2_0_24=OTHER)
    own = table.leases["10.5.1.0-24"]
    moved = node("192.0.2.77")
    found = decide(SMALL, table, moved, Previous(), [], Random(1), Running(own))
    assert found == TakeOver(own)


def test_a_running_node_does_not_go_back_to_a_subnet_that_a_held_peer_has() -> None:
    table = listing(_10_5_1_0_24=OTHER, _10_5_2_0_24=ME)
    before, ours = table.leases["10.5.1.0-24"], table.leases["10.5.2.0-24"]
    own = before._replace(attrs=ME)  # another node has our subnet now, and we had that one's once
    held = ours._replace(attrs=node("192.0.2.3"))
    assert decide(SMALL, table, ME, Previous(), [], Random(1), Running(own)) == TakeOver(ours)
    assert decide(SMALL, table, ME, Previous(), [], Random(1), Running(own, (held,))) == MakeRoom((ours,))


def test_a_claim_whose_answer_got_lost_is_kept_when_there_is_no_way_back() -> None:
    pairs = {
        "10.5.1.0-24&fd00:5:0:2::-64": OTHER,  # has half of the pair that we had
        "10.5.2.0-24&fd00:5:0:1::-64": ME,  # ours since, with the other half
    }
    table = read_listing(
        [Record(key, encode_attrs(attrs).encode(), 5, 5, 5) for key, attrs in pairs.items()], 100
    )
    other, ours = table.leases.values()
    own = ours._replace(subnet=other.subnet)
    dual = parse_config('{"Network":"10.5.0.0/22","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')
    assert decide(dual, table, ME, Previous(), [], Random(1), Running(own)) == TakeOver(ours)


def test_what_a_backup_brought_back_of_ours_is_removed() -> None:
    table = listing(_10_5_1_0_24=ME, _10_5_2_0_24=ME)
    old, own = table.leases.values()
    assert stale_leases(SMALL, table, ME, own) == []
    assert stale_leases(SMALL, table, ME, own, Running(own, (), old.revision)) == [old]


def test_our_record_that_was_made_again_over_an_older_one_is_left_alone() -> None:
    """By an operator, while another node had claimed half of the pair."""
    pairs = {"10.5.1.0-24&fd00:5:0:1::-64": OTHER, "10.5.1.0-24&fd00:5:0:2::-64": ME}
    records = [
        Record(key, encode_attrs(attrs).encode(), revision, revision, 0)
        for revision, (key, attrs) in enumerate(pairs.items(), 5)
    ]
    table = read_listing(records, 100)
    _other, ours = table.leases.values()
    dual = parse_config('{"Network":"10.5.0.0/22","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')
    for running in (None, Running(ours)):
        found = decide(dual, table, ME, Previous(), [], Random(1), running)
        assert isinstance(found, Create)
        assert found.key not in pairs


def test_a_node_that_starts_into_another_history_leaves_the_subnets_of_the_former_one_alone() -> None:
    lost = [(parse_prefix("10.5.1.0/24"), None), (parse_prefix("10.5.2.0/24"), None)]
    for number in range(20):
        found = decide(SMALL, listing(), ME, Previous(), [], Random(number), lost=lost[:1])
        assert found == Create(lost[1][0], None)
    # Its own among them is its own; and a full pool is no reason not to start.
    previous = Previous(None, lost[0][0])
    assert decide(SMALL, listing(), ME, previous, [], Random(1), lost=lost) == Create(*lost[0])
    assert isinstance(decide(SMALL, listing(), ME, Previous(), [], Random(1), lost=lost), Create)


def test_our_own_record_of_a_backup_under_another_address_gives_way_to_what_we_have_now() -> None:
    """Half of its pair is ours still; without a look at the MAC it would be another node's."""
    data = {"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}
    before = node("192.0.2.77")._replace(backend_data=data)
    table = read_listing([Record("10.5.1.0-24&fd00:5:0:1::-64", encode_attrs(before).encode(), 5, 5, 5)], 100)
    (old,) = table.leases.values()
    own = old._replace(
        key="10.5.2.0-24&fd00:5:0:1::-64",
        subnet=parse_prefix("10.5.2.0/24"),
        attrs=ME._replace(backend_data=data),
    )
    dual = parse_config('{"Network":"10.5.0.0/22","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')

    def choice(began: int) -> TakeOver | Create | MakeRoom:
        return decide(dual, table, own.attrs, Previous(), [], Random(1), Running(own, (), began))

    assert choice(began=5) == MakeRoom((old,))
    later = choice(began=4)  # written since: by another machine, which has our MAC
    assert isinstance(later, Create)
    assert later.subnet6 != own.subnet6


def test_an_older_record_of_ours_is_no_rival() -> None:
    """Left over, of another size: the one that we had last stays ours, and is not made anew."""
    table = listing(_10_5_2_0_25=ME, _10_5_2_0_24=ME)
    old, own = table.leases.values()
    previous = Previous(None, own.subnet)
    assert decide(SMALL, table, ME, previous, [], Random(1)) == TakeOver(own)
    assert decide(SMALL, table, ME, previous, [], Random(1), Running(own)) == TakeOver(own)
    assert stale_leases(SMALL, table, ME, own) == [old]
