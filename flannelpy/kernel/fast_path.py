"""The fast path of a udp tunnel: two eBPF programs at tc hooks, from the table that the forwarder has, too.

`encap` hangs on the egress of the TUN device, `decap` on the ingress of the uplink; what they do is said in
backends/udp/fast.bpf.c. Filters belong to their devices: they and their maps outlive the daemon without a pin
or a path in a file system, so two networks or network namespaces share nothing. The next daemon makes new
maps, fills them, and replaces each filter in one step. Filters of others run as their priorities say.

What is missing here (an old kernel, no CAP_BPF, no object file) costs speed only.
"""

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from flannelpy import backends
from flannelpy.kernel import bpf, codec
from flannelpy.kernel.bpf import Map, MapKind
from flannelpy.kernel.codec import Message, route_get
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.kernel.replies import read_link, read_route
from flannelpy.model.address import Prefix
from flannelpy.model.kernel import Forward, Tunnel

log = logging.getLogger(__name__)

OBJECT = Path(backends.__path__[0]) / "udp" / "fast.o"
_SETTINGS = struct.Struct("=II4sHH")
"""struct settings: uplink, device, local address, port in network order, the largest inner packet."""
_PEER = struct.Struct("=4sI")
_KINDS = {
    "config": MapKind(bpf.ARRAY, 4, _SETTINGS.size, 1),
    "peers": MapKind(bpf.LPM_TRIE, 8, _PEER.size, 1 << 16),
    "counts": MapKind(bpf.PERCPU_ARRAY, 4, 8, 5),
}
_COUNTS = ("sent_packets", "sent_bytes", "received_packets", "received_bytes", "drop_no_room")
GRACE = 60.0
"""Seconds for which datagrams are still taken in after the lease says that there is no fast path any more."""
_NAME = "flannelpy-udp"
_PRIORITY = 0x4650
_EGRESS, _INGRESS = 0xFFFFFFF3, 0xFFFFFFF2
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
_TCMSG = struct.Struct("=BxHiIII")
_RTM_NEWQDISC, _RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 36, 44, 45, 46
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 1, 2, 6, 7, 8
_DIRECT_ACTION = 1
_ETH_P_ALL = 0x0003


