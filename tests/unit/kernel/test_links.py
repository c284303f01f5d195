"""What a user is told when a device cannot be made."""

import errno

import pytest

from flannelpy.kernel.links import Links
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.model.address import parse_mac, parse_v4
from flannelpy.model.kernel import Link, Vxlan
from flannelpy.model.plan import Put

LINK = Link(
    "flannel.1", "vxlan", parse_mac("02:00:00:00:00:01"), 1450, True, Vxlan(1, None, parse_v4("192.0.2.1"), 0)
)


class RefusingSocket(NetlinkSocket):
    """Answers every request with one errno, as a kernel without the module does; there are no links."""

    def __init__(self, code: int) -> None:
        self.code = code

    def request(self, message: object) -> list[bytes]:
        raise NetlinkError(self.code)

    def dump(self, message: object) -> list[bytes]:
        return []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EOPNOTSUPP, "this kernel has no vxlan: load it (modprobe vxlan)"),
        (errno.EOPNOTSUPP, "by udp, which needs only TUN (Backend.Type: udp)"),
        (errno.EPERM, "run as root or with CAP_NET_ADMIN"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_the_reason_is_said_with_its_remedy(code: int, words: str) -> None:
    (failure,) = Links(RefusingSocket(code)).apply(Put(LINK), LINK)
    assert words in str(failure)
    assert "add device flannel.1" in str(failure)
