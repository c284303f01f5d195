"""subnet.env -> options for dockerd: what flannel's mk-docker-opts.sh makes of it. Pure.

The output is read by systemd and sourced by shells, so a value that could mean more than itself there is an
error and is never escaped: the two readers do not agree on escapes.
"""

import re
import struct
from collections.abc import Mapping

from flannelpy.errors import FlannelpyError
from flannelpy.model.address import Prefix, parse_prefix

_OPTION = re.compile(r"DOCKER_OPT_[A-Za-z0-9_]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RTF_GATEWAY = 0x2


class DockerOptsError(FlannelpyError):
    """The options cannot be made."""


def output(variables: Mapping[str, str], *, individual: bool, combined: bool, key: str, ip_masq: bool) -> str:
    """The text of the options file.

    `variables` are those of the environment and, over them, of subnet.env: besides FLANNEL_SUBNET, _MTU and
    _IPMASQ every DOCKER_OPT_* counts, and the options that `key` holds already stay in front.
    `individual` asks for a line for each option, `combined` for the line of `key`, `ip_masq` for the option
    about masquerading. DockerOptsError names the variable that is not usable.
    """
    if not _NAME.fullmatch(key):
        raise DockerOptsError(f"-k {key[:64]!r} is not a variable name: use letters, digits and _")
    options = {name: value for name, value in variables.items() if _OPTION.fullmatch(name)}
    options |= _flannel_options(variables, ip_masq=ip_masq)
    lines = [f'{name}="{_plain(name, options[name])}"' for name in sorted(options)] if individual else []
    if combined:
        all_options = _plain(key, variables.get(key, ""))
        all_options += " " if all_options else ""
        all_options += "".join(f" {_plain(name, options[name])}" for name in sorted(options))
        lines.append(f'{key}="{all_options}"')
    return "".join(line + "\n" for line in lines)


def _flannel_options(variables: Mapping[str, str], *, ip_masq: bool) -> dict[str, str]:
    options = {}
    if subnet(variables) is not None:
        options["DOCKER_OPT_BIP"] = f"--bip={variables['FLANNEL_SUBNET']}"
    mtu = variables.get("FLANNEL_MTU", "")
    if mtu:
        if not re.fullmatch(r"[0-9]{1,5}", mtu):
            raise DockerOptsError(f"FLANNEL_MTU={mtu[:64]!r} is not a number of bytes")
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    masquerading = variables.get("FLANNEL_IPMASQ", "")
    if ip_masq and masquerading:
        if masquerading not in ("true", "false"):
            raise DockerOptsError(f"FLANNEL_IPMASQ={masquerading[:64]!r} is neither true nor false")
        # Only one of the two may masquerade.
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={'false' if masquerading == 'true' else 'true'}"
    return options


def subnet(variables: Mapping[str, str]) -> Prefix | None:
    """FLANNEL_SUBNET with its host bits; None if it is not set. DockerOptsError if it is no IPv4 block."""
    text = variables.get("FLANNEL_SUBNET", "")
    if not text:
        return None
    try:
        prefix = parse_prefix(text)
    except ValueError:
        prefix = None
    if prefix is None or len(prefix.address) != 4:
        raise DockerOptsError(f"FLANNEL_SUBNET={text[:64]!r} is not an IPv4 block (like 10.5.1.1/24)")
    return prefix


def _plain(name: str, value: str) -> str:
    bad = next((char for char in value if char in '"$`\\' or not char.isprintable()), None)
    if bad is not None:
        raise DockerOptsError(
            f"{name} holds {bad!r}, which systemd or a shell may not read as itself: remove it from there"
        )
    return value


def is_routed(network: Prefix, route_table: str) -> bool:
    """Whether a route to exactly this IPv4 block goes through a gateway; `route_table` is /proc/net/route.

    Then the subnet belongs to somebody else. The columns (fib_route_seq_show in net/ipv4/fib_trie.c):
    interface, destination, gateway, flags, ..., mask at the 8th place; addresses in host byte order.
    """
    wanted = (network.network().address, (~((1 << (32 - network.length)) - 1) & 0xFFFFFFFF).to_bytes(4))
    for line in route_table.splitlines()[1:]:
        columns = line.split()
        if len(columns) < 8:
            continue
        try:
            destination, mask = (struct.pack("=I", int(columns[index], 16)) for index in (1, 7))
            flags = int(columns[3], 16)
        except (ValueError, struct.error):
            continue
        if flags & _RTF_GATEWAY and (destination, mask) == wanted:
            return True
    return False
