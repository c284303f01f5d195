"""Which kernel features work here: tried for real, in a network namespace that ends with this process.

`flannelpy doctor` runs this module as a process of its own: however it ends, nothing is left. It prints JSON:
feature -> why it does not work, null = it does.
"""

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable

from flannelpy.kernel import codec, tun
from flannelpy.kernel.linux import LinuxKernel
from flannelpy.kernel.netlink import NetlinkSocket
from flannelpy.kernel.nftables import Nftables
from flannelpy.model.address import parse_prefix
from flannelpy.model.kernel import DeviceAddress, FdbEntry, Link, Neighbour, Route, Scope, Vxlan
from flannelpy.model.plan import Put

_CLONE_NEWNET = 0x40000000
_MAC, _PEER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
_GATEWAY = bytes([198, 18, 0, 0])
"""Of 198.18.0.0/15, which is for tests (RFC 2544)."""


def try_all() -> dict[str, str | None]:
    """Feature -> why not. Without a namespace of its own only that is told."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        return {"namespace": os.strerror(ctypes.get_errno())}
    host = LinuxKernel()
    found: dict[str, str | None] = {"namespace": None}
    tries: dict[str, Callable[[], None]] = {
        "vxlan": lambda: _vxlan(host),
        "nexthop": _nexthop,
        "tun": lambda: tun.create_tun("scratch0"),
        "nf_tables": _nf_tables,
    }
    for feature, attempt in tries.items():
        try:
            attempt()
        except OSError as error:
            found[feature] = error.strerror or str(error)
        else:
            found[feature] = None
    return found


def _vxlan(host: LinuxKernel) -> None:
    """A device with all that one peer needs."""
    link = Link("scratch.1", "vxlan", _MAC, 1400, up=True, vxlan=Vxlan(1, None, None, 8472))
    host.observe(Scope(frozenset({link.name}), ()), devices_only=True)
    items = (
        link,
        DeviceAddress(link.name, parse_prefix("198.18.1.0/32")),
        FdbEntry(link.name, _PEER, bytes([198, 18, 0, 2])),
        Neighbour(link.name, _GATEWAY, _PEER),
        Route(parse_prefix("198.18.0.0/24"), link.name, _GATEWAY, onlink=True),
    )
    for item in items:
        failures = host.apply([Put(item)])
        if failures:
            raise failures[0].error


def _nexthop() -> None:
    netlink = NetlinkSocket()
    try:
        netlink.dump(codec.nexthop_dump())
    finally:
        netlink.close()


def _nf_tables() -> None:
    nftables = Nftables()
    try:
        if not nftables.works():
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    finally:
        nftables.close()


if __name__ == "__main__":
    json.dump(try_all(), sys.stdout)
