"""A network card that makes outer checksums, and leaves those inside of VXLAN as the kernel left them."""

import select
import socket
import struct
import sys
from collections.abc import Callable

from flannelpy.cli.lab import Lab, Node
from flannelpy.cli.processes import stop, wait_until
from flannelpy.model.packet import checksum
from tests.netns.nodes import log_of

_PACKET_IGNORE_OUTGOING = 23
_ALL = 3
"""ETH_P_ALL."""


def put_into(lab: Lab, node: Node) -> Callable[[], None]:
    """From now on the cable of the node goes through a process that is such a card; the way back."""
    name = node.name
    lab.ip(node.netns, "link set eth0 gso_max_segs 1 gso_max_size 1500")
    lab.ip(lab.underlay, f"link set {name} nomaster", "link add card0 type veth peer name card1")
    lab.ip(lab.underlay, "link set card1 master lan up", "link set card0 up")
    card = lab.start("card", lab.underlay, [sys.executable, "-m", "tests.netns.bad_card", name, "card0"])
    wait_until(lambda: "ready" in log_of(card), "the card")

    def take_out() -> None:
        stop([card])
        lab.ip(lab.underlay, "link del card0", f"link set {name} master lan")

    return take_out


def finished(frame: bytes) -> bytes:
    """The frame with the checksum of its UDP or TCP header, if it has one."""
    if frame[12:14] != b"\x08\0" or frame[23] not in (6, 17):
        return frame
    head = (frame[14] & 15) * 4 + 14
    end = 14 + int.from_bytes(frame[16:18])
    at = head + (16 if frame[23] == 6 else 6)
    body = frame[head:at] + b"\0\0" + frame[at + 2 : end]
    pseudo = frame[26:34] + struct.pack("!BBH", 0, frame[23], end - head)
    return frame[:at] + (checksum(pseudo + body) or 0xFFFF).to_bytes(2) + frame[at + 2 :]


def carry(names: list[str]) -> None:
    """Frames between the two devices, for ever."""
    ends = []
    for name in names:
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        one.bind((name, _ALL))
        one.setsockopt(263, _PACKET_IGNORE_OUTGOING, 1)
        ends.append(one)
    print("ready", flush=True)
    while True:
        for one in select.select(ends, [], [])[0]:
            frame = one.recv(65535)
            try:
                ends[1 - ends.index(one)].send(finished(frame))
            except OSError as error:
                print(error, len(frame), flush=True)


if __name__ == "__main__":
    carry(sys.argv[1:])
