"""What is ours although this configuration would not make it: of another VNI, backend or network."""

from collections.abc import Container, Iterable

from flannelpy.model.address import Prefix, host
from flannelpy.model.kernel import State
from flannelpy.model.plan import Remove
from flannelpy.model.uplink import OVERLAY_NAME, Interface


def leftover_devices(
    interfaces: Iterable[Interface], subnets: Iterable[Prefix], present: Container[str]
) -> frozenset[str]:
    """Those with an overlay's name that hold the base address of one of these subnets, ours now or before.

    Another network's daemon on the same host has another subnet, so its devices are never among them.
    """
    bases = {host(subnet.address) for subnet in subnets}
    return frozenset(
        interface.name
        for interface in interfaces
        if interface.name not in present
        and OVERLAY_NAME.fullmatch(interface.name)
        and any(address.prefix in bases for address in interface.addresses)
    )


def leftover_routes(observed: State, former: Iterable[Prefix], present: Iterable[Prefix]) -> list[Remove]:
    """The removal of our routes into networks that were ours before, and are not any more."""
    former, present = tuple(former), tuple(present)
    return [
        Remove(route)
        for route in observed.routes.values()
        if any(network.contains(route.destination) for network in former)
        and not any(network.overlaps(route.destination) for network in present)
    ]
