"""`/metrics`: what is counted and how the node is, in Prometheus' text format.

`families` says it in values, and prometheus-client writes them. That library is imported by the first scrape:
a start does without it. No series is made for a single peer, so a large cluster costs no more of them than a
small one; which peers have a trouble, `flannelpy status` tells.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from flannelpy import __version__
from flannelpy.endpoints import Answer
from flannelpy.health import Health
from flannelpy.metrics import HEAL_SECONDS, RTT_SECONDS
from flannelpy.model.probe import MEANING
from flannelpy.model.subnet import pools
from flannelpy.status import Node
from flannelpy.verdict import Verdict

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"


Series: TypeAlias = Mapping[tuple[str, ...], float]
"""Values of the labels -> value. Of a histogram: upper bound -> how many are no larger, and "sum"."""


class Family(NamedTuple):
    """A metric with its series."""

    name: str
    """Without the `_total` of a counter."""
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    series: Series = MappingProxyType({})


def families(node: Node | None, packets: Mapping[str, int], health: Health, verdict: Verdict) -> list[Family]:
    """Everything. `node` is None before there is one; `packets` is what a forwarder has counted."""
    return [
        *_state(health, verdict),
        *_counts(health, packets),
        *(() if node is None else _of_node(node)),
    ]


def _one(name: str, kind: str, text: str, value: float) -> Family:
    return Family(name, kind, text, (), {(): value})


def _state(health: Health, verdict: Verdict) -> Iterator[Family]:
    yield Family("build_info", GAUGE, "The version that runs.", ("version",), {(__version__,): 1})
    yield _one("ready", GAUGE, "1 when /readyz says yes.", verdict.ready)
    yield _one("degraded", GAUGE, "1 when something is wrong, ready or not.", verdict.state != "ready")
    yield _one("stuck", GAUGE, "1 when /healthz says no.", verdict.stuck is not None)
    yield _one("store_up", GAUGE, "1 when the datastore answers.", health.store_trouble is None)
    yield _one(
        "store_trouble_since_timestamp_seconds",
        GAUGE,
        "Since when the datastore does not answer; 0 when it does.",
        health.store_trouble_since if health.store_trouble else 0,
    )
    yield _one("lease_held", GAUGE, "1 when our lease is ours.", health.lease_trouble is None)
    yield _one(
        "lease_expiry_timestamp_seconds",
        GAUGE,
        "When our lease ends unless it is renewed; 0 before there is one.",
        health.lease_expires,
    )
    yield _one("lease_conflict", GAUGE, "1 when another machine claims our lease.", bool(health.conflict))
    yield _one(
        "rules_ok", GAUGE, "1 when masquerade and forward rules stand and help.", not health.rules_trouble
    )
    yield _one("own_device_ok", GAUGE, "1 when our own device stands.", health.own_trouble is None)
    yield _one(
        "config_pending",
        GAUGE,
        "1 when the datastore has a config that waits for a restart.",
        health.config_pending is not None,
    )
    states: Series = {
        ("programmed",): health.peers - len(health.missing),
        ("missing",): len(health.missing),
        ("refused",): len(health.refused),
        ("unreadable",): len(health.unreadable),
        ("held",): health.held,
    }
    yield Family(
        "peers",
        GAUGE,
        "Peers by state: in the kernel, not (all) in the kernel, refused, with an unreadable or no record.",
        ("state",),
        states,
    )
    yield _one("peers_wanted", GAUGE, "Peers that should be in the kernel.", health.peers)


def _counts(health: Health, packets: Mapping[str, int]) -> Iterator[Family]:
    metrics = health.metrics
    yield _one("reconcile_passes", COUNTER, "Passes of the reconciler, partial ones too.", metrics.passes)
    yield _one("kernel_operations", COUNTER, "Changes that the kernel carried out.", metrics.operations)
    yield _one("kernel_refusals", COUNTER, "Changes that the kernel refused.", metrics.failures)
    yield _one(
        "record_refusals", COUNTER, "Records refused or unreadable for a new reason.", metrics.refusals
    )
    yield _one(
        "store_troubles", COUNTER, "Times the datastore failed for a new reason.", metrics.store_troubles
    )
    repairs: dict[tuple[str, ...], float] = {}
    for (kind, noticed), count in metrics.repairs.items():
        action, _, what = kind.partition(" ")
        repairs[action, what.lower(), noticed] = count
    yield Family(
        "repairs",
        COUNTER,
        "Changes that put right what somebody else had damaged.",
        ("action", "object", "noticed"),
        repairs,
    )
    times = _classes(metrics.heal_times, HEAL_SECONDS, metrics.heal_seconds)
    yield Family("repair_duration_seconds", HISTOGRAM, "From a damage's notice to its repair.", (), times)
    probes: Series = {(result,): count for result, count in metrics.probes.items()}
    yield Family("probes", COUNTER, "Probes of peers: reached, or the layer at fault.", ("result",), probes)
    rtts = _classes(metrics.rtts, RTT_SECONDS, metrics.rtt_seconds)
    yield Family("peer_rtt_seconds", HISTOGRAM, "Round trips to peers through the overlay.", (), rtts)
    unreached = Counter(health.unreached.values())
    yield Family(
        "unreached_peers",
        GAUGE,
        "Peers that do not answer (all) probes, by the layer at fault.",
        ("layer",),
        {(layer,): unreached[layer] for layer in MEANING},
    )
    yield Family(
        "unexplained_packets",
        COUNTER,
        "Encapsulated packets from no peer (stranger), or from a peer's other address (natted).",
        ("reason",),
        {("stranger",): metrics.stranger_packets, ("natted",): metrics.natted_packets},
    )
    if packets:
        carried: Series = {(name.removesuffix("_packets"),): packets.get(name, 0) for name in _CARRIED}
        dropped: Series = {
            (name.removeprefix("drop_"),): count
            for name, count in packets.items()
            if name.startswith("drop_")
        }
        yield Family("forwarder_packets", COUNTER, "udp: packets carried.", ("direction",), carried)
        yield Family("forwarder_drops", COUNTER, "udp: packets dropped, by reason.", ("reason",), dropped)


def _classes(counted: Mapping[float, int], bounds: Sequence[float], total: float) -> Series:
    """Of a histogram: each class holds the smaller ones, too."""
    found: dict[tuple[str, ...], float] = {}
    count = 0
    for bound in bounds:
        count += counted.get(bound, 0)
        found[f"{bound:g}",] = count
    found["+Inf",] = count + counted.get(float("inf"), 0)
    found["sum",] = total
    return found


_CARRIED = ("sent_packets", "received_packets")


def _of_node(node: Node) -> Iterator[Family]:
    own = node.own is not None and node.own.key in node.leases
    yield _one("leases", GAUGE, "Records of other nodes in the datastore.", len(node.leases) - own)
    yield _one(
        "uplink_mtu_bytes", GAUGE, "The MTU of the interface that carries the overlay.", node.facts.uplink.mtu
    )
    yield _one("overlay_mtu_bytes", GAUGE, "The MTU that pods are given.", node.backend.mtu(node.facts))
    sizes: dict[tuple[str, ...], float] = {}
    used: dict[tuple[str, ...], float] = {}
    leases = node.leases.values()
    for family, pool, subnets in (
        ("ipv4", pools(node.config)[0], [lease.subnet for lease in leases if lease.subnet]),
        ("ipv6", pools(node.config)[1], [lease.subnet6 for lease in leases if lease.subnet6]),
    ):
        if pool is not None:
            sizes[family,] = pool.size
            used[family,] = sum(last - first + 1 for first, last in pool.taken(subnets))
    yield Family("pool_subnets", GAUGE, "Subnets that may be leased.", ("family",), sizes)
    yield Family("pool_used_subnets", GAUGE, "Those of them that are taken.", ("family",), used)


# --- with prometheus-client ---


class Exposition:
    """Renders families; owned by one daemon."""

    def __init__(self) -> None:
        self._registry: CollectorRegistry | None = None
        self._now: list[Family] = []

    def page(self, found: list[Family]) -> Answer:
        """The answer to a scrape."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
            ProcessCollector(registry=self._registry)  # CPU, memory, descriptors
        self._now = found
        return Answer(200, generate_latest(self._registry), CONTENT_TYPE_LATEST)

    def collect(self) -> "Iterator[Metric]":
        """The protocol of prometheus-client's collectors."""
        return map(_metric, self._now)


def _metric(family: Family) -> "Metric":
    from prometheus_client import metrics_core as core

    name = f"flannelpy_{family.name}"
    if family.kind == HISTOGRAM:
        buckets = [(bound, value) for (bound,), value in family.series.items() if bound != "sum"]
        return core.HistogramMetricFamily(name, family.help, buckets=buckets, sum_value=family.series["sum",])
    made: Any = core.GaugeMetricFamily if family.kind == GAUGE else core.CounterMetricFamily
    metric: Metric = made(name, family.help, labels=family.labels)
    for labels, value in family.series.items():
        metric.add_metric(labels, float(value))  # type: ignore[attr-defined]
    return metric
