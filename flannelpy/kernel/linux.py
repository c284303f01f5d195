"""The machine: observe its tables as a `State`, and apply operations to it.

Nexthop objects live here and nowhere else. A route of ours on a device of ours goes through a nexthop object,
because the kernel's insert of `via GW onlink` routes is quadratic in their number. The model knows gateways
only: this module picks a free id, marks the object with our protocol number, and resolves it back when it
observes. Routes on the uplink stay plain: on carrier loss the kernel deletes nexthop objects with their
routes for good, while plain routes come back with the carrier.
"""

import errno
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from flannelpy.errors import KernelError
from flannelpy.kernel import codec, replies
from flannelpy.kernel.codec import Message
from flannelpy.kernel.links import GONE, Failure, link_of
from flannelpy.kernel.monitor import Monitor, View
from flannelpy.kernel.neighbours import observe_neighbours
from flannelpy.kernel.netlink import NetlinkError, NetlinkSocket
from flannelpy.kernel.nexthop import Nexthops, RouteKey, Way
from flannelpy.kernel.questions import Questions
from flannelpy.kernel.replies import RouteInfo
from flannelpy.kernel.routes import main_routes, route_rows, routes_elsewhere
from flannelpy.model.address import Prefix
from flannelpy.model.kernel import (
    BLACKHOLE,
    PROTOCOL_KERNEL,
    ROUTE_PROTOCOL,
    DeviceAddress,
    FdbEntry,
    Forward,
    Item,
    Link,
    Neighbour,
    Notice,
    Route,
    Scope,
    State,
    Tunnel,
    is_kernels_own,
)
from flannelpy.model.plan import Op, Put, Remove

if TYPE_CHECKING:
    from flannelpy.kernel.tunnel import Tunnels


