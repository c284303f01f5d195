"""A network config that changed under a running daemon: what applies at once, what waits for a restart."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flannelpy.model.address import format_address
from flannelpy.model.config import NetworkConfig

KEYS = {
    "network": "Network",
    "network6": "IPv6Network",
    "enable_ipv4": "EnableIPv4",
    "enable_ipv6": "EnableIPv6",
    "enable_nftables": "EnableNFTables",
    "subnet_len": "SubnetLen",
    "subnet_min": "SubnetMin",
    "subnet_max": "SubnetMax",
    "subnet6_len": "IPv6SubnetLen",
    "subnet6_min": "IPv6SubnetMin",
    "subnet6_max": "IPv6SubnetMax",
    "backend_type": "Backend.Type",
    "backend": "Backend",
}
"""Field of NetworkConfig -> the key that a user reads and writes."""
LIVE = frozenset(("subnet_min", "subnet_max", "subnet6_min", "subnet6_max", "enable_nftables"))
"""Which of them apply at once: where new subnets are chosen from, and how the rules are kept."""


class ConfigChange(NamedTuple):
    """The differences in words, "SubnetMin from 10.5.0.0 to 10.5.8.0", in the order of the keys."""

    live: tuple[str, ...]
    """What a running daemon takes over."""
    pending: tuple[str, ...]
    """What waits for its restart, and disturbs traffic then."""


def compare(running: NetworkConfig, new: NetworkConfig) -> ConfigChange:
    """What has changed. With nothing pending the two describe the same network."""
    live: list[str] = []
    pending: list[str] = []
    for field, key in KEYS.items():
        before, after = getattr(running, field), getattr(new, field)
        if before == after or (field == "backend" and running.backend_type != new.backend_type):
            continue
        kind = live if field in LIVE else pending
        kind.append(f"{key} from {_shown(before)} to {_shown(after)}")
    return ConfigChange(tuple(live), tuple(pending))


def with_live_part(running: NetworkConfig, new: NetworkConfig) -> NetworkConfig:
    """The running config with what applies at once; only for two that describe the same network."""
    return running._replace(**{field: getattr(new, field) for field in LIVE})


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return json.dumps(value, separators=(",", ":"))[:120]
    return format_address(value) if isinstance(value, bytes) else str(value)
