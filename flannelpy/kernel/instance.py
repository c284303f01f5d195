"""One daemon per network: a lock that another daemon can see, and a look around for a running flannel.

The lock is an abstract UNIX socket: it lives and dies with the process, and belongs to the network namespace,
just as the devices do. A lock file would not tell two namespaces of one host apart.
"""

import contextlib
import hashlib
import os
import pwd
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flannelpy.errors import ConflictError
from flannelpy.model.address import Prefix, host
from flannelpy.subnet_env import read as read_subnet_env

_PROC = Path("/proc")
_DEFAULT_PREFIX = "/coreos.com/network"
_ATTEMPTS = 8
_SERVICE_USER = "flannelpy"
"""Whom deploy/systemd/flannelpy.service runs the daemon as: root must see its lock too."""
_DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"


def lock(what: str) -> socket.socket:
    """Hold `what` ("network /coreos.com/network", "device flannel.1") until the socket is closed.

    Raises ConflictError that names the process which holds it.
    """
    # A name in the abstract namespace may have 107 bytes; a prefix may be longer.
    digest = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    pid: int | None = None
    user: int | None = None
    for attempt in range(_ATTEMPTS):
        name = f"\0flannelpy/{digest}/{attempt}"
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(name)
        except OSError:
            holder.close()
            pid, user = _holder(name)
            if user in (0, os.geteuid(), None) or _name(user) == _SERVICE_USER:
                raise ConflictError(
                    f"another flannelpy{f' (process {pid})' if pid else ''} serves {what} in this network"
                    " namespace already: stop it first"
                ) from None
            continue  # any user may take such a name, but only ours counts
        holder.listen(1)
        return holder
    raise ConflictError(f"process {pid} of user {user} holds the lock for {what}: end it")


def _holder(name: str) -> tuple[int | None, int | None]:
    """(process, user) that listens on an abstract socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(OSError):
        client.settimeout(1)
        client.connect(name)
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, user, _group = struct.unpack("=iII", credentials)
        return pid, user
    return None, None


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return ""


class _Flannel(NamedTuple):
    pid: int
    prefix: str | None
    """None: it serves a Kubernetes cluster."""
    subnet_file: str


def refuse_flannel(prefix: str | None, addresses: Sequence[Prefix]) -> None:
    """Raise ConflictError if a flannel in this network namespace serves our network or our device.

    It does if its etcd prefix is ours (None: Kubernetes), or if one of `addresses` (on our devices) is the
    base of the subnet in its subnet file.
    """
    for flannel in _flannels():
        reason = ""
        if prefix is None and flannel.prefix is None:
            reason = "the same Kubernetes node"
        elif prefix and flannel.prefix and flannel.prefix.rstrip("/") == prefix.rstrip("/"):
            reason = f"the same network {prefix}"
        else:
            previous, _warning = read_subnet_env(f"/proc/{flannel.pid}/root{flannel.subnet_file}")
            subnets = [subnet for subnet in (previous.subnet, previous.subnet6) if subnet]
            if any(host(subnet.address) in addresses for subnet in subnets):
                reason = f"the same device (its subnet is {subnets[0]})"
        if reason:
            raise ConflictError(
                f"flanneld (process {flannel.pid}) serves {reason} in this network namespace:"
                " stop it first (systemctl stop flanneld); its devices, lease and connections stay"
            )


def _flannels() -> Iterator[_Flannel]:
    """The flannel daemons in our network namespace, by their program's name."""
    try:
        ours = (_PROC / "self/ns/net").readlink()
    except OSError:
        return
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if not (entry / "comm").read_bytes().startswith(b"flanneld"):
                continue
            if (entry / "ns/net").readlink() != ours:
                continue
            arguments = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[1:]
            environ = dict(
                line.split("=", 1)
                for line in (entry / "environ").read_bytes().decode("utf-8", "replace").split("\0")
                if "=" in line
            )
            kube = _option(arguments, environ, "kube-subnet-mgr", "false").lower() in ("true", "t", "1", "")
            yield _Flannel(
                int(entry.name),
                None if kube else _option(arguments, environ, "etcd-prefix", _DEFAULT_PREFIX),
                _option(arguments, environ, "subnet-file", _DEFAULT_SUBNET_FILE),
            )


def _option(arguments: Sequence[str], environ: dict[str, str], flag: str, default: str) -> str:
    """A flag's value on a flannel's command line or in its environment; "" for a bare boolean."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == flag:
            if equals:
                return value
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            return "" if following.startswith("-") else following
    return environ.get(f"FLANNELD_{flag.upper().replace('-', '_')}") or default
