"""All checks, in the order in which a start meets what they look at. Pure."""

from collections.abc import Callable, Iterable

from flannelpy.doctor import host, overlay, paths, store
from flannelpy.doctor.facts import Facts
from flannelpy.doctor.finding import Finding, in_order

CHECKS: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    host.subnet_env,
    host.privileges,
    host.daemon,
    host.kernel_features,
    store.store,
    store.certificates,
    store.clock,
    store.config,
    store.records,
    host.uplink,
    overlay.lease,
    overlay.tables,
    overlay.refused,
    host.forwarding,
    host.reverse_path,
    host.rules,
    host.bridges,
    host.peer_filter,
    paths.paths,
)


def examine(facts: Facts) -> tuple[Finding, ...]:
    """What all of them find, the worst first."""
    return in_order(finding for check in CHECKS for finding in check(facts))
