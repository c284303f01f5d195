"""TUN devices and the UDP sockets that go with them: made here, used by a forwarder process.

Sources: linux/if_tun.h, Documentation/networking/tuntap.rst, udp(7), ip(7).
"""

import errno
import fcntl
import os
import socket
import struct

from flannelpy.kernel.netlink import NetlinkError
from flannelpy.model.address import format_address
from flannelpy.model.kernel import Tunnel

QUEUE = 1000
"""Packets that wait for the forwarder before the kernel drops (the default, 500, is 2 ms of full speed)."""
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOFFLOAD = 0x400454CA, 0x400454CB, 0x400454D0
_TUNGETIFF, _TUNSETVNETHDRSZ = 0x800454D2, 0x400454D8
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_VIRTIO_HEADER = 10
_IFREQ = struct.Struct("@16sH22x")
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT = 10, 23, 0
_IPV6_RECVTCLASS = 66
_BUFFER = 8 << 20
"""Bytes that wait in the socket: some 20 ms at full speed. rmem_max does not bind us (SO_RCVBUFFORCE)."""


def open_tun(name: str) -> int:
    """A non-blocking descriptor of the TUN device of that name, which is made if there is none.

    Packets are read finished, but may be written to be segmented: a virtio header precedes each.
    """
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NetlinkError(
            error.errno or errno.ENODEV,
            f"cannot open /dev/net/tun ({error.strerror}): load the module (modprobe tun), or give the"
            " container the device (--device /dev/net/tun)",
        ) from error
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tun, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(tun, _TUNSETVNETHDRSZ, struct.pack("@i", _VIRTIO_HEADER))
        fcntl.ioctl(tun, _TUNSETOFFLOAD, 0)
    except OSError as error:
        os.close(tun)
        raise _tun_error(name, error) from error
    return tun


def create_tun(name: str) -> None:
    """Make a TUN device that stays until it is deleted, whoever has it open."""
    tun = open_tun(name)
    try:
        fcntl.ioctl(tun, _TUNSETPERSIST, 1)
    except OSError as error:
        raise _tun_error(name, error) from error
    finally:
        os.close(tun)


def is_tun(descriptor: int, name: str) -> bool:
    """Whether the descriptor belongs to an existing device of that name."""
    try:
        found = fcntl.ioctl(descriptor, _TUNGETIFF, bytes(_IFREQ.size))
    except OSError:
        return False
    return found[:16].rstrip(b"\0") == name.encode()


def open_socket(tunnel: Tunnel) -> socket.socket:
    """The UDP socket of a tunnel: large buffers, DF clear (the path may be narrower than the uplink)."""
    family = socket.AF_INET if len(tunnel.local) == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        for option in (_SO_RCVBUFFORCE, _SO_SNDBUFFORCE):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
        sock.bind((format_address(tunnel.local), tunnel.port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise NetlinkError(
                errno.EADDRINUSE,
                f"UDP port {tunnel.port} of {format_address(tunnel.local)} is taken: stop what uses it"
                f" (ss -lunp 'sport = {tunnel.port}'; a flanneld?) or set another Backend.Port on all nodes",
            ) from error
        raise
    return sock


def _tun_error(name: str, error: OSError) -> NetlinkError:
    if error.errno == errno.EBUSY:
        return NetlinkError(errno.EBUSY, f"another process has {name} open: stop it (a flanneld?)")
    if error.errno == errno.EINVAL:
        return NetlinkError(errno.EINVAL, f"there is a {name} that is no TUN device: ip link delete {name}")
    if error.errno == errno.EPERM:
        return NetlinkError(errno.EPERM, "not permitted: run as root or with CAP_NET_ADMIN")
    return NetlinkError(error.errno or errno.EIO, f"cannot open {name}: {error.strerror}")
