"""What a node knows of its host: the uplink, the devices, what no peer may have; followed as it changes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Container, Mapping, Sequence
from typing import NamedTuple, Protocol

from flannelpy.backend import Backend, Facts
from flannelpy.errors import UplinkError
from flannelpy.model.address import Address, Prefix, format_address
from flannelpy.model.config import NetworkConfig, overlap_warnings
from flannelpy.model.kernel import Link, Notice, Scope
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.scope import protected_blocks, scope_of
from flannelpy.model.subnet import Previous
from flannelpy.model.uplink import DefaultRoute, Interface, NoUplink, Uplink, Wish, choose
from flannelpy.reconcile import Kernel

log = logging.getLogger("flannelpy.node")

_LOOK_AGAIN_SECONDS = 3.0
"""While there is no uplink: between two looks for one."""


class Host(Kernel, Protocol):
    """The machine: what the reconciler needs of it, and what there is to know about it."""

    def subscribe(self) -> None:
        """Begin to listen for changes, before anything is read."""
        ...

    def changes(self) -> AsyncGenerator[list[Notice], None]:
        """What is announced, for ever."""
        ...

    def interfaces(self) -> list[Interface]:
        """All links with their addresses."""
        ...

    def links(self, names: Container[str]) -> Mapping[str, Link]:
        """The devices of these names that there are."""
        ...

    def default_routes(self) -> list[DefaultRoute]:
        """The default routes of the main table."""
        ...

    def routed(self) -> list[tuple[str, Prefix]]:
        """(device, destination) of the main table's other routes."""
        ...

    def packets(self) -> Mapping[str, int]:
        """Name of a count -> packets that our forwarders carried or dropped; empty where there is none."""
        ...

    def why_no_fast_path(self, uplink: str) -> str:
        """What stands in the way of a fast path over an uplink; empty if nothing does."""
        ...

    def route_to(self, address: Address) -> tuple[int, Address] | None:
        """(output device's index, source address) on the way to an address."""
        ...


class Telling(NamedTuple):
    """Whom the surroundings tell what."""

    changed: Callable[[], None]
    """The uplink is another one, or has another address, MTU or name."""
    look: Callable[[], None]
    """There was no uplink a while ago: it is time to look again."""


class Surroundings:
    """Owned by one node; `facts` are as of now. Raises UplinkError at once if there is no usable uplink."""

    def __init__(
        self,
        host: Host,
        backend: Backend,
        config: NetworkConfig,
        wish: Wish,
        host_id: str,
        store_hosts: Sequence[Address],
        previous: Previous,
        telling: Telling,
    ) -> None:
        self._host = host
        self._backend = backend
        self._config = config
        self._wish = wish
        self._host_id = host_id
        self._store_hosts = store_hosts
        self._previous = previous
        self._telling = telling
        self._looking_again = False
        self.facts = self._first_facts()

    def _first_facts(self) -> Facts:
        try:
            uplink, reason = self._choose_uplink()
            facts = Facts(uplink, self._host.links(self._backend.devices), host_id=self._host_id)
            self._backend.mtu(facts)
        except ValueError as error:  # NoUplink is one
            raise UplinkError(str(error)) from None
        log.info("uplink %s", reason)
        if self._backend.wants_fast_path:
            why_not = self._host.why_no_fast_path(uplink.name)
            if why_not:
                log.info("no fast path in the kernel, the forwarder carries everything: %s", why_not)
            facts = facts._replace(no_fast_path=why_not)
        return facts._replace(protected=self._protected(uplink))

    def _protected(self, uplink: Uplink) -> tuple[tuple[str, Prefix], ...]:
        return protected_blocks(uplink, self._host.interfaces(), self._store_hosts)

    def _choose_uplink(self) -> tuple[Uplink, str]:
        return choose(
            self._wish,
            self._config.enable_ipv4,
            self._config.enable_ipv6,
            self._host.interfaces(),
            self._host.default_routes(),
            self._host.route_to,
        )

    def learn(self, facts: Facts) -> Facts:
        """The facts afresh, after something happened to the uplink. Without a usable one they stay.

        An uplink is kept for as long as its interface has its addresses: a second address, or another default
        route, is no reason to move the overlay.
        """
        kept = self._kept(facts.uplink)
        try:
            uplink, reason = (kept, f"{kept.name}, MTU {kept.mtu}") if kept else self._choose_uplink()
            now = facts._replace(uplink=uplink, protected=self._protected(uplink))
            self._backend.mtu(now)
        except NoUplink as error:
            log.debug("no uplink for the moment: %s", error)
            self._look_again()
            return facts
        except ValueError as error:
            log.warning("the uplink cannot carry the overlay any more: %s", error)
            return facts
        self.facts = now
        if uplink != facts.uplink:
            log.warning("the uplink changed: %s", reason)
            self._telling.changed()
        return now

    def _look_again(self) -> None:
        """Not all that makes an uplink is announced: a default route that follows a new address, say."""

        def look() -> None:
            self._looking_again = False
            self._telling.look()

        if not self._looking_again:
            self._looking_again = True
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_SECONDS, look)

    def _kept(self, uplink: Uplink) -> Uplink | None:
        """The uplink under its name and MTU of now; None if its interface or one of its addresses is gone."""
        wanted = {address for address in (uplink.address, uplink.address6) if address is not None}
        for interface in self._host.interfaces():
            if interface.ifindex == uplink.ifindex:
                found = {address.prefix.address for address in interface.addresses}
                if wanted <= found:
                    return uplink._replace(name=interface.name, mtu=interface.mtu)
        return None

    def offer(self, remembered: Lease | None, others: Sequence[Lease]) -> LeaseAttrs:
        """What we tell the peers, by the devices as they are now; see `Backend.attrs`. Raises UplinkError."""
        backend = self._backend
        self.facts = self.facts._replace(links=self._host.links(backend.devices))
        try:
            attrs, warnings = backend.attrs(self.facts, remembered, others)
        except ValueError as error:
            raise UplinkError(str(error)) from None
        for warning in warnings:
            log.warning("%s", warning)
        return attrs

    def scope(self, own: Lease) -> Scope:
        """What is ours in this kernel, what an earlier start left included."""
        return scope_of(
            self._config,
            own.subnets(),
            self._previous,
            self._backend.devices,
            self._host.interfaces(),
            follows_peers=self._backend.follows_peers,
        )

    def warn_of_overlaps(self, own: Lease) -> None:
        """The classic mistake: an overlay network that this host's own network is part of."""
        addresses = [
            (interface.name, address.prefix)
            for interface in self._host.interfaces()
            for address in interface.addresses
        ]
        ours = frozenset(self._backend.devices)
        for warning in overlap_warnings(self._config, addresses, self._host.routed(), ours, own.subnets()):
            log.warning("%s", warning)


def shown(uplink: Uplink) -> str:
    """Its name and addresses."""
    addresses = filter(None, (uplink.address, uplink.address6))
    return " ".join([uplink.name, *map(format_address, addresses)])
