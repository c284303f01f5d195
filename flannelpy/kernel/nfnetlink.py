"""The netlink socket of netfilter: transactions that are done as a whole or not at all."""

import errno
import socket

from flannelpy.kernel import codec, nft_codec, replies
from flannelpy.kernel.codec import Message
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket

NETLINK_NETFILTER = 12
_SO_SNDBUFFORCE = 32
_SEND_BUFFER = 8 << 20
"""A transaction is one datagram: 20,000 peers in a set are half a megabyte."""
_TO_SUBSYSTEM = b"\0\0" + nft_codec.SUBSYSTEM.to_bytes(2)
"""nfgenmsg of a batch's begin and end: the subsystem that it is for."""


class NetfilterSocket(NetlinkSocket):
    """Requests, dumps and transactions of nf_tables. For one task at a time."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def generation(self) -> int:
        """The number of the rule set as it is now."""
        bodies = self.request(nft_codec.generation_get())
        return nft_codec.read_generation(bodies[0])[0] if bodies else 0

    def transact(self, messages: list[Message], generation: int = 0) -> None:
        """All of it or nothing; NetlinkError of the first that is refused.

        With `generation`: ERESTART, and nothing done, if anybody has changed anything since that number.
        """
        condition = codec.attr(1, generation.to_bytes(4)) if generation else b""
        *rest, last = messages
        batch = [
            Message(nft_codec.BATCH_BEGIN, 0, _TO_SUBSYSTEM + condition),
            *rest,
            last._replace(flags=last.flags | codec.NLM_F_ACK),
            Message(nft_codec.BATCH_END, 0, _TO_SUBSYSTEM),
        ]
        end = self._send(batch, ack_all=False)
        begin, final = end - len(batch) + 1, end - 1
        first_error: NetlinkError | None = None
        for kind, _flags, sequence, body in self._answers():
            if kind != codec.NLMSG_ERROR or not begin <= sequence <= end:
                continue
            code, words = replies.read_error(body)
            if code and first_error is None:
                first_error = NetlinkError(code, words)
            # A batch that cannot begin gets no other answer than that.
            if sequence in (begin, final) or code == errno.ERESTART:
                break
        if first_error is not None:
            raise first_error
