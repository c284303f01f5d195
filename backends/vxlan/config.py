"""The options of the vxlan backend: flannel's `Backend` object."""

from typing import NamedTuple

from flannelpy.model.config import ConfigError, NetworkConfig, Section

_MAX_NAME = 15
"""IFNAMSIZ - 1: the longest name of a device."""


class VxlanConfig(NamedTuple):
    """The checked options."""

    vni: int
    port: int
    """UDP port; 0 = the kernel's default (8472)."""
    mtu: int
    """Overrides the uplink's MTU; 0 = take the uplink's."""
    gbp: bool
    learning: bool
    direct_routing: bool


def parse(config: NetworkConfig) -> VxlanConfig:
    """The options in the network config; ConfigError names the one at fault."""
    section = Section(config.backend, "Backend")
    options = VxlanConfig(
        section.integer("VNI", 1, 0, (1 << 24) - 1),
        section.integer("Port", 0, 0, 65535),
        section.integer("MTU", 0, 0, 65535),
        section.boolean("GBP", default=False),
        section.boolean("Learning", default=False),
        section.boolean("DirectRouting", default=False),
    )
    for name in device_names(options.vni, config):
        if len(name) > _MAX_NAME:
            raise ConfigError(
                f"Backend.VNI is {options.vni}: the device's name {name} would be longer than {_MAX_NAME}"
                f" characters; choose a VNI of at most {_MAX_NAME - len(name.rpartition('.')[0]) - 1} digits"
            )
    return options


def device_names(vni: int, config: NetworkConfig) -> tuple[str, ...]:
    """The devices of the enabled families, as flannel names them."""
    names = []
    if config.enable_ipv4:
        names.append(f"flannel.{vni}")
    if config.enable_ipv6:
        names.append(f"flannel-v6.{vni}")
    return tuple(names)
