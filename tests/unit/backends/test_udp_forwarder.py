"""The forwarding loop over a pair of descriptors that stand for TUN and wire: refusals, limits, marks."""

import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from flannelpy.backends.udp.forwarder import Forwarder, TunnelLostError
from flannelpy.backends.udp.table import Table
from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.kernel import Tunnel
from tests.packets import Packet

OURS = parse_address("10.5.1.0")


class Wire:
    """A UDP socket whose `sendmsg` keeps what it is given, or refuses it."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.sent: list[tuple[list[bytes], list[Any], Any]] = []
        self.together = 0
        """errno for packets that leave together."""
        self.alone = 0
        self.arrived: list[tuple[bytes, list[Any], int, tuple[str, int]]] = []

    def setsockopt(self, *_words: object) -> None:
        """Everything is supported."""

    def sendmsg(self, packets: list[memoryview], ancillary: list[Any], _flags: int, target: Any) -> int:
        code = self.together if len(packets) > 1 else self.alone
        if code:
            raise OSError(code, os.strerror(code))
        self.sent.append((list(map(bytes, packets)), ancillary, target))
        return sum(map(len, packets))

    def recvmsg(self, *_words: object) -> tuple[bytes, list[Any], int, tuple[str, int]]:
        if not self.arrived:
            raise BlockingIOError
        return self.arrived.pop(0)


class Bench:
    """A forwarder between a wire and a TUN, which is one end of a socket pair that keeps packets apart."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.counts: Counter[str] = Counter()
        self.host, self.tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.host.setblocking(False)
        self.tun.setblocking(False)
        table = Table(8285)
        table.apply({parse_prefix("10.5.2.0/24"): parse_address("192.0.2.2")}, ())
        tunnel = Tunnel("flannel0", parse_address("192.0.2.1"), 8285, 1472, (OURS,))
        self.forwarder = Forwarder(tunnel, self.tun.fileno(), self.wire, table, self.counts)  # type: ignore[arg-type]

    def leave(self, *packets: Packet) -> None:
        for packet in packets:
            self.host.send(bytes(10) + packet.bytes())
        self.forwarder.send()

    def delivered(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.host.recv(70000))
            except BlockingIOError:
                return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.host.close()
    made.tun.close()


OUT = Packet(source="10.5.1.7", destination="10.5.2.9")


@pytest.mark.parametrize(
    ("code", "again"), [(errno.EMSGSIZE, True), (errno.EINVAL, True), (errno.EIO, False)]
)
def test_what_may_not_leave_together_leaves_one_by_one(bench: Bench, code: int, again: bool) -> None:
    bench.wire.together = code
    bench.leave(OUT, OUT)
    assert [packets for packets, _ancillary, _target in bench.wire.sent] == [[OUT.bytes()], [OUT.bytes()]]
    assert bench.counts["sent_packets"] == bench.counts["sent_singly"] == 2
    bench.wire.together = 0
    bench.leave(OUT, OUT)
    assert len(bench.wire.sent) == (3 if again else 4), "a device that cannot is not asked for ever"


def test_a_packet_larger_than_a_datagram_is_answered(bench: Bench) -> None:
    bench.wire.alone = errno.EMSGSIZE
    bench.leave(OUT)
    (answer,) = bench.delivered()
    assert (answer[30], answer[31], int.from_bytes(answer[36:38])) == (3, 4, 1472)
    assert bench.counts == {
        "drop_too_big": 1,
        "icmp_sent": 1,
        "received_packets": 1,
        "received_bytes": len(answer),
    }


def test_icmp_errors_come_at_a_bounded_rate(bench: Bench) -> None:
    lost = Packet(source="10.5.1.7", destination="10.5.9.9")
    for _ in range(5):
        bench.leave(*[lost] * 60)
        bench.delivered()
    assert bench.counts["drop_no_peer"] == 300
    assert 100 <= bench.counts["icmp_sent"] < 250
    assert bench.counts["icmp_sent"] + bench.counts["icmp_limited"] == 300


@pytest.mark.parametrize("code", [errno.ENETUNREACH, errno.ENOBUFS, errno.EPERM])
def test_a_refused_datagram_is_counted_by_its_reason(bench: Bench, code: int) -> None:
    bench.wire.alone = bench.wire.together = code
    bench.leave(OUT, OUT)
    assert bench.counts == {f"drop_send_{errno.errorcode[code].lower()}": 2}


def test_the_outer_header_has_the_inner_marks(bench: Bench) -> None:
    bench.leave(OUT, Packet(source="10.5.1.7", destination="10.5.2.9", tos=0xBA))
    (_plain, none, target), (_marked, mark, _target) = bench.wire.sent
    assert none == []
    assert mark == [(socket.IPPROTO_IP, socket.IP_TOS, (0xBA).to_bytes(4, "little"))]
    assert target == ("192.0.2.2", 8285)


def test_a_mark_that_came_on_the_way_reaches_the_packet(bench: Bench) -> None:
    tos = [(socket.IPPROTO_IP, socket.IP_TOS, b"\x03")]
    peer = ("192.0.2.2", 8285)
    bench.wire.arrived = [(Packet(tos=2).bytes(), tos, 0, peer), (Packet().bytes(), tos, 0, peer)]
    bench.forwarder.receive()
    assert bench.delivered() == [bytes(10) + Packet(tos=3).bytes()]
    assert bench.counts["drop_congestion"] == 1


def test_an_older_kernel_loses_one_train_and_then_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux < 6.2 takes no segmented UDP from a TUN."""
    write = os.writev

    def old(descriptor: int, parts: list[Any]) -> int:
        if parts[0][1] == 5:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, parts)

    monkeypatch.setattr(os, "writev", old)
    one, two = (Packet(protocol=17, identity=number).bytes() for number in (1, 2))
    segment = [(17, 104, len(one).to_bytes(4, "little"))]
    for arrives in (0, 2, 2):
        bench.wire.arrived = [(one + two, segment, 0, ("192.0.2.2", 8285))]
        bench.forwarder.receive()
        assert len(bench.delivered()) == arrives
    assert bench.counts["drop_write_einval"] == 2
    tcp = [Packet(sequence=1000 + 100 * number, identity=number).bytes() for number in (1, 2)]
    bench.wire.arrived = [
        (b"".join(tcp), [(17, 104, len(tcp[0]).to_bytes(4, "little"))], 0, ("192.0.2.2", 8285))
    ]
    bench.forwarder.receive()
    assert len(bench.delivered()) == 1, "TCP is merged all the same"


def test_a_deleted_device_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_descriptor: int, _parts: object) -> int:
        raise OSError(errno.EBADFD, "File descriptor in bad state")

    monkeypatch.setattr(os, "readv", gone)
    with pytest.raises(TunnelLostError, match="flannel0 is gone"):
        bench.forwarder.send()
    assert not bench.forwarder.has_device()
