"""The udp backend's packet path against models that look at one packet at a time, and against garbage."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flannelpy.backends.udp.inbound import MERGEABLE, sort_in
from flannelpy.backends.udp.outbound import MAX_BYTES, group
from flannelpy.backends.udp.packet import (
    TOO_BIG,
    UNREACHABLE,
    icmp_error,
    ones_sum,
    take_over_mark,
    traffic_class,
)
from flannelpy.backends.udp.table import Table
from flannelpy.model.address import Address, Prefix, format_address, parse_address, parse_prefix
from tests.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG, Packet, cut_up, internet_checksum

PEER = "192.0.2.2"
TABLE = Table(8285)
TABLE.apply(
    {
        parse_prefix("10.5.2.0/24"): parse_address(PEER),
        parse_prefix("fd00:5:0:2::/64"): parse_address(PEER),
        parse_prefix("10.5.3.0/24"): parse_address("192.0.2.3"),
    },
    (),
)
SOURCES = ["10.5.2.9", "10.5.2.9", "10.5.3.9", PEER]
SOURCES6 = ["fd00:5:0:2::9", "fd00:5:0:9::9"]
SIX: dict[str, Any] = {"source": "fd00:5:0:2::9", "destination": "fd00:5:0:1::7"}
SPANS = TABLE.sender(PEER)


# --- trains ---


@st.composite
def trains(draw: st.DrawFn) -> list[Packet]:
    """Mostly what a bulk transfer looks like, with all that may happen to it on its way."""
    six = draw(st.integers(0, 3)) == 0
    flow = Packet(
        source=draw(st.sampled_from(SOURCES6 if six else SOURCES)),
        destination="fd00:5:0:1::7" if six else "10.5.1.7",
        protocol=draw(st.sampled_from([6, 6, 17])),
        sequence=draw(st.sampled_from([1000, 0xFFFFFF00])),
        identity=draw(st.sampled_from([1, 0xFFFE])),
        fragment=draw(st.sampled_from([0x4000, 0])),
        tos=draw(st.sampled_from([0, 0, 1, 2, 3, 0xB8])),
        flags=ACK | draw(st.sampled_from([0, 0, 0, ECE])),
        tcp_options=draw(st.sampled_from([b"", bytes(12)])),
    )
    size = draw(st.sampled_from([1, 7, 100]))
    fixed_id = draw(st.booleans())
    found: list[Packet] = []
    for _number in range(draw(st.integers(1, 12))):
        flow = replace(flow, payload=draw(st.binary(min_size=size, max_size=size)))
        packet = draw(st.one_of(st.just(flow), st.just(flow), st.just(flow), odd(flow)))
        found.append(packet)
        if draw(st.integers(0, 15)):  # else it was lost on the way, or comes twice
            flow = replace(flow, sequence=(flow.sequence + len(packet.payload)) & 0xFFFFFFFF)
            if not fixed_id:
                flow = replace(flow, identity=(flow.identity + 1) & 0xFFFF)
    return found


def odd(packet: Packet) -> st.SearchStrategy[Packet]:
    """The packet with one thing about it changed."""
    flags = st.sampled_from([PSH, FIN, PSH | FIN, SYN, RST, URG, CWR, ECE, CWR | PSH])
    changes: list[st.SearchStrategy[dict[str, object]]] = [
        flags.map(lambda flag: {"flags": packet.flags | flag}),
        st.integers(1, len(packet.payload)).map(lambda size: {"payload": packet.payload[:size]}),
        st.just({"payload": packet.payload + b"longer"}),
        st.just({"payload": b""}),
        st.just({"flags": 0}),
        st.sampled_from([{"ack": 78}, {"window": 501}, {"urgent": 1}, {"ttl": 62}, {"tos": 3}]),
        st.sampled_from([{"sport": 40001}, {"dport": 81}, {"source": packet.source[:-1] + "8"}]),
        st.sampled_from([{"tcp_options": b"\1" * 12}, {"tcp_options": b"\1" * 4}]),
        # TCP's own checksum is trusted where the outer one was right, and made anew: no wrong ones here.
        st.sampled_from([{"bad_header": True}, {"no_checksum": packet.protocol == 17}, {"trailer": b"junk"}]),
        st.sampled_from([{"identity": 9}, {"sequence": 5}]),
    ]
    if ":" not in packet.source:
        changes.append(st.sampled_from([{"fragment": 0x2000}, {"fragment": 8}, {"ip_options": bytes(4)}]))
    return st.one_of(changes).map(lambda change: replace(packet, **change))  # type: ignore[arg-type]


def batches(datagrams: list[bytes]) -> Iterator[tuple[bytes, int]]:
    """As UDP_GRO delivers them: runs of one size, of which the last may be shorter."""
    run: list[bytes] = []
    for datagram in datagrams:
        if run and (len(datagram) > len(run[0]) or len(run[-1]) < len(run[0]) or len(run) == 64):
            yield b"".join(run), len(run[0])
            run = []
        run.append(datagram)
    if run:
        yield b"".join(run), len(run[0])


RFC_6040: list[list[int | None]] = [[0, 0, 0, None], [1, 1, 1, 3], [2, 1, 2, 3], [3, 3, 3, 3]]


def slow(datagram: bytes, outer: int) -> bytes | None:
    """What one datagram comes to, field by field: RFC 6040's table, the sender's subnets."""
    if not datagram or datagram[0] >> 4 not in (4, 6):
        return None
    if datagram[0] >> 4 == 4:
        header = (datagram[0] & 15) * 4
        size = int.from_bytes(datagram[2:4])
        if len(datagram) < 20 or header < 20 or not header <= size <= len(datagram):
            return None
        source = datagram[12:16]
    else:
        if len(datagram) < 40:
            return None
        size, source = 40 + int.from_bytes(datagram[4:6]), datagram[8:24]
        if size > len(datagram):
            return None
    allowed = (Prefix(parse_address("10.5.2.0"), 24), Prefix(parse_address("fd00:5:0:2::"), 64))
    if not any(prefix.has(source) for prefix in allowed) and source != parse_address(PEER):
        return None
    packet = bytearray(datagram)
    six = packet[0] >> 4 == 6
    mark = packet[1] >> 4 & 3 if six else packet[1] & 3
    after = RFC_6040[mark][outer & 3]
    if after is None:
        return None
    if after != mark:
        shift = 4 if six else 0
        was_right = not six and internet_checksum(packet[: (packet[0] & 15) * 4]) == 0
        packet[1] = packet[1] & ~(3 << shift) & 0xFF | after << shift
        if was_right:
            packet[10:12] = b"\0\0"
            packet[10:12] = internet_checksum(packet[: (packet[0] & 15) * 4]).to_bytes(2)
        elif not six:
            packet[10:12] = b"??"
    return bytes(packet[:size])


def comparable(packet: bytes) -> bytes:
    """Without what may differ: the ID of a packet that is never fragmented (RFC 6864)."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        assert len(packet) >= 20
        good = b"good" if internet_checksum(packet[: (packet[0] & 15) * 4]) == 0 else b"bad"
        return good + packet[:4] + packet[6:10] + packet[12:]
    return packet


