"""The real daemon, which kills itself after the n-th change that it asks the kernel for.

    python -m tests.netns.mortal_daemon N FLAGS...

Every change is a send of its own, and the kernel has carried it out when SIGKILL strikes.
"""

import os
import signal
import sys
from collections.abc import Sequence

from flannelpy.__main__ import main
from flannelpy.kernel import netlink
from flannelpy.kernel.codec import Message

_KINDS = 4
"""rtnetlink numbers each kind of object's requests in fours: new, delete, get, set."""
_GET = 2


def run(changes: int) -> int:
    send = netlink.NetlinkSocket._send
    left = changes

    def send_and_die(self: netlink.NetlinkSocket, messages: Sequence[Message], *, ack_all: bool) -> int:
        nonlocal left
        sequence = send(self, messages, ack_all=ack_all)
        left -= sum(message.type % _KINDS != _GET for message in messages)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return sequence

    netlink.BATCH = 1
    netlink.NetlinkSocket._send = send_and_die  # type: ignore[method-assign]
    return main()


if __name__ == "__main__":
    sys.exit(run(int(sys.argv.pop(1))))
