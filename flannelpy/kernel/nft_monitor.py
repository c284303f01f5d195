"""What nf_tables announces about rules that concern us: iptables-nft's changes are announced there, too.

A busy host changes its rules all day. So a datagram is first searched for a few names, as bytes; only what
has one of them is taken apart, and becomes a cause for a look. Every transaction ends with a message that
says which process made it: that is who the log names.
"""

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncGenerator

from flannelpy.kernel import codec, nft_codec, peer_filter
from flannelpy.kernel.netlink import enlarge_receive_buffer
from flannelpy.kernel.nfnetlink import NETLINK_NETFILTER

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7
_READS = 500
"""Datagrams taken before other tasks get their turn."""

_NAMES = (
    b"flannel-ipv",
    b"FLANNEL-",
    b"flanneld ",
    b"DOCKER-USER\0",
    nft_codec.HOOK_MARK,  # a chain that may drop what we accept
    *(
        codec.attr(kind, name)
        for kind in (nft_codec.RULE_CHAIN, nft_codec.CHAIN_NAME)
        for name in (b"FORWARD\0", b"POSTROUTING\0")
    ),
)
"""In each message that may matter; a chain such as KUBE-FORWARD does not."""

_PEER_FILTER = nft_codec.text_attr(nft_codec.CHAIN_TABLE, peer_filter.TABLE)
"""In the peer filter's messages: that table is another one's to keep, and has a hook, too."""

_OBJECT = {0: "table", 3: "chain", 6: "rule", 9: "set", 12: "set element"}


class NftMonitor:
    """A socket in the multicast group of nf_tables. Messages of `port`, our own socket, are no news."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setblocking(False)
        enlarge_receive_buffer(self._socket)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        self._seen = ""
        """What was announced of a transaction whose end is still to come."""

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    async def causes(self) -> AsyncGenerator[str, None]:
        """One line for each time that something of interest was changed, for ever."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        loop.add_reader(self._socket, arrived.set)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                cause = self._read()
                if cause:
                    yield cause
        finally:
            loop.remove_reader(self._socket)

    def _read(self) -> str:
        cause = ""
        for _number in range(_READS):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                cause = cause or "notifications were lost"
                continue
            cause = self.take(data) or cause
        return cause

    def take(self, data: bytes) -> str:
        """One datagram: the cause, when a transaction of interest is complete; else ""."""
        cause = ""
        if not self._seen and not any(name in data for name in _NAMES):
            return ""
        offset = 0
        while head := codec.read_header(data, offset):
            length, kind, _flags, _sequence = head
            body = data[offset + 16 : offset + length]
            port = int.from_bytes(data[offset + 12 : offset + 16], sys.byteorder)
            if kind == nft_codec.NEWGEN:
                if self._seen:
                    _generation, pid, name = nft_codec.read_generation(body)
                    cause = f"{self._seen} by {name or 'somebody'}{f' (process {pid})' if pid else ''}"
                self._seen = ""
            elif port != self._port and not self._seen and _concerns_us(body):
                self._seen = _words(kind, body)
            offset += (length + 3) & ~3
        return cause


def _concerns_us(body: bytes) -> bool:
    return _PEER_FILTER not in body and any(name in body for name in _NAMES)


def _words(kind: int, body: bytes) -> str:
    """What happened to which object, for the log."""
    number = kind & 0xFF
    removed = number % 3 == 2
    what = _OBJECT.get(number - 2 if removed else number, "object")
    found = codec.attributes(body, 4)
    family = nft_codec.FAMILY_WORD.get(body[0] if body else 0, "?")
    names = [family]
    wanted = {"table": (1,), "chain": (1, 3)}.get(what, (1, 2))
    for attribute in wanted:
        name = found.get(attribute, b"").partition(b"\0")[0].decode("ascii", "replace")
        names.append(name[:40] if name.isprintable() else "?")
    inside = "" if what in ("table", "chain") else "in "
    return f"{what} {inside}{' '.join(names)} was {'removed' if removed else 'changed'}"
