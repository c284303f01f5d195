"""Which interface the overlay runs over, and which addresses of it the peers are told.

The rules are flannel's (`--iface` in order, then `--iface-regex`, then `--iface-can-reach`; with none of
them the public IP's interface, else the default route's), as a pure choice over what the kernel listed. The
two families of a dual-stack node always come from one interface.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from flannelpy.model.address import (
    Address,
    Prefix,
    format_address,
    is_link_local,
    is_unicast,
    parse_address,
)


class InterfaceAddress(NamedTuple):
    """One address of an interface."""

    prefix: Prefix
    """The address itself with its length, host bits kept."""
    deprecated: bool = False
    permanent: bool = True
    """Configured without a lifetime, as opposed to DHCP or router advertisements."""
    temporary: bool = False
    """An IPv6 privacy address."""


class Interface(NamedTuple):
    """One interface, its addresses in kernel order."""

    ifindex: int
    name: str
    mtu: int
    addresses: tuple[InterfaceAddress, ...]


class DefaultRoute(NamedTuple):
    """One default route of the main table, in kernel order."""

    bits: int
    """32 or 128: the family."""
    ifindex: int
    """The output interface; 0 when it has several next hops."""
    metric: int


class Uplink(NamedTuple):
    """The interface that was chosen. Addresses of a family that the network does not use are None."""

    name: str
    ifindex: int
    mtu: int
    address: Address | None
    address6: Address | None
    public_ip: Address | None
    """Where peers send to: `address` unless the operator names another one (NAT)."""
    public_ipv6: Address | None


class Wish(NamedTuple):
    """What the operator asked for."""

    iface: tuple[str, ...] = ()
    """IP addresses or names."""
    iface_regex: tuple[str, ...] = ()
    can_reach: Address | None = None
    public_ip: Address | None = None
    public_ipv6: Address | None = None


class NoUplink(ValueError):  # noqa: N818
    """No interface fits: one line with what was tried, what there is, and which flag decides."""


class _Found(NamedTuple):
    """An interface that a rule points to, with the addresses that the rule fixes."""

    interface: Interface
    reason: str
    address: Address | None = None
    address6: Address | None = None

    def fixes_all(self, host: "_Host") -> bool:
        return not (host.want_v4 and self.address is None) and not (host.want_v6 and self.address6 is None)


class _Host(NamedTuple):
    """All that the rules look at."""

    interfaces: Sequence[Interface]
    defaults: Sequence[DefaultRoute]
    route_to: Callable[[Address], tuple[int, Address] | None]
    want_v4: bool
    want_v6: bool

    def underlay(self) -> Iterator[Interface]:
        """Interfaces that may be found by search: an overlay device over itself would be a loop."""
        return (interface for interface in self.interfaces if not OVERLAY_NAME.fullmatch(interface.name))

    def by_index(self, index: int) -> Interface | None:
        return next((interface for interface in self.underlay() if interface.ifindex == index), None)

    def owner(self, address: Address) -> Interface | None:
        for interface in self.interfaces:
            if any(own.prefix.address == address for own in interface.addresses):
                return interface
        return None


OVERLAY_NAME = re.compile(r"flannel(\.|-v6\.|-wg|[0-9]).*")
"""Overlay devices, flannel's and ours: flannel.1, flannel-v6.1, flannel-wg, flannel0, flannel.ipip."""


def choose(
    wish: Wish,
    want_v4: bool,
    want_v6: bool,
    interfaces: Sequence[Interface],
    defaults: Sequence[DefaultRoute],
    route_to: Callable[[Address], tuple[int, Address] | None],
) -> tuple[Uplink, str]:
    """The uplink, and the reason for the choice as a line for the log; raises `NoUplink`.

    `route_to` asks the kernel how it would reach an address: (output interface, source address), or None.
    """
    host = _Host(interfaces, defaults, route_to, want_v4, want_v6)
    for flag, public in (("--public-ip", wish.public_ip), ("--public-ipv6", wish.public_ipv6)):
        if public is not None and not is_unicast(public):
            raise NoUplink(f"{flag} {format_address(public)} is not an address that peers can send to")
    failures: list[str] = []
    for rule in _rules(wish, host):
        try:
            return _uplink(_first_complete(rule(), host), wish, host)
        except NoUplink as failure:
            failures.append(str(failure))
    raise NoUplink(
        f"no usable uplink: {'; '.join(failures)}. Name the interface to run over with --iface (its name or "
        f"an address of it); there are {_listed(host)}"
    )