@settings(max_examples=400, deadline=None)
@given(
    trains(), st.sampled_from([0, 0, 0, 1, 2, 3]), st.sampled_from([MERGEABLE, frozenset({6}), frozenset()])
)
def test_what_is_written_is_what_arrived(train: list[Packet], outer: int, merge: frozenset[int]) -> None:
    datagrams = [packet.bytes() + packet.trailer for packet in train]
    drops: Counter[str] = Counter()
    writes = [
        b"".join(parts)
        for data, segment in batches(datagrams)
        for parts in sort_in(data, segment, SPANS, outer, drops, merge)
    ]
    wanted = [packet for packet in (slow(datagram, outer) for datagram in datagrams) if packet is not None]
    found = [packet for write in writes for packet in cut_up(write)]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if other[0] >> 4 == 4 and other[10:12] == b"??":  # a wrong checksum stays wrong, in its own way
            one, other = one[:10] + b"??" + one[12:], other
        assert comparable(one) == comparable(other)
    assert sum(drops.values()) == len(datagrams) - len(wanted)


def test_a_bulk_transfer_is_written_as_one() -> None:
    """The point of it all; without this the test above would hold for code that never merges."""
    for protocol in (6, 17):
        for six in (False, True):
            ends = SIX if six else {}
            train = [
                Packet(protocol=protocol, sequence=1000 + 100 * n, identity=n, fragment=0, **ends)
                for n in range(44)
            ]
            train[-1] = replace(train[-1], payload=b"end", flags=ACK | PSH)
            ((data, segment),) = batches([packet.bytes() for packet in train])
            (write,) = sort_in(data, segment, SPANS, 0, Counter())
            assert cut_up(b"".join(write)) == [packet.bytes() for packet in train]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 120), st.integers(0, 255), st.booleans())
@example(b"", 1, 3, True)
@example(b"\x45" * 19, 19, 3, True)
@example(b"\x60" * 41, 41, 3, True)
def test_garbage_from_the_wire_harms_nothing(data: bytes, segment: int, tos: int, check: bool) -> None:
    for lead in (b"", b"\x45", b"\x60", Packet().bytes()[:20], Packet(**SIX).bytes()[:40]):
        garbage = lead + data
        drops: Counter[str] = Counter()
        writes = sort_in(garbage, segment, SPANS if check else None, tos, drops)
        for write in writes:
            packet = b"".join(write)[10:]
            assert packet[0] >> 4 in (4, 6)
            assert len(packet) >= 20
        assert set(drops) <= {"drop_malformed", "drop_spoofed", "drop_congestion"}


# --- out ---


