"""The fast path's programs on single frames (BPF_PROG_TEST_RUN), against the forwarder's own code."""

import socket
import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannelpy.backends.udp.inbound import sort_in
from flannelpy.backends.udp.table import Table
from flannelpy.kernel import bpf, fast_path
from flannelpy.model.address import parse_address, parse_prefix
from tests.packets import Packet, internet_checksum

pytestmark = pytest.mark.root

LOCAL, PEER, OTHER = "192.0.2.1", "192.0.2.2", "192.0.2.3"
PORT = 8285
ETHERNET = bytes(12) + b"\x08\x00"
GO_ON, REDIRECT = 0xFFFFFFFF, 7
TABLE = Table(PORT)
TABLE.apply(
    {
        parse_prefix("10.5.2.0/24"): parse_address(PEER),
        parse_prefix("10.5.3.0/24"): parse_address(OTHER),
        parse_prefix("10.5.3.128/25"): parse_address(PEER),
    },
    (),
)


class Programs:
    def __init__(self) -> None:
        found = bpf.read_object(fast_path.OBJECT.read_bytes())
        self.maps = {name: bpf.Map(name, kind) for name, kind in fast_path._KINDS.items()}
        for prefix, remote in TABLE.entries.items():
            self.maps["peers"].put(fast_path._key(prefix), fast_path._PEER.pack(remote, 0))
        # 1 is lo, which every namespace has; nothing is sent there by a test run.
        own = parse_address(LOCAL)
        self.maps["config"].put(bytes(4), fast_path._SETTINGS.pack(1, 1, own, socket.htons(PORT), 1472))
        self.fd = {
            name: bpf.load_program(name, program, found.licence, self.maps)
            for name, program in found.programs.items()
        }


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


def datagram(payload: bytes, source: str = PEER, tos: int = 0, check: int = 0, fragment: int = 0) -> bytes:
    udp = struct.pack("!HHHH", PORT, PORT, 8 + len(payload), check) + payload
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        tos,
        20 + len(udp),
        7,
        fragment,
        64,
        17,
        0,
        parse_address(source),
        parse_address(LOCAL),
    )
    return ETHERNET + head[:10] + internet_checksum(head).to_bytes(2) + head[12:] + udp


def by_forwarder(payload: bytes, source: str, tos: int) -> list[bytes]:
    """What the slow path would write for one datagram."""
    spans = TABLE.sender(source)
    if spans is None:
        return []
    return [b"".join(write)[10:] for write in sort_in(payload, len(payload), spans, tos, Counter())]


PACKETS = st.builds(
    Packet,
    source=st.sampled_from(["10.5.2.9", "10.5.3.9", "10.5.3.200", "10.5.9.9", PEER]),
    protocol=st.sampled_from([6, 17]),
    payload=st.binary(max_size=60),
    tos=st.sampled_from([0, 1, 2, 3, 0xB8, 0xBA]),
    identity=st.integers(0, 0xFFFF),
    fragment=st.sampled_from([0, 0x4000, 0x2000, 7]),
    ip_options=st.sampled_from([b"", b"", bytes(4)]),
    bad_header=st.booleans(),
)


@given(
    packet=PACKETS,
    source=st.sampled_from([PEER, PEER, OTHER, "192.0.2.9"]),
    tos=st.integers(0, 255),
    check=st.sampled_from([0, 0, 0, 7]),
    damage=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 255)),
    tail=st.sampled_from([b"", b"", b"x", bytes(30)]),
)
@settings(max_examples=400, deadline=None, database=None)
def test_what_decap_takes_the_forwarder_would_deliver_the_same(
    programs: Programs, packet: Packet, source: str, tos: int, check: int,
    damage: tuple[int, int] | None, tail: bytes,
) -> None:  # fmt: skip
    payload = bytearray(packet.bytes() + tail)
    if damage is not None and damage[0] < len(payload):
        payload[damage[0]] = damage[1]
    frame = datagram(bytes(payload), source, tos, check)
    returned, made = bpf.run_program(programs.fd["decap"], frame)
    if returned == GO_ON:
        assert made == frame, "what is not taken goes on as it was"
        return
    assert returned == REDIRECT
    assert check == 0
    assert [made[14:]] == by_forwarder(bytes(payload), source, tos)


@given(garbage=st.binary(min_size=0, max_size=200), cut=st.integers(0, 120))
@settings(max_examples=300, deadline=None, database=None)
def test_decap_lets_garbage_go_on(programs: Programs, garbage: bytes, cut: int) -> None:
    for frame in (ETHERNET + garbage, datagram(garbage), datagram(Packet().bytes())[: 14 + cut]):
        if len(frame) < 34:
            continue  # the kernel's own least for a test run
        returned, made = bpf.run_program(programs.fd["decap"], frame)
        if returned == GO_ON:
            assert made == frame
        else:
            assert by_forwarder(frame[42:], PEER, frame[15])


def test_decap_takes_the_usual_and_leaves_the_odd(programs: Programs) -> None:
    inner = Packet().bytes()
    usual = datagram(inner)
    assert bpf.run_program(programs.fd["decap"], usual) == (REDIRECT, ETHERNET + inner)
    other_port = usual[:36] + (53).to_bytes(2) + usual[38:]
    odd = [
        datagram(inner, check=1), datagram(inner, OTHER), datagram(inner, fragment=0x2000),
        datagram(inner, fragment=3), datagram(inner + b"x"), datagram(inner[:-1]), other_port,
        datagram(Packet(source="10.5.9.9").bytes()), datagram(inner, tos=3),
        datagram(Packet(source="fd00::1", destination="fd00::2").bytes()),
    ]  # fmt: skip
    for frame in odd:
        assert bpf.run_program(programs.fd["decap"], frame) == (GO_ON, frame)
    marked = Packet(tos=2)
    _code, made = bpf.run_program(programs.fd["decap"], datagram(marked.bytes(), tos=3))
    assert made[14:] == Packet(tos=3).bytes()