class FastPath:
    """The programs of one namespace's tunnel, loaded when they are first asked for."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self.entries: dict[Prefix, Forward] = {}
        """What the map of peers holds: nobody else has it."""
        self._maps: dict[str, Map] = {}
        self._programs: dict[str, int] = {}
        self._index = 0
        """The uplink's."""
        self._told: Tunnel | None = None
        self._indices = (0, 0)
        self._refused: tuple[Tunnel, str] | None = None
        self._ending: dict[str, asyncio.TimerHandle] = {}

    def close(self) -> None:
        """Give the descriptors back; what is attached goes on."""
        for handle in self._ending.values():
            handle.cancel()
        for fd in self._programs.values():
            os.close(fd)
        for one in self._maps.values():
            one.close()
        self._programs, self._maps, self.entries, self._ending = {}, {}, {}, {}

    def why_not(self, uplink: str) -> str:
        """Try whether there can be a fast path over an uplink; empty if so, else what stands in its way."""
        try:
            self._load()
            index = self._index = self._device(uplink)
            if not self._is_attached(index, _INGRESS):
                self._attach(index, _INGRESS, "decap")  # its settings are empty: it takes nothing yet
        except (OSError, ValueError) as error:
            self.close()
            return _words(error)
        return ""

    @property
    def has_table(self) -> bool:
        """Whether there is a table to be filled, in this process."""
        return bool(self._maps)

    def carries(self, tunnel: Tunnel) -> bool:
        """Whether the filters of a tunnel are where they should be (or cannot be there, as was said)."""
        if not tunnel.fast or (self._refused is not None and self._refused[0] == tunnel):
            return True
        if self._told != tunnel:
            return False
        try:
            device, uplink = self._device(tunnel.device), self._device(tunnel.uplink)
            return (
                self._indices == (uplink, device)
                and self._is_attached(device, _EGRESS)
                and self._is_attached(uplink, _INGRESS)
            )
        except OSError:
            return False

    def put(self, tunnel: Tunnel) -> None:
        """Attach, with these settings; or give the fast path up, if the tunnel is to have none."""
        if not tunnel.fast:
            self._retire(tunnel)
            return
        try:
            self._put(tunnel)
        except (OSError, ValueError) as error:
            words = _words(error)
            if self._refused is None or self._refused[1] != words:
                log.warning("no fast path for %s, the forwarder carries everything: %s", tunnel.device, words)
            self._refused = tunnel, words

    def _put(self, tunnel: Tunnel) -> None:
        self._load()
        device, uplink = self._device(tunnel.device), self._device(tunnel.uplink)
        before, self._told = self._told, tunnel
        if before is not None and before.uplink != tunnel.uplink:
            with suppress(OSError):
                self._detach(self._device(before.uplink), _INGRESS)
        if self._index != uplink:
            self._index = uplink
            self.apply(list(self.entries.values()), ())
        settings = _SETTINGS.pack(uplink, device, tunnel.local, socket.htons(tunnel.port), tunnel.mtu)
        self._maps["config"].put(bytes(4), settings)
        for handle in self._ending.values():
            handle.cancel()
        self._attach(uplink, _INGRESS, "decap")
        self._attach(device, _EGRESS, "encap")
        self._indices, self._refused = (uplink, device), None
        log.info("fast path of %s over %s: in the kernel", tunnel.device, tunnel.uplink)

    def apply(self, put: Iterable[Forward], gone: Iterable[Prefix]) -> None:
        """Change the table. IPv6 packets are the forwarder's, and what leaves by another device.

        So is what goes to peers whose kernel does not take datagrams: veth, netkit and virtio may hand a
        packet over with its inner checksum still to be made, and a process would take it for a broken one.
        """
        if not self._maps:
            return
        peers = self._maps["peers"]
        for prefix in gone:
            self.entries.pop(prefix, None)
            if prefix.bits == 32:
                peers.remove(_key(prefix))
        items = list(put)
        for item, answer in zip(items, self._netlink.ask([route_get(i.remote) for i in items]), strict=True):
            if item.subnet.bits == 32 and len(item.remote) == 4:
                route = read_route(answer) if answer is not None else None
                elsewhere = route is None or route.ifindex != self._index
                slow = elsewhere or not item.fast
                peers.put(_key(item.subnet), _PEER.pack(item.remote, slow))
            self.entries[item.subnet] = item

    def remove(self, tunnel: Tunnel) -> None:
        """Detach at once."""
        for name, hook in ((tunnel.device, _EGRESS), (tunnel.uplink, _INGRESS)):
            with suppress(OSError):
                self._detach(self._device(name), hook)
        self._told = None

    def counters(self) -> dict[str, int]:
        """What went this way since the daemon started, under the forwarder's names."""
        if not self._maps:
            return {}
        counts = self._maps["counts"]
        found = {name: counts.sum(number) for number, name in enumerate(_COUNTS)}
        return {name: count for name, count in found.items() if count}

    # --- attaching ---------------------------------------------------------------------------------------

    def _retire(self, tunnel: Tunnel) -> None:
        """Send nothing this way from now on; take in what peers send until they know, then detach."""
        self._told = None
        with suppress(OSError):
            self._detach(self._device(tunnel.device), _EGRESS)
        try:
            uplink = self._device(tunnel.uplink)
            if not self._is_attached(uplink, _INGRESS):
                return
        except OSError:
            return

        def end() -> None:
            with suppress(OSError):
                self._detach(uplink, _INGRESS)
                log.info("the fast path of %s is gone", tunnel.device)

        log.info(
            "the fast path of %s is given up: datagrams are taken in for %.0f s more", tunnel.device, GRACE
        )
        with suppress(RuntimeError):  # no loop runs: a command, which waits for nothing
            self._later(tunnel.uplink, end)
            return
        end()

    def _later(self, uplink: str, act: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        if uplink in self._ending:
            self._ending[uplink].cancel()
        self._ending[uplink] = loop.call_later(GRACE, act)

    def _load(self) -> None:
        if self._programs:
            return
        found = bpf.read_object(OBJECT.read_bytes())
        try:
            for name, kind in _KINDS.items():
                self._maps[name] = Map(name, kind)
            for name, program in found.programs.items():
                self._programs[name] = bpf.load_program(name, program, found.licence, self._maps)
        except OSError as error:
            self.close()
            if error.errno == errno.EPERM:
                raise NetlinkError(errno.EPERM, "not permitted: CAP_BPF is missing") from None
            raise

    def _device(self, name: str) -> int:
        """The index of a device; NetlinkError if there is none."""
        return read_link(self._netlink.request(codec.link_dump(name))[0]).ifindex

    def _attach(self, index: int, hook: int, program: str) -> None:
        try:
            self._netlink.request(qdisc_put(index))
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
        owner = self._owner(index, hook)
        if owner not in (None, _NAME):
            raise NetlinkError(errno.EBUSY, f"filter priority {_PRIORITY} is taken by {owner!r}")
        self._netlink.request(filter_put(index, hook, self._programs[program]))

    def _detach(self, index: int, hook: int) -> None:
        if self._owner(index, hook) == _NAME:
            self._netlink.request(filter_delete(index, hook))

    def _is_attached(self, index: int, hook: int) -> bool:
        return self._owner(index, hook) == _NAME

    def _owner(self, index: int, hook: int) -> str | None:
        """The name of what has our priority on a hook; None if nothing has."""
        try:
            bodies = self._netlink.dump(filter_dump(index, hook))
        except NetlinkError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return None  # there is no clsact there
            raise
        for body in bodies:
            _family, _zero, _index, handle, _parent, info = _TCMSG.unpack_from(body)
            if info >> 16 == _PRIORITY and handle:
                found = codec.attributes(body, _TCMSG.size)
                options = codec.attributes(found.get(_TCA_OPTIONS, b""), 0)
                return options.get(_TCA_BPF_NAME, found.get(_TCA_KIND, b"?")).rstrip(b"\0").decode("latin-1")
        return None


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no {OBJECT}: install clang, then flannelpy once more"
    return str(error.strerror if isinstance(error, OSError) else error)


def _key(prefix: Prefix) -> bytes:
    return struct.pack("=I4s", prefix.length, prefix.address)


# --- messages: linux/pkt_sched.h, linux/pkt_cls.h --------------------------------------------------------


def qdisc_put(index: int) -> Message:
    """Make the place where filters of both directions hang, if it is not there: `tc qdisc add ... clsact`."""
    body = _TCMSG.pack(codec.AF_UNSPEC, 0, index, _CLSACT_HANDLE, _CLSACT_PARENT, 0)
    return Message(
        _RTM_NEWQDISC, codec.NLM_F_CREATE | codec.NLM_F_EXCL, body + codec.attr(_TCA_KIND, b"clsact\0")
    )


def filter_put(index: int, hook: int, program: int) -> Message:
    """`tc filter replace ... bpf direct-action`: from one packet to the next it is the new program."""
    options = (
        codec.attr_u32(_TCA_BPF_FD, program)
        + codec.attr(_TCA_BPF_NAME, _NAME.encode() + b"\0")
        + codec.attr_u32(_TCA_BPF_FLAGS, _DIRECT_ACTION)
    )
    body = _filter(index, hook) + codec.attr(_TCA_KIND, b"bpf\0") + codec.attr(_TCA_OPTIONS, options)
    return Message(_RTM_NEWTFILTER, codec.NLM_F_CREATE, body)


def filter_delete(index: int, hook: int) -> Message:
    """Take our filter off a hook."""
    return Message(_RTM_DELTFILTER, 0, _filter(index, hook) + codec.attr(_TCA_KIND, b"bpf\0"))


def filter_dump(index: int, hook: int) -> Message:
    """All filters of a hook."""
    return Message(_RTM_GETTFILTER, codec.NLM_F_DUMP, _TCMSG.pack(codec.AF_UNSPEC, 0, index, 0, hook, 0))


def _filter(index: int, hook: int) -> bytes:
    protocol = socket.htons(_ETH_P_ALL)
    return _TCMSG.pack(codec.AF_UNSPEC, 0, index, 1, hook, _PRIORITY << 16 | protocol)