class LinuxKernel(Questions):
    """The kernel of the network namespace that this process runs in; `only_look` is for those who ask."""

    def __init__(self, *, only_look: bool = False) -> None:
        super().__init__(NetlinkSocket())
        self._nexthops = Nexthops()
        self._only_look = only_look
        self._tunnels_used: Tunnels | None = None
        self._use_nexthops = True
        self._scope = Scope(frozenset(), ())
        self._monitor: Monitor | None = None

    def close(self) -> None:
        """Give the sockets back."""
        self._netlink.close()
        if self._tunnels_used is not None:
            self._tunnels_used.close()
        if self._monitor is not None:
            self._monitor.close()

    def subscribe(self) -> None:
        """Begin to listen; before the first `observe`, so that nothing happens unseen between the two."""
        self._monitor = Monitor(self._view, self._netlink.port)
        if self._tunnels_used is not None:
            self._tunnels_used.on_end = self._monitor.shake

    @property
    def _tunnels(self) -> "Tunnels":
        """What only udp needs is not loaded before."""
        if self._tunnels_used is None:
            from flannelpy.kernel.tunnel import Tunnels

            self._tunnels_used = Tunnels(self._netlink, only_look=self._only_look)
            if self._monitor is not None:
                self._tunnels_used.on_end = self._monitor.shake
        return self._tunnels_used

    async def changes(self) -> AsyncGenerator[list[Notice], None]:
        """What is announced about the scope of the last `observe`."""
        if self._monitor is None:
            self.subscribe()
        assert self._monitor is not None  # noqa: S101  # for the type checker
        async with aclosing(self._monitor.notices()) as found:
            async for notices in found:
                yield notices

    def _narrow(self) -> None:
        """A new device has a new index: listen to it at once, its second damage must not go unheard."""
        if self._monitor is not None:
            links = self._links.by_name
            self._monitor.narrow(links[name].ifindex for name in self._scope.devices if name in links)

    def _view(self) -> View:
        links = {link.ifindex: link for link in self._links.by_name.values()}
        ours = {index: link.name for index, link in links.items() if link.name in self._scope.devices}
        names = {index: link.name for index, link in links.items()}
        return View(
            self._scope,
            ours,
            links,
            self._links.now,
            self._nexthops.is_ours,
            partial(self._route, names=names),
        )

    # --- forwarders --------------------------------------------------------------------------------------

    def packets(self) -> dict[str, int]:
        """What our forwarders have counted since they started; nothing where there is none."""
        if self._tunnels_used is None:
            return {}
        try:
            return self._tunnels_used.all_counters()
        except NetlinkError as error:
            if self._monitor is not None:
                self._monitor.shake(str(error))  # nobody else hears of that end any more
            return {}

    def why_no_fast_path(self, uplink: str) -> str:
        """What stands in the way of a fast path over an uplink; empty if nothing does."""
        return self._tunnels.fast.why_not(uplink)

    # --- observe -----------------------------------------------------------------------------------------

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        """All that is ours, as the kernel has it now; or just our devices with their addresses."""
        self._scope = scope
        links = self._links.observe()
        names = {link.ifindex: name for name, link in links.items()}
        ours = {link.ifindex: name for name, link in links.items() if name in scope.devices}
        state = State()
        for name in ours.values():
            state.links[name] = link_of(links[name], names)
        for info in filter(None, map(replies.read_address, self._netlink.dump(codec.address_dump()))):
            if info.ifindex in ours and not is_kernels_own(info.prefix):
                state.add([DeviceAddress(ours[info.ifindex], info.prefix)])
        self._narrow()
        if devices_only:
            return state
        for index, name in ours.items():
            observe_neighbours(self._netlink, state, index, name)
        self._read_nexthops(ours)
        users: dict[RouteKey, int] = {}
        for index in ours:
            self._observe_routes(state, index, names, users)
        self._nexthops.load_users(users)
        for route in routes_elsewhere(self._netlink, scope, ours):
            state.add([self._route(route, names)])
        for name in ours.values():
            if links[name].kind == "tun":
                state.add(self._tunnels.items(name))
        return state

    def _observe_routes(
        self, state: State, index: int, names: dict[int, str], users: dict[RouteKey, int]
    ) -> None:
        """The routes on one device, and in `users` the nexthop object that each goes through, if any.

        The usual ones, through an object of ours, are made from their rows without a detour: 10,000 of them.
        """
        by_number, name, usual = self._nexthops.by_number, names[index], replies.usual_route(index)
        for family in (codec.AF_INET, codec.AF_INET6):
            for row in route_rows(self._netlink, family, index=index):
                through = by_number.get(row[replies.ROUTE_NEXTHOP])
                if through is not None and replies.what_is_usual(row) == usual:
                    length, metric, number, address = replies.pick_usual(row)
                    destination, metric = Prefix(address, length), metric or 0
                    key = destination, metric
                    users[key] = number
                    state.routes[key] = Route(
                        destination, name, through.gateway, through.onlink, metric=metric
                    )
                    continue
                info = replies.route_of(row)
                if info is None or info.table != codec.RT_TABLE_MAIN or info.ifindex != index:
                    continue
                if info.nexthop:
                    users[info.destination, info.metric] = info.nexthop
                if info.protocol != PROTOCOL_KERNEL and not is_kernels_own(info.destination):
                    state.add([self._route(info, names)])

    def _read_nexthops(self, devices: dict[int, str]) -> None:
        if not self._use_nexthops:
            return
        try:
            rows = self._netlink.rows(codec.nexthop_dump(), replies.NEXTHOPS)
        except NetlinkError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._use_nexthops = False  # Linux < 5.3
            return
        self._nexthops.load(map(replies.nexthop_of, rows), devices)

    def _route(self, info: RouteInfo, names: dict[int, str]) -> Route:
        gateway, onlink = info.gateway, info.onlink
        through = self._nexthops.by_number.get(info.nexthop)
        if through is not None:
            gateway, onlink = through.gateway, through.onlink
        if info.type == codec.RTN_BLACKHOLE:
            return Route(info.destination, BLACKHOLE, None, protocol=info.protocol, metric=info.metric)
        device = names.get(info.ifindex, "?")
        return Route(info.destination, device, gateway, onlink, info.protocol, info.metric, info.extra)

    # --- apply -------------------------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> list[Failure]:
        """Do all of it, in order; the failures. What is not among them is done."""
        failures: list[Failure] = []
        for kind, group in groupby(ops, _edge):
            part = list(group)
            if kind is Link:
                failures += self._apply_links(part)
            elif kind is Tunnel:
                failures += self._tunnels.carry_out(part)
            else:
                failures += self._apply_bulk(part)
        return failures

    def _apply_links(self, ops: Sequence[Op]) -> list[Failure]:
        failures = []
        for op in ops:
            link = op.item
            if isinstance(link, Link):
                if isinstance(op, Remove) and link.name in self._links.by_name:
                    self._nexthops.forget_device(self._links.index(link.name))
                failures += self._links.apply(op, link)
                self._narrow()
        return failures

    def _apply_bulk(self, ops: Sequence[Op]) -> list[Failure]:
        """Everything but links and tunnels: one batch, errors attributed to their operation by its number."""
        failures = self._make_nexthops(ops)
        messages: list[Message] = []
        owners: list[Op] = []
        for op in ops:
            if id(op) in failures:
                continue
            try:
                encoded = self._encode(op)
            except NetlinkError as error:
                failures[id(op)] = Failure(op, error)
                continue
            messages += encoded
            owners += [op] * len(encoded)
        for position, refusal in self._netlink.batch(messages).items():
            op = owners[position]
            if not (isinstance(op, Remove) and refusal.errno in GONE):
                failures.setdefault(id(op), Failure(op, refusal))
        for failure in failures.values():
            if isinstance(failure.op.item, Route):
                self._nexthops.use(failure.op.item.key, 0)
        self._netlink.batch([codec.nexthop_delete(number) for number in self._nexthops.unused()])
        return self._explained(list(failures.values()))

    def _explained(self, failures: list[Failure]) -> list[Failure]:
        """Name who stands in the way of a route."""
        if not any(isinstance(f.op.item, Route) and f.error.errno == errno.EEXIST for f in failures):
            return failures
        names = {link.ifindex: name for name, link in self._links.by_name.items()}
        holders = {route.destination: names.get(route.ifindex, "?") for route in main_routes(self._netlink)}
        found = []
        for failure in failures:
            item = failure.op.item
            if (
                isinstance(item, Route)
                and failure.error.errno == errno.EEXIST
                and item.destination in holders
            ):
                words = f"{holders[item.destination]} has a route to it already, which is left alone"
                found.append(failure._replace(error=NetlinkError(errno.EEXIST, words)))
            else:
                found.append(failure)
        return found

    def _encode(self, op: Op) -> list[Message]:
        item = op.item
        put = isinstance(op, Put)
        match item:
            case FdbEntry():
                return _fdb_messages(op, item, self._links.index(item.device))
            case Neighbour(device=device, address=address, mac=mac):
                index = self._links.index(device)
                if put:
                    return [codec.neighbour_put(index, address, mac)]
                return [codec.neighbour_delete(index, address)]
            case Route():
                if isinstance(op, Put):
                    return self._route_messages(item, replace=op.was is not None)
                return self._route_removal(item)
            case DeviceAddress(device=device, prefix=prefix):
                index = self._links.index(device)
                return [codec.address_put(index, prefix) if put else codec.address_delete(index, prefix)]
            case Link() | Tunnel() | Forward():
                raise TypeError(f"{item} is not applied in bulk")

    def _make_nexthops(self, ops: Sequence[Op]) -> dict[int, Failure]:
        """The objects that new routes will go through, before any of these routes.

        A route must not go through an object that somebody else made under the number that we chose.
        """
        messages: list[Message] = []
        wanted: list[tuple[Op, Way]] = []
        for op in ops:
            item = op.item
            if isinstance(op, Put) and isinstance(item, Route):
                way = self._way(item)
                number, new = self._nexthops.number_for(way) if way is not None else (0, False)
                if way is not None and new:
                    messages.append(codec.nexthop_put(number, *way, ROUTE_PROTOCOL))
                    wanted.append((op, way))
        failures = {}
        for position, refusal in self._netlink.batch(messages).items():
            op, way = wanted[position]
            self._nexthops.refused(way)
            failures[id(op)] = Failure(op, refusal)
        return failures

    def _way(self, route: Route) -> Way | None:
        """The way of a route that goes through a nexthop object; None for a plain route."""
        if route.gateway is None or not route.onlink or not self._use_nexthops:
            return None
        link = self._links.by_name.get(route.device)
        return (link.ifindex, route.gateway) if link is not None else None

    def _route_messages(self, route: Route, *, replace: bool) -> list[Message]:
        index = self._links.index(route.device) if route.device != BLACKHOLE else 0
        way = self._way(route)
        if way is None:
            self._nexthops.use(route.key, 0)
            return [codec.plain_route_put(route, index, replace=replace)]
        number, new = self._nexthops.number_for(way)
        if new:
            self._nexthops.refused(way)
            raise NetlinkError(errno.ENOENT, "its nexthop object could not be made")
        self._nexthops.use(route.key, number)
        return [codec.route_put(route, number, replace=replace)]

    def _route_removal(self, route: Route) -> list[Message]:
        self._nexthops.use(route.key, 0)
        return [codec.route_delete(route.destination, route.metric, route.protocol)]


def _edge(op: Op) -> type[Item] | None:
    """What an operation is applied through, where it is not netlink in bulk."""
    if isinstance(op.item, Link):
        return Link
    return Tunnel if isinstance(op.item, Tunnel | Forward) else None


def _fdb_messages(op: Op, entry: FdbEntry, index: int) -> list[Message]:
    if isinstance(op, Remove):
        return [codec.fdb_delete(index, entry.mac, None)]  # with all its remotes
    messages = [codec.fdb_put(index, entry.mac, entry.remote)]
    if isinstance(op.was, FdbEntry) and op.was.others:
        # "replace" turned the first remote into ours, or found ours already there; the rest must go.
        surplus = {op.was.remote, *op.was.others} - {entry.remote}
        messages += [codec.fdb_delete(index, entry.mac, remote) for remote in sorted(surplus)]
    return messages


def require_privileges() -> None:
    """Raise KernelError unless this process may change the network (CAP_NET_ADMIN)."""
    effective = 0
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
        for line in status:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
    if not effective >> 12 & 1:
        raise KernelError(
            "no privileges: run as root or with CAP_NET_ADMIN (in systemd: AmbientCapabilities=)"
        )
