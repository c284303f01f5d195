"""Looks at this host for those who judge it: sysctls, ways, features. Changes nothing."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from flannelpy.doctor.facts import MacPolicy

_LINK_FOLDERS = (
    "etc/systemd/network",
    "run/systemd/network",
    "usr/local/lib/systemd/network",
    "usr/lib/systemd/network",
    "lib/systemd/network",
)
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


def mac_policy(device: str, root: Path = Path("/")) -> MacPolicy | None:
    """What udev does to the MAC of a device of this name; None without udev, or without a word about it.

    The first .link file in the order of their names counts; of two with one name that of the earlier folder
    (systemd.link(5)). Files that match by more than a name are taken for those of other devices.
    """
    if not (root / "run/udev/control").exists():
        return None
    files: dict[str, Path] = {}
    for folder in reversed(_LINK_FOLDERS):
        with suppress(OSError):
            files |= {path.name: path for path in (root / folder).iterdir() if path.suffix == ".link"}
    for name in sorted(files):
        drop_ins = [path for folder in _LINK_FOLDERS for path in (root / folder / f"{name}.d").glob("*.conf")]
        found = _sections([files[name], *sorted(drop_ins, key=lambda path: path.name)])
        patterns = found.get("match", {}).get("originalname", "").split()
        if found.get("match", {}).keys() <= {"originalname"} and any(
            fnmatch(device, one) for one in patterns
        ):
            policy = found.get("link", {}).get("macaddresspolicy")
            return MacPolicy(policy, str(files[name])) if policy else None
    return None


def _sections(paths: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Section -> key -> value, names in lower case; what a later file says counts."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#", ";"))
    for path in paths:
        with suppress(OSError, ConfigParserError, UnicodeError):
            parser.read_string(path.read_text(encoding="utf-8"))
    return {name.lower(): dict(parser[name]) for name in parser.sections()}


def has_kubelet() -> bool:
    """Whether this host looks like a Kubernetes node."""
    return Path("/var/lib/kubelet/config.yaml").exists()


def has_net_admin() -> bool:
    """CAP_NET_ADMIN in this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 12 & 1)
    return False
