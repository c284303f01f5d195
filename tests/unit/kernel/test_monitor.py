"""What a message about a link means, held against what is known of the link and what it is by now."""

import pytest

from flannelpy.kernel import codec
from flannelpy.kernel.monitor import View, read
from flannelpy.kernel.replies import LinkInfo
from flannelpy.model.kernel import Scope, Shaken

OURS = LinkInfo(7, "flannel.1", b"\x02\0\0\0\0\x01", 1450, True, True, "vxlan", b"")


def message(link: LinkInfo) -> bytes:
    flags = codec.IFF_UP * link.up | codec.IFF_LOWER_UP * link.running
    return (
        codec.IFINFO.pack(0, 1, link.ifindex, flags, 0)
        + codec.attr(codec.IFLA_IFNAME, link.name.encode() + b"\0")
        + codec.attr(codec.IFLA_ADDRESS, link.mac)
        + codec.attr(codec.IFLA_MTU, link.mtu.to_bytes(4, "little"))
    )


@pytest.mark.parametrize(
    ("told", "now", "cause"),
    [
        (OURS, OURS, None),
        (OURS._replace(mtu=1300), OURS, None),
        (OURS._replace(up=False, running=False), OURS._replace(up=False), "the state of device flannel.1"),
        (OURS._replace(up=False, running=False), OURS, "device flannel.1 was down for a moment"),
        (OURS._replace(running=False), OURS, "device flannel.1 was down for a moment"),
        (OURS, OURS._replace(mac=b"\x02\0\0\0\0\x09"), "the MAC of device flannel.1 changed"),
        (OURS, None, "device flannel.1 was deleted"),
        (OURS._replace(ifindex=9, name="eth9"), OURS, None),
    ],
    ids=["as known", "over", "down", "down and up", "carrier", "MAC", "deleted", "not ours"],
)
def test_what_happened_to_a_link(told: LinkInfo, now: LinkInfo | None, cause: str | None) -> None:
    def never(_argument: object) -> bool:
        raise AssertionError

    uplink = LinkInfo(2, "eth0", b"\x02\0\0\0\0\x07", 1500, True, True, "", b"")
    view = View(
        Scope(frozenset(["flannel.1"]), (), uplink="eth0"),
        {7: "flannel.1"},
        {7: OURS, 2: uplink},
        lambda _index: now,
        never,
        never,  # type: ignore[arg-type]
    )
    notice = read(view, codec.RTM_NEWLINK, message(told))
    if cause is None:
        assert notice is None
    else:
        assert isinstance(notice, Shaken)
        assert notice.cause.startswith(cause)
