"""Looks at this host for those who judge it: sysctls, ways, features. Changes nothing."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_SYSCTLS = Path("/proc/sys")
_SECONDS = 20.0
_NAMES = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv4/conf/all/rp_filter",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
)


def sysctls(devices: Iterable[str]) -> dict[str, str]:
    """The knobs that matter, in general and for these devices; those that there are."""
    names = list(_NAMES)
    for device in devices:
        names += [f"net/ipv4/conf/{device}/{knob}" for knob in ("rp_filter", "forwarding")]
    found = {}
    for name in names:
        try:
            found[name] = (_SYSCTLS / name).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
    return found


def features() -> dict[str, str | None]:
    """Feature -> why it does not work, None = it does; tried in a process and a namespace of their own."""
    command: Sequence[str] = (sys.executable, "-P", "-m", "flannelpy.kernel.scratch")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}  # nothing is known
    return found


def has_kubelet() -> bool:
    """Whether this host looks like a Kubernetes node."""
    return Path("/var/lib/kubelet/config.yaml").exists()


def has_net_admin() -> bool:
    """CAP_NET_ADMIN in this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 12 & 1)
    return False
