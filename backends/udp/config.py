"""The options of the udp backend: flannel's `Backend` object, and one of our own."""

from typing import NamedTuple

from flannelpy.model.config import NetworkConfig, Section

_DEFAULT_PORT = 8285
AUTO, ON, OFF = "auto", "on", "off"
"""Of `FastPath`: where it can be had; the same, and a warning where not; nowhere."""


class UdpConfig(NamedTuple):
    """The checked options."""

    port: int
    """UDP port, the same on all nodes."""
    open: bool
    """`AcceptAnySource`: let in datagrams from anywhere with any inner source, as flannel does."""
    fast_path: str = AUTO
    """`FastPath`: whether programs in the kernel carry what they can."""


def parse(config: NetworkConfig) -> UdpConfig:
    """The options in the network config; ConfigError names the one at fault."""
    section = Section(config.backend, "Backend")
    fast_path = section.text("FastPath", AUTO)
    if fast_path not in (AUTO, ON, OFF):
        raise section.error("FastPath", f'it must be "{AUTO}", "{ON}" or "{OFF}"')
    return UdpConfig(
        section.integer("Port", _DEFAULT_PORT, 1, 65535),
        section.boolean("AcceptAnySource", default=False),
        fast_path,
    )
