"""The options of the udp backend: flannel's `Backend` object, and one of our own."""

from typing import NamedTuple

from flannelpy.model.config import NetworkConfig, Section

_DEFAULT_PORT = 8285


class UdpConfig(NamedTuple):
    """The checked options."""

    port: int
    """UDP port, the same on all nodes."""
    open: bool
    """`AcceptAnySource`: let in datagrams from anywhere with any inner source, as flannel does."""


def parse(config: NetworkConfig) -> UdpConfig:
    """The options in the network config; ConfigError names the one at fault."""
    section = Section(config.backend, "Backend")
    return UdpConfig(
        section.integer("Port", _DEFAULT_PORT, 1, 65535), section.boolean("AcceptAnySource", default=False)
    )