def _rules(wish: Wish, host: _Host) -> Iterator[Callable[[], list[_Found]]]:
    """The rules that apply, in order; each lists the interfaces it allows, best first, or raises."""
    for text in wish.iface:
        yield partial(_named, text, host)
    for text in wish.iface_regex:
        yield partial(_matching, text, host)
    if wish.can_reach is not None:
        yield partial(_leading_to, wish.can_reach, host)
    if wish.iface or wish.iface_regex or wish.can_reach is not None:
        return
    if (host.want_v4 and wish.public_ip is not None) or (host.want_v6 and wish.public_ipv6 is not None):
        yield partial(_owning_public_ip, wish, host)
    else:
        yield partial(_on_default_route, host)


def _named(text: str, host: _Host) -> list[_Found]:
    try:
        address = parse_address(text)
    except ValueError:
        named = [interface for interface in host.interfaces if interface.name == text]
        if not named:
            raise NoUplink(f"--iface {text}: there is no interface of this name") from None
        return [_Found(named[0], "named by --iface")]
    owner = host.owner(address)
    if owner is None:
        raise NoUplink(f"--iface {text}: no interface has this address")
    return [_fixed(owner, f"owner of {text}, named by --iface", address)]


def compile_regex(text: str) -> re.Pattern[str]:
    """A regular expression as flannel takes it: Python's syntax, and Go's classes such as `[[:alpha:]]`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python reads another way than Go is none
            return re.compile(_POSIX_CLASS.sub(lambda match: _POSIX_CLASSES[match[1]], text))
    except (re.error, FutureWarning, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _matching(text: str, host: _Host) -> list[_Found]:
    """Interfaces with matching addresses (of all families before of one), then those with matching names."""
    try:
        pattern = compile_regex(text)
    except ValueError as error:
        raise NoUplink(f"--iface-regex {text!r} is not a regular expression: {error}") from None
    by_all, by_one, by_name = [], [], []
    for interface in host.underlay():
        matches = [
            next((own for own in _usable(interface, bits) if pattern.search(format_address(own))), None)
            for bits in (32, 128)
        ]
        address = matches[0] if host.want_v4 else None
        address6 = matches[1] if host.want_v6 else None
        shown = " and ".join(format_address(own) for own in (address, address6) if own is not None)
        if shown:
            found = _Found(interface, f"{shown} matches --iface-regex {text!r}", address, address6)
            by_all.append(found) if found.fixes_all(host) else by_one.append(found)
        elif pattern.search(interface.name):
            by_name.append(_Found(interface, f"its name matches --iface-regex {text!r}"))
    if not by_all + by_one + by_name:
        raise NoUplink(f"--iface-regex {text!r} matches no address and no name of an interface")
    return by_all + by_one + by_name


def _leading_to(target: Address, host: _Host) -> list[_Found]:
    flag = f"--iface-can-reach {format_address(target)}"
    way = host.route_to(target)
    if way is None:
        raise NoUplink(f"{flag}: there is no route to it")
    index, source = way
    interface = host.by_index(index)
    if interface is None or interface.name == "lo":
        raise NoUplink(f"{flag}: the route to it does not leave over an underlay interface")
    return [_fixed(interface, f"the way to {format_address(target)} (--iface-can-reach)", source)]


def _owning_public_ip(wish: Wish, host: _Host) -> list[_Found]:
    """With a public IP and no other flag the public IP must be one of ours, as in flannel."""
    address = wish.public_ip if host.want_v4 else None
    address6 = wish.public_ipv6 if host.want_v6 else None
    owners: list[Interface] = []
    for flag, public in (("--public-ip", address), ("--public-ipv6", address6)):
        owner = None if public is None else host.owner(public)
        if owner is not None:
            owners.append(owner)
        elif public is not None:
            raise NoUplink(
                f"{flag} {format_address(public)} is not an address of this host: if it is translated (NAT), "
                f"add --iface"
            )
    if owners[0] != owners[-1]:
        names = f"{owners[0].name} and {owners[-1].name}"
        raise NoUplink(f"--public-ip and --public-ipv6 are addresses of two interfaces, {names}")
    return [_Found(owners[0], "owner of the public IP", address, address6)]


def _on_default_route(host: _Host) -> list[_Found]:
    wanted = [bits for bits, want in ((32, host.want_v4), (128, host.want_v6)) if want]
    listed = [_default_interfaces(bits, host) for bits in wanted]
    common = [interface for interface in listed[0] if interface in listed[-1]]
    if not common:
        raise NoUplink(
            f"the IPv4 default route leads to {listed[0][0].name}, the IPv6 one to {listed[-1][0].name}, "
            f"and both must run over one interface"
        )
    return [_Found(common[0], "owner of the default route")]


def _default_interfaces(bits: int, host: _Host) -> list[Interface]:
    """The interfaces of one family's default routes, the preferred route first."""
    family = "IPv4" if bits == 32 else "IPv6"
    routes = sorted((route for route in host.defaults if route.bits == bits), key=lambda route: route.metric)
    if routes and routes[0].ifindex == 0:
        raise NoUplink(f"the {family} default route has several next hops")
    interfaces = [interface for route in routes if (interface := host.by_index(route.ifindex)) is not None]
    if not interfaces:
        raise NoUplink(f"there is no {family} default route")
    return interfaces