ways_out = st.tuples(
    st.sampled_from(["10.5.2.9", "10.5.2.8", "10.5.3.9", "10.5.9.9", "fd00:5:0:2::9", "fd00:5::1"]),
    st.sampled_from([1, 50, 50, 50, 1400]),
    st.sampled_from([0, 0, 0, 2]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ways_out, max_size=70), st.sampled_from([1, 64]))
def test_every_packet_leaves_once_in_order_for_its_peer(
    ways: list[tuple[str, int, int]], segments: int
) -> None:
    train = [
        Packet(
            source="fd00:5:0:1::7" if ":" in destination else "10.5.1.7",
            destination=destination,
            payload=bytes(size),
            tos=tos,
            sequence=number,
        )
        for number, (destination, size, tos) in enumerate(ways)
    ]
    peers = {"10.5.2.": "192.0.2.2", "10.5.3.": "192.0.2.3", "fd00:5:0:2:": "192.0.2.2"}
    wanted = [
        (packet.bytes(), peer, packet.tos)
        for packet in train
        for start, peer in peers.items()
        if packet.destination.startswith(start)
    ]
    departures, lost = group([memoryview(packet.bytes()) for packet in train], TABLE, segments)
    assert [(bytes(one), d.target[0], d.tos) for d in departures for one in d.packets] == wanted
    assert len(lost) == len(train) - len(wanted)
    for departure in departures:
        sizes = [len(one) for one in departure.packets]
        assert len(sizes) <= segments
        assert sum(sizes) <= MAX_BYTES
        assert all(size == sizes[0] for size in sizes[:-1])
        assert sizes[-1] <= sizes[0]


@given(st.lists(st.binary(max_size=80), max_size=10))
def test_garbage_from_the_tun_harms_nothing(packets: list[bytes]) -> None:
    departures, lost = group([memoryview(bytearray(packet)) for packet in packets], TABLE)
    assert len(lost) + sum(len(departure.packets) for departure in departures) == len(packets)
    for packet in packets:
        for lead in (b"\x45", b"\x60", Packet().bytes()[:20], Packet().bytes()[:9] + b"\1"):
            whole = memoryview(bytearray(lead + packet))
            for source in (bytes([10, 5, 1, 0]), bytes(16)):
                if len(whole) >= 20 and (whole[0] >> 4 == 4) == (len(source) == 4):
                    icmp_error(whole, source, UNREACHABLE)
                    icmp_error(whole, source, TOO_BIG, 1472)


# --- sums, marks, the table ---


@given(st.binary(max_size=200))
def test_the_sum_is_that_of_rfc_1071(data: bytes) -> None:
    assert ~ones_sum(data) & 0xFFFF == internet_checksum(data)


@given(st.integers(0, 255), st.integers(0, 3), st.booleans(), st.integers(0, 0xFFFF))
def test_a_mark_changes_no_more_than_the_mark(tos: int, outer: int, six: bool, identity: int) -> None:
    ends = SIX if six else {}
    packet = bytearray(Packet(tos=tos, identity=identity, **ends).bytes())
    kept = take_over_mark(memoryview(packet), outer)
    assert kept == (outer != 3 or tos & 3 != 0)
    after = traffic_class(memoryview(packet))
    assert after >> 2 == tos >> 2
    assert packet == Packet(tos=after, identity=identity, **ends).bytes()


prefixes = st.builds(
    lambda number, length: Prefix((0x0A050000 | number & 0xFFFF).to_bytes(4), length).network(),
    st.integers(0, 0xFFFF),
    st.integers(14, 32),
)
changes = st.lists(
    st.tuples(st.booleans(), prefixes, st.sampled_from([b"\xc0\0\2\1", b"\xc0\0\2\2", b"\xc0\0\2\3"]))
)


@settings(max_examples=100, deadline=None)
@given(changes, st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20))
def test_the_table_is_a_list_that_is_searched_for_the_longest(
    steps: list[tuple[bool, Prefix, Address]], asked: list[int]
) -> None:
    table, model = Table(8285), dict[Prefix, Address]()
    for put, prefix, address in steps:
        table.apply({prefix: address} if put else {}, () if put else [prefix])
        if put:
            model[prefix] = address
        else:
            model.pop(prefix, None)
        for number in asked:
            destination = 0x0A050000 | number
            inside = [p for p in model if p.has(destination.to_bytes(4))]
            best = max(inside, key=lambda p: p.length, default=None)
            wanted = (format_address(model[best]), 8285) if best else None
            assert table.target(4, destination) == wanted
    assert table.entries == model
    for address in (b"\xc0\0\2\1", b"\xc0\0\2\2", b"\xc0\0\2\3"):
        own = int.from_bytes(address)
        subnets = {(4, p.first, p.last) for p, a in model.items() if a == address}
        assert set(table.sender(format_address(address)) or ()) == (
            subnets | {(4, own, own)} if subnets else set()
        )
