"""subnet.env: what Docker and CNI read, and what we read back at the next start."""

import re
from pathlib import Path

from flannelpy.files import read_regular, replace
from flannelpy.model.address import FAMILY_NAMES, Prefix, parse_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease
from flannelpy.model.subnet import Previous

LARGEST = 65536
"""Bytes that are read at most."""

_KEYS = (
    ("FLANNEL_NETWORK", 4),
    ("FLANNEL_SUBNET", 4),
    ("FLANNEL_IPV6_NETWORK", 16),
    ("FLANNEL_IPV6_SUBNET", 16),
)
"""In the order of `Previous`, with the bytes of an address."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


# --- writing ---


def render(config: NetworkConfig, lease: Lease, mtu: int, ip_masq: bool) -> str:
    """The text of the file, byte for byte flannel's; the subnet's address is its first one plus 1.

    ValueError when the lease lacks a subnet of an enabled family.
    """
    lines = []
    families = (
        (config.enable_ipv4, "FLANNEL_", config.network, lease.subnet),
        (config.enable_ipv6, "FLANNEL_IPV6_", config.network6, lease.subnet6),
    )
    for enabled, name, network, subnet in families:
        if not enabled:
            continue
        if network is None or subnet is None:
            raise ValueError(
                f"lease {lease.key} has no {name}SUBNET, but the network config enables the family"
            )
        lines += [
            f"{name}NETWORK={network.network()}",
            f"{name}SUBNET={Prefix(subnet.nth(1), subnet.length)}",
        ]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}"]
    return "".join(line + "\n" for line in lines)


def write(path: str | Path, text: str) -> None:
    """Replace the file in one step, mode 0644 whatever the umask; OSError leaves the old one as it was.

    A missing folder is made (0755). A device or pipe is written to, not replaced.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    replace(target, text, 0o644)


# --- reading ---


def read(path: str | Path) -> tuple[Previous, str | None]:
    """What the file says, and one warning if there is something wrong with it; a missing file is fine.

    A file that is not whole (unreadable, binary, larger than 64 KiB, a line that is no assignment, an address
    in a last line without its end) says nothing at all. A value that is not exactly one CIDR block of its
    family says nothing itself. Host bits are masked off.
    """
    try:
        text = content(path)
        values = variables(text)
        _refuse_cut(text)
    except FileNotFoundError:
        return Previous(), None
    except OSError as error:
        return Previous(), f"{path}: {error.strerror}; the previous subnet is not known"
    except ValueError as error:
        return Previous(), f"{path}: {error}; the previous subnet is not known"
    prefixes: list[Prefix | None] = []
    warning = None
    for key, size in _KEYS:
        value, line = values.get(key, ("", 0))
        prefix = _only_prefix(value, size)
        prefixes.append(prefix)
        if value and prefix is None and warning is None:
            rule = f"it is not exactly one {FAMILY_NAMES[size]} block"
            warning = f"{path}: line {line}: {key} is ignored, {rule}: {value[:64]!r}"
    return Previous(*prefixes), warning


def variables(text: str) -> dict[str, tuple[str, int]]:
    """Lines `[export ]KEY=value`, quoted or not, `#` comments -> {key: (value, line)}. The last one wins.

    ValueError names the line that is none of these. Nothing is expanded.
    """
    found = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        bare = line.strip()
        if not bare or bare[0] == "#":
            continue
        key, equals, value = bare.removeprefix("export ").partition("=")
        key = key.strip()
        if not equals or not key.isidentifier() or not key.isascii():
            raise ValueError(f"line {number} is not KEY=value: {bare[:64]!r}")
        found[key] = (_unquoted(value.strip(), number), number)
    return found


def _unquoted(value: str, number: int) -> str:
    quote = value[:1]
    if quote not in ("'", '"'):
        return value.split(" #")[0].split("\t#")[0].rstrip()
    inner, end, rest = value[1:].partition(quote)
    if not end or (rest.strip() and rest.strip()[0] != "#"):
        raise ValueError(f"line {number} has a quote without its counterpart: {value[:64]!r}")
    return inner


def content(path: str | Path) -> str:
    """The text of a regular file of at most 64 KiB; OSError, or ValueError when it is something else."""
    data = read_regular(path, LARGEST)
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise ValueError(f"line {number} is not text") from None
        if _CONTROL.search(text.removesuffix("\r")):
            raise ValueError(f"line {number} is not text")
    return data.decode()


def _refuse_cut(text: str) -> None:
    """ValueError when the text ends within an address: `10.5.72.1/2` may have been `10.5.72.1/24`."""
    last = text.rpartition("\n")[2]
    if any(key in last for key, _ in _KEYS):
        raise ValueError(f"line {text.count(chr(10)) + 1} is cut off: {last[:64]!r}")


def _only_prefix(value: str, size: int) -> Prefix | None:
    """The one valid block of a comma list; None if there is none or more than one."""
    valid = []
    for item in value.split(","):
        try:
            prefix = parse_prefix(item.strip())
        except ValueError:
            continue
        # A length of 0 would make every route of the host one of the previous network.
        if len(prefix.address) == size and prefix.length > 0:
            valid.append(prefix.network())
    return valid[0] if len(valid) == 1 else None
