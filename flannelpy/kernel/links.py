"""Devices: read them, make them, change them, remove them."""

import errno
from collections.abc import Iterable
from typing import NamedTuple

from flannelpy.kernel import codec, replies, sysctl, tun
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.kernel.replies import LinkInfo
from flannelpy.model.kernel import Link
from flannelpy.model.plan import Op, Remove

GONE = frozenset((errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL))
"""What "remove" answers when there is nothing to remove: that is success."""


class Failure(NamedTuple):
    """An operation that the kernel refused."""

    op: Op
    error: OSError

    def __str__(self) -> str:
        return f"{self.op}: {self.error.strerror} ({errno.errorcode.get(self.error.errno or 0, '?')})"


class Links:
    """The links of this host as last read."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self.by_name: dict[str, LinkInfo] = {}
        """As last observed: what is announced is compared with it."""

    def read(self) -> dict[str, LinkInfo]:
        """All of them as they are now, by name, in the kernel's order. For a question: not remembered.

        If it were, a change that is still to be announced would be no news, and nobody would mend it.
        """
        found = (replies.read_link(body) for body in self._netlink.dump(codec.link_dump()))
        return {link.name: link for link in found}

    def observe(self) -> dict[str, LinkInfo]:
        """The same, remembered: for a pass, which compares everything."""
        self.by_name = self.read()
        return self.by_name

    def _remember(self, name: str) -> None:
        """One that we have changed or removed. Of the others there may still be something to hear."""
        info = self.read().get(name)
        index = info.ifindex if info else 0
        self.by_name = {
            known: link for known, link in self.by_name.items() if known != name and link.ifindex != index
        }
        if info is not None:
            self.by_name[name] = info

    def now(self, ifindex: int) -> LinkInfo | None:
        """One link as it is at this moment, not remembered; None if there is none of that index."""
        try:
            return replies.read_link(self._netlink.request(codec.link_get(ifindex))[0])
        except (NetlinkError, IndexError):
            return None

    def index(self, name: str) -> int:
        """The index of a device; NetlinkError (ENODEV) if there is none of that name."""
        link = self.by_name.get(name)
        if link is None:
            raise NetlinkError(errno.ENODEV, f"there is no device {name}")
        return link.ifindex

    def apply(self, op: Op, link: Link) -> list[Failure]:
        """Put or remove a device; the failure, if any."""
        try:
            if isinstance(op, Remove):
                self._remove(link.name)
            elif op.was is None:
                self._create(link)
            else:
                self._change(link)
        except NetlinkError as error:
            if isinstance(op, Remove) and error.errno in GONE:
                return []
            return [Failure(op, error)]
        finally:
            self._remember(link.name)
        return []

    def _create(self, link: Link) -> None:
        if link.kind == "tun":
            self._create_tun(link)
            return
        uplink = link.vxlan.uplink if link.vxlan else None
        try:
            self._netlink.request(codec.link_create(link, self.index(uplink) if uplink else 0))
        except NetlinkError as error:
            renamed = self._renamed(link) if error.errno == errno.EEXIST else None
            if renamed is not None:
                # Ours under another name: it gets its name back, and what else was changed of it.
                self._netlink.request(codec.link_rename(renamed.ifindex, link.name))
                self._remember(link.name)
                self._change(link)
                return
            raise _creation_error(link, error, self.read().values()) from error
        self._remember(link.name)
        index = self.index(link.name)
        if link.vxlan is not None:
            self._quieten(index, link.name)
        if link.up:
            self._netlink.request(codec.link_change(index, up=True))

    def _create_tun(self, link: Link) -> None:
        tun.create_tun(link.name)
        self._remember(link.name)
        index = self.index(link.name)
        self._quieten(index, link.name)
        self._netlink.request(codec.link_change(index, mtu=link.mtu, queue=tun.QUEUE))
        if link.up:
            self._netlink.request(codec.link_change(index, up=True))

    def _renamed(self, link: Link) -> LinkInfo | None:
        """Our device under a name that somebody gave it: nobody else's has our MAC and our VNI."""
        for info in self.read().values():
            if info.kind == link.kind and info.mac == link.mac and link.vxlan is not None:
                found = replies.read_vxlan(info.vxlan, {})
                if (found.vni, found.local) == (link.vxlan.vni, link.vxlan.local):
                    return info
        return None

    def _quieten(self, index: int, name: str) -> None:
        """No link-local address and no router advertisements on a tunnel device."""
        try:
            self._netlink.request(codec.link_no_link_local(index))
        except NetlinkError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
                raise  # those say that IPv6 is off, which is quiet enough
        sysctl.write_quietly(f"net/ipv6/conf/{name}/accept_ra", "0")

    def _change(self, link: Link) -> None:
        found = self.by_name[link.name]
        if link.up and not found.up:
            self._quieten(found.ifindex, link.name)  # who made it may have crashed before that
        self._netlink.request(
            codec.link_change(
                found.ifindex,
                mac=link.mac if link.mac != found.mac else None,
                mtu=link.mtu if link.mtu != found.mtu else None,
                up=link.up if link.up != found.up else None,
            )
        )

    def _remove(self, name: str) -> None:
        index = self.index(name)
        self._netlink.request(codec.link_delete(index))


def link_of(info: LinkInfo, names: dict[int, str]) -> Link:
    """What the kernel reports, as the model has it."""
    vxlan = replies.read_vxlan(info.vxlan, names) if info.kind == "vxlan" else None
    return Link(info.name, info.kind, info.mac, info.mtu, info.up, vxlan)


def _creation_error(link: Link, error: NetlinkError, links: Iterable[LinkInfo]) -> NetlinkError:
    """The kernel's refusal to make a VXLAN device, with what it means."""
    if error.errno == errno.EOPNOTSUPP:
        return NetlinkError(
            error.errno,
            "this kernel has no vxlan: load it (modprobe vxlan), install the distribution's extra kernel"
            " modules package, or carry the whole network by udp, which needs only TUN (Backend.Type: udp)",
        )
    if error.errno == errno.EPERM:
        return NetlinkError(error.errno, "not permitted: run as root or with CAP_NET_ADMIN")
    if error.errno == errno.EEXIST and link.vxlan is not None:
        vni = link.vxlan.vni
        for other in links:
            if other.kind != "vxlan":
                continue
            found = replies.read_vxlan(other.vxlan, {})
            families = [len(address or b"") for address in (found.local, link.vxlan.local)]
            same_port = link.vxlan.port in (0, found.port)
            if found.vni == vni and same_port and (0 in families or families[0] == families[1]):
                return NetlinkError(
                    error.errno,
                    f"device {other.name} holds VNI {vni} on this port already: remove it"
                    f" (ip link delete {other.name}) or set another VNI in the network config",
                )
    return error
