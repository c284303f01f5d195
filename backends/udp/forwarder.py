"""The loop that carries packets: TUN -> UDP socket and back, in batches, with nothing in between.

No event loop, no thread, no lock: `poll` says which side has something, each side then takes up to a batch,
and the control connections get their turn in between, however busy the others are.
"""

import errno
import fcntl
import os
import socket
import struct
import time
from collections import Counter

from flannelpy.backends.udp.inbound import MERGEABLE, PLAIN, VIRTIO_BYTES, Write, sort_in
from flannelpy.backends.udp.outbound import MAX_SEGMENTS, Departure, group
from flannelpy.backends.udp.packet import TCP, TOO_BIG, UNREACHABLE, icmp_error
from flannelpy.backends.udp.table import Table
from flannelpy.model.kernel import Tunnel

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_SO_MEMINFO, _DROPS = 55, 8
"""The ninth number of SO_MEMINFO (linux/sock_diag.h): datagrams that found the receive buffer full."""
_TUNGETIFF, _IFREQ = 0x800454D2, 40
_PACKETS, _MESSAGES = 64, 16
"""Taken from the TUN and from the socket before the other gets its turn; a message may be 64 datagrams."""
_SLOT = VIRTIO_BYTES + 65535
_INT, _SHORT = struct.Struct("@i"), struct.Struct("@H")
_ANCILLARY = 2 * socket.CMSG_SPACE(_INT.size)
_ERRORS_A_SECOND = 100.0
"""ICMP errors that are sent, as many at once."""
_NEVER_TOGETHER = frozenset((errno.EIO, errno.EOPNOTSUPP))
"""UDP_SEGMENT is refused for good: a device without checksum offload, on older kernels."""
_NOT_TOGETHER = _NEVER_TOGETHER | {errno.EINVAL, errno.EMSGSIZE}
"""... or for these packets: larger than the path's MTU."""


class TunnelLostError(Exception):
    """The device is gone: somebody deleted it."""


