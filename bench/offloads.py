"""Which offloads a device has, by the ioctl that `ethtool -K` uses (linux/ethtool.h). Needs CAP_NET_ADMIN."""

import ctypes
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _SFEATURES = 0x1B, 0x37, 0x3B
_FEATURES, _NAME = 4, 32
PLAIN_NIC = {
    "tx-tcp-segmentation": False,
    "tx-tcp-ecn-segmentation": False,
    "tx-tcp6-segmentation": False,
    "tx-udp-segmentation": False,
    "tx-generic-segmentation": False,
    "rx-gro": True,
}
"""What makes a veth pair a wire of 1500-byte frames: nothing larger leaves, and what arrives is merged."""


def set_features(device: str, wanted: dict[str, bool]) -> None:
    """Switch features of a device of this thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _FEATURES, 0)
        count = struct.unpack("=IIQI", _ask(sock, device, asked))[3]
        table = _ask(sock, device, struct.pack("=III", _GSTRINGS, _FEATURES, count) + bytes(_NAME * count))
        names = [table[12 + n * _NAME :][:_NAME].split(b"\0")[0].decode() for n in range(count)]
        blocks = (count + 31) // 32
        masks = [[0, 0] for _ in range(blocks)]
        for name, on in wanted.items():
            place = names.index(name)
            masks[place // 32][0] |= 1 << place % 32
            masks[place // 32][1] |= on << place % 32
        request = struct.pack("=II", _SFEATURES, blocks)
        _ask(sock, device, request + b"".join(struct.pack("=II", *mask) for mask in masks))


def _ask(sock: socket.socket, device: str, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("@16sP16x", device.encode(), ctypes.addressof(buffer)))
    return buffer.raw