def _fixed(interface: Interface, reason: str, address: Address) -> _Found:
    """An interface together with one address of it that must be used, if its family is wanted."""
    if len(address) == 4:
        return _Found(interface, reason, address=address)
    return _Found(interface, reason, address6=address)


def _usable(interface: Interface, bits: int) -> list[Address]:
    """The addresses of one family that may be used, best first: global, permanent, not temporary."""
    usable = [
        own
        for own in interface.addresses
        if own.prefix.bits == bits and not own.deprecated and is_unicast(own.prefix.address)
    ]
    usable.sort(key=lambda own: (is_link_local(own.prefix.address), not own.permanent, own.temporary))
    return [own.prefix.address for own in usable]


def _first_complete(candidates: list[_Found], host: _Host) -> _Found:
    """The first candidate that can serve; the trouble with the first one if none can."""
    problems: list[NoUplink] = []
    for found in candidates:
        try:
            return _complete(found, host)
        except NoUplink as problem:
            problems.append(problem)
    raise problems[0]


def _complete(found: _Found, host: _Host) -> _Found:
    """The same with an address of each wanted family and of no other."""
    interface = found.interface
    if interface.mtu <= 0:
        raise NoUplink(f"{interface.name} ({found.reason}) has MTU {interface.mtu}")
    chosen: list[Address | None] = []
    for bits, want, fixed in ((32, host.want_v4, found.address), (128, host.want_v6, found.address6)):
        address = None
        if want:
            address = fixed if fixed is not None else next(iter(_usable(interface, bits)), None)
            if address is None:
                family = "IPv4" if bits == 32 else "IPv6"
                raise NoUplink(f"{interface.name} ({found.reason}) has no usable {family} address")
        chosen.append(address)
    return found._replace(address=chosen[0], address6=chosen[1])


def _uplink(found: _Found, wish: Wish, host: _Host) -> tuple[Uplink, str]:
    name, index, mtu = found.interface.name, found.interface.ifindex, found.interface.mtu
    public_ip = wish.public_ip if host.want_v4 and wish.public_ip is not None else found.address
    public_ipv6 = wish.public_ipv6 if host.want_v6 and wish.public_ipv6 is not None else found.address6
    shown = ", ".join(format_address(own) for own in (found.address, found.address6) if own is not None)
    reason = f"{name} ({shown}), MTU {mtu}: {found.reason}"
    for flag, public, own in (
        ("--public-ip", public_ip, found.address),
        ("--public-ipv6", public_ipv6, found.address6),
    ):
        if public is not None and public != own:
            reason += f"; public IP {format_address(public)} from {flag}"
    return Uplink(name, index, mtu, found.address, found.address6, public_ip, public_ipv6), reason


def _listed(host: _Host) -> str:
    """The interfaces with their addresses for a message; those with usable global addresses first."""

    def lacks_address(interface: Interface) -> bool:
        addresses = _usable(interface, 32) + _usable(interface, 128)
        return all(is_link_local(address) for address in addresses)

    shown = [
        f"{interface.name} ({', '.join(format_address(own.prefix.address) for own in interface.addresses)})"
        for interface in sorted(host.interfaces, key=lacks_address)
    ]
    more = f" and {len(shown) - _MOST_LISTED} more" if len(shown) > _MOST_LISTED else ""
    return (", ".join(shown[:_MOST_LISTED]) or "no interfaces") + more


_MOST_LISTED = 12

_POSIX_CLASS = re.compile(r"\[:(alnum|alpha|digit|lower|space|upper|word|xdigit):\]")
_POSIX_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "digit": "0-9",
    "lower": "a-z",
    "space": r"\s",
    "upper": "A-Z",
    "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}
"""Go's regular expressions know them inside of brackets, Python's do not."""