class Forwarder:
    """One tunnel: its two descriptors, its table, what it has counted."""

    def __init__(
        self, tunnel: Tunnel, tun: int, sock: socket.socket, table: Table, counts: Counter[str]
    ) -> None:
        self.tunnel = tunnel
        self.tun = tun
        self.socket = sock
        self.table = table
        self.counts = counts
        self._slots = [memoryview(bytearray(_SLOT)) for _ in range(_PACKETS)]
        self._mark = (socket.IPPROTO_IP, socket.IP_TOS)
        if sock.family == socket.AF_INET6:
            self._mark = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
        self._segments = MAX_SEGMENTS
        self._merge = MERGEABLE
        self._credit = _ERRORS_A_SECOND
        self._credit_at = time.monotonic()
        self._probe()

    def _probe(self) -> None:
        """Find out what the socket can do; what it cannot is lived without."""
        try:
            self.socket.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError:
            self.counts["without_udp_gro"] = 1  # Linux < 5.0
        try:
            self.socket.setsockopt(_SOL_UDP, _UDP_SEGMENT, 0)
        except OSError:
            self._segments = 1  # Linux < 4.18
            self.counts["without_udp_segment"] = 1

    def has_device(self) -> bool:
        """Whether the descriptor still belongs to a device, under the tunnel's name."""
        request = bytearray(_IFREQ)
        try:
            fcntl.ioctl(self.tun, _TUNGETIFF, request)
        except OSError:
            return False
        return request[:16].rstrip(b"\0") == self.tunnel.device.encode()

    def overflows(self) -> int:
        """Datagrams that found the socket's receive buffer full."""
        numbers = self.socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, (_DROPS + 1) * 4)
        return int(struct.unpack_from("=I", numbers, _DROPS * 4)[0]) if len(numbers) > _DROPS * 4 else 0

    # --- TUN -> wire -------------------------------------------------------------------------------------

    def send(self) -> None:
        """Take a batch of packets from the TUN and send it."""
        packets: list[memoryview] = []
        read, tun, take = os.readv, self.tun, packets.append
        try:
            for slot in self._slots:
                take(slot[VIRTIO_BYTES : read(tun, (slot,))])
        except BlockingIOError:
            pass
        except OSError as error:
            raise TunnelLostError(f"{self.tunnel.device} is gone: {error.strerror}") from None
        departures, unreachable = group(packets, self.table, self._segments)
        for departure in departures:
            self._depart(departure)
        for packet in unreachable:
            self.counts["drop_no_peer"] += 1
            self._answer(packet, UNREACHABLE)

    def _depart(self, departure: Departure) -> None:
        packets, target, tos = departure
        ancillary = [(*self._mark, _INT.pack(tos))] if tos else []
        try:
            if len(packets) > 1:
                segment = (_SOL_UDP, _UDP_SEGMENT, _SHORT.pack(len(packets[0])))
                sent = self.socket.sendmsg(packets, [segment, *ancillary], 0, target)
            else:
                sent = self.socket.sendmsg(packets, ancillary, 0, target)
        except OSError as error:
            self._refused(departure, error)
            return
        self.counts["sent_packets"] += len(packets)
        self.counts["sent_bytes"] += sent

    def _refused(self, departure: Departure, error: OSError) -> None:
        """Send what could not go together one by one: then the kernel may fragment it."""
        packets, target, tos = departure
        if len(packets) > 1 and error.errno in _NOT_TOGETHER:
            if error.errno in _NEVER_TOGETHER:
                self._segments = 1
            self.counts["sent_singly"] += len(packets)
            for packet in packets:
                self._depart(Departure([packet], target, tos))
            return
        if error.errno == errno.EMSGSIZE:
            self.counts["drop_too_big"] += len(packets)
            self._answer(packets[0], TOO_BIG)
            return
        self.counts[f"drop_send_{errno.errorcode.get(error.errno or 0, 'error').lower()}"] += len(packets)

    def _answer(self, packet: memoryview, meaning: str) -> None:
        """Tell the sender of a packet by ICMP, at a bounded rate."""
        width = 16 if len(packet) and packet[0] >> 4 == 6 else 4
        source = next((address for address in self.tunnel.sources if len(address) == width), None)
        if source is None or len(packet) < 20:
            return
        error = icmp_error(packet, source, meaning, self.tunnel.mtu)
        if error is None:
            return
        now = time.monotonic()
        self._credit = min(_ERRORS_A_SECOND, self._credit + (now - self._credit_at) * _ERRORS_A_SECOND)
        self._credit_at = now
        if self._credit < 1:
            self.counts["icmp_limited"] += 1
            return
        self._credit -= 1
        self.counts["icmp_sent"] += 1
        self._write([PLAIN, error])

    # --- wire -> TUN -------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Take batches of datagrams from the socket and write what is let in."""
        receive, counts, table = self.socket.recvmsg, self.counts, self.table
        check = not self.tunnel.open
        try:
            for _ in range(_MESSAGES):
                data, ancillary, _flags, source = receive(65535, _ANCILLARY, socket.MSG_DONTWAIT)
                segment, tos = len(data), 0
                for level, kind, value in ancillary:
                    if level == _SOL_UDP and kind == _UDP_GRO:
                        segment = _INT.unpack(value)[0]
                    elif (level, kind) == self._mark:
                        tos = value[0] if len(value) == 1 else _INT.unpack(value)[0]
                spans = table.sender(source[0]) if check else None
                if check and spans is None:
                    counts["drop_stranger"] += -(-len(data) // segment) if segment else 1
                    continue
                for write in sort_in(data, segment, spans, tos, counts, self._merge):
                    self._write(write)
        except BlockingIOError:
            pass

    def _write(self, parts: Write) -> None:
        packets = max(1, len(parts) - 2)
        try:
            written = os.writev(self.tun, parts)
        except OSError as error:
            if error.errno == errno.EBADFD:
                raise TunnelLostError(f"{self.tunnel.device} is gone") from None
            if packets > 1 and error.errno == errno.EINVAL:
                # Linux < 6.2 knows no segmented UDP: this train is lost, and the last one.
                self._merge = frozenset({TCP}) & self._merge if TCP in self._merge else frozenset()
            self.counts[f"drop_write_{errno.errorcode.get(error.errno or 0, 'error').lower()}"] += packets
            return
        self.counts["received_packets"] += packets
        self.counts["received_bytes"] += written
