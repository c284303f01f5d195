"""Leases in Kubernetes, as flannel keeps them: annotations of the Node objects, the subnet is the podCIDR.

Who gets which podCIDR is decided by Kubernetes. A claim is the node's annotations; it does not expire.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from random import Random, SystemRandom
from typing import Any

from flannelpy.errors import StoreError
from flannelpy.files import read_regular
from flannelpy.model.address import Address, format_address
from flannelpy.model.annotations import key_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs, LeaseUpdate, Snapshot
from flannelpy.model.subnet import Previous
from flannelpy.store import Head, Marks, Offer, Running
from flannelpy.store import kube_codec as codec
from flannelpy.store import kube_report as report
from flannelpy.store.kube_client import KubeClient, KubeError, node_path
from flannelpy.store.kube_nodes import ExpiredError, Nodes
from flannelpy.store.retry import Retry

log = logging.getLogger(__name__)

_LARGEST_CONFIG = 1 << 20
_LOOK_SECONDS = 5.0
"""Between two looks at the config's file. kubelet replaces it by way of a link, a minute after a change."""
_WAIT_SECONDS = 60
"""How long one watch waits for our node to get its podCIDR."""
_BOOT_SECONDS = 180.0
"""A machine that has been up for less may be one of very many."""
_SPREAD_SECONDS = 3.0
"""So long they wait at most before their first list."""
_REPORT_SECONDS = (1.0, 60.0)
"""First and longest wait before a condition is sent once more."""


class KubeStore:
    """The Store in Kubernetes; owns the client.

    `on_trouble` is told in one line why it cannot go on, and None once it can again. `up_for` tells for how
    many seconds the machine has been up.
    """

    def __init__(
        self,
        client: KubeClient,
        environ: Mapping[str, str],
        prefix: str,
        config_path: str,
        *,
        set_condition: bool,
        random: Random | None = None,
        on_trouble: Callable[[str | None], None] | None = None,
        up_for: Callable[[], float] | None = None,
    ) -> None:
        self._client = client
        self._environ = environ
        self._prefix = key_prefix(prefix)
        self._random = random or SystemRandom()
        self._on_trouble = on_trouble
        self._up_for = up_for or partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        self._troubles: dict[str, str] = {}
        self._set_condition = set_condition
        self._nodes = Nodes(client, self._prefix, self._random)
        self._name = ""
        self._handed: Snapshot | None = None
        self._watching = False
        self._lacking: tuple[str, str] | None = None
        """Why our node has no subnet, as it was told."""
        self.config_place = config_path

    @property
    def head(self) -> Head | None:
        """See Store. Kubernetes has no name for its history."""
        return Head(0, 0, self._nodes.revision) if self._nodes.revision else None

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self._client.place

    def remember(self, head: Head, marks: Marks) -> None:
        """See Store."""
        self._nodes.remember(head.revision, list(marks))

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    async def watch_config(self) -> AsyncGenerator[str | None, None]:
        """The text of the file now and whenever it changes; None while there is none."""
        known: tuple[str | None] | None = None
        seen: tuple[int, ...] | None = None
        while True:
            now = _mark(self.config_place)
            if now != seen:
                seen = now
                text = _read_config(self.config_place)
                if known != (text,):
                    known = (text,)
                    yield text
            await asyncio.sleep(_LOOK_SECONDS)

    # --- our own node ------------------------------------------------------------------------------------

    async def operator_addresses(self) -> tuple[Address | None, Address | None]:
        """What the node's annotations say instead of --public-ip and --public-ipv6; waits for an answer."""
        retry = Retry(self._random, partial(self._report, "node"))
        while True:
            try:
                node = await self._read_own()
                addresses = codec.operator_addresses(node)
            except StoreError as error:
                if not error.transient:
                    raise
                await retry.failed(str(error), _wish(error))
            except ValueError as error:
                await retry.failed(f"an annotation of node {self._name} cannot be used: {error}")
            else:
                retry.succeeded()
                for address in filter(None, addresses):
                    log.info("public IP %s, by annotation of node %s", format_address(address), self._name)
                return addresses

    async def _own_name(self) -> str:
        """NODE_NAME, or what the pod of POD_NAMESPACE and POD_NAME says."""
        if self._name:
            return self._name
        name = self._environ.get("NODE_NAME", "")
        if not name:
            pod, namespace = self._environ.get("POD_NAME", ""), self._environ.get("POD_NAMESPACE", "")
            if not pod or not namespace:
                raise StoreError(
                    "which node this is is not known: set NODE_NAME (or POD_NAME and POD_NAMESPACE) by the"
                    " downward API, as flannelpy's manifest does"
                )
            if not codec.is_name(pod) or not codec.is_name(namespace):
                raise StoreError("POD_NAME and POD_NAMESPACE must be the names of a pod and its namespace")
            value = await self._client.get(f"/api/v1/namespaces/{namespace}/pods/{pod}")
            spec = value.get("spec") if isinstance(value, dict) else None
            name = str(spec.get("nodeName") or "") if isinstance(spec, dict) else ""
        if not codec.is_name(name):
            raise StoreError(f"NODE_NAME is {ascii(name)[:64]}: it must be the name of a Kubernetes node")
        self._name = name
        return name

    async def _read_own(self) -> codec.Node:
        name = await self._own_name()
        try:
            return self._decode(await self._client.get(node_path(name)))
        except KubeError as error:
            if error.status == 404:
                raise KubeError(
                    f"there is no node {name} in this cluster: is NODE_NAME right?",
                    404,
                ) from None
            raise

    def _decode(self, value: Any) -> codec.Node:
        try:
            return codec.read_node(value, self._prefix)
        except ValueError as error:
            raise KubeError(f"node {self._name} cannot be read: {error}") from None

    async def acquire(
        self,
        config: NetworkConfig,
        offer: Offer,
        previous: Previous,  # noqa: ARG002
        running: Running | None = None,  # noqa: ARG002
    ) -> Lease:
        """Tell the peers where our podCIDR is; see Store. Nothing of an earlier life is asked for.

        Without a podCIDR: says so to Kubernetes, too, and raises StoreError(transient=True); the next call
        waits a while for one.
        """
        families = self._nodes.families = codec.families_of(config)
        node = await self._read_own()
        lacking = _lacking(node, config)
        if lacking is not None:
            if lacking == self._lacking:
                await self._wait_for_change(node)
                node = await self._read_own()
                lacking = _lacking(node, config)
            if lacking is not None:
                await self._tell_lacking(*lacking)
                raise StoreError(lacking[1], transient=lacking[0] == "NoPodCIDR")
        self._lacking = None
        self._report("podCIDR", None)
        if not self._watching:
            await self._spread()
            self._handed = await self._nodes.read_all()
        others = tuple(lease for name, lease in self._nodes.leases.items() if name != node.name)
        own = await self._write(node, offer(codec.remembered_of(node, families), others))
        if self._handed is not None:  # the list is from before
            self._nodes.leases[own.key] = own
            leases = (*(lease for lease in self._handed.leases if lease.key != own.key), own)
            bad = tuple(one for one in self._handed.unreadable if one[0] != own.key)
            self._handed = self._handed._replace(leases=leases, unreadable=bad)
        return own

    async def _spread(self) -> None:
        """After a power cut all nodes start at once: not all of them list all of them at once."""
        if self._up_for() < _BOOT_SECONDS:
            await asyncio.sleep(self._random.uniform(0.0, _SPREAD_SECONDS))

    async def _write(self, node: codec.Node, attrs: LeaseAttrs) -> Lease:
        """Make the annotations say this -> our lease as peers read it."""
        families = self._nodes.families
        try:
            change = codec.differing(node, codec.written(attrs, node, families), self._prefix)
            if change:
                patch = {"metadata": {"annotations": change}}
                node = self._decode(await self._client.patch(node_path(node.name, "/status"), patch))
            own = codec.lease_of(node, families)
        except ValueError as error:
            raise KubeError(f"an annotation of node {node.name} cannot be used: {error}") from None
        if own is None:
            raise KubeError(f"node {node.name} did not take our annotations")
        self._nodes.own = own
        return own

    async def renew(self, own: Lease) -> Lease | None:
        """Write the annotations again if they are not as we wrote them; None for another podCIDR."""
        try:
            node = await self._read_own()
        except KubeError as error:
            if error.status == 404:
                return None
            raise
        try:
            subnets = codec.subnets_of(node, self._nodes.families)
        except ValueError:
            return None
        return await self._write(node, own.attrs) if subnets == (own.subnet, own.subnet6) else None

    async def sign(self, own: Lease, identity: str) -> None:
        """Nothing: a node has one kubelet, and that one starts one of us."""

    @property
    def replaced(self) -> str | None:
        """Nothing; see `sign`."""
        return None

    async def signature(self, key: str) -> str | None:  # noqa: ARG002
        """Nothing; see `sign`."""
        return None

    # --- all nodes ---------------------------------------------------------------------------------------

    async def watch(self) -> AsyncGenerator[LeaseUpdate, None]:
        """All leases; see Store. Begins with the list of the last `acquire`."""
        retry = Retry(self._random, partial(self._report, "leases"))
        snapshot, self._handed = self._handed, None
        self._watching = True
        listed = False
        while True:
            try:
                if not listed:
                    yield snapshot or await self._nodes.read_all()
                    snapshot, listed = None, True
                async with aclosing(self._nodes.follow()) as deltas:
                    async for delta in deltas:
                        retry.succeeded()
                        yield delta
                # The server ended it, as it was asked to; if it does so at once, not in a loop.
                await asyncio.sleep(self._random.uniform(0.1, 1.0))
            except ExpiredError as error:
                log.debug("listing all nodes again: %s", error)
                listed = False
                await asyncio.sleep(self._random.uniform(0.0, 1.0))
            except StoreError as error:
                await retry.failed(str(error), _wish(error))

    # --- what Kubernetes is told -------------------------------------------------------------------------

    async def tell_up(self) -> None:
        """The node's network is there: the condition NetworkUnavailable becomes False. Raises nothing."""
        if not self._set_condition:
            return
        wait, longest = _REPORT_SECONDS
        said = False
        while True:
            try:
                await self._tell_condition(report.UP)
            except StoreError as error:
                if not said:
                    log.warning("cannot set the condition NetworkUnavailable: %s; trying again", error)
                said = True
            else:
                return
            await asyncio.sleep(wait * self._random.uniform(0.5, 1.0))
            wait = min(longest, wait * 2)

    async def _tell_condition(self, what: tuple[str, str, str]) -> None:
        patch = report.condition(*what, time.time())
        await self._client.patch(node_path(self._name, "/status"), patch)

    async def _tell_lacking(self, reason: str, message: str) -> None:
        """A condition, and an Event that says what to do; once. Without the right to do so the log has it."""
        if self._lacking == (reason, message):
            return
        self._lacking = (reason, message)
        self._report("podCIDR", message)
        try:
            if self._set_condition:
                await self._tell_condition(("True", reason, message))
            event = report.event(self._name, reason, message, time.time())
            await self._client.create("/api/v1/namespaces/default/events", event)
        except StoreError as error:
            log.warning("cannot tell Kubernetes about it: %s", error)

    async def _wait_for_change(self, node: codec.Node) -> None:
        """Until our node changes in what counts, or for a while."""
        query = {
            "fieldSelector": f"metadata.name={node.name}",
            "resourceVersion": str(node.revision),
            "timeoutSeconds": str(_WAIT_SECONDS),
        }
        async with aclosing(self._client.watch(query)) as batches:
            async for events in batches:
                for event in events:
                    value = event.get("object") if isinstance(event, dict) else None
                    try:
                        if codec.read_node(value, self._prefix).cidrs != node.cidrs:
                            return
                    except ValueError:
                        return

    def _report(self, what: str, reason: str | None) -> None:
        before = next(iter(self._troubles.values()), None)
        if reason is None:
            self._troubles.pop(what, None)
        else:
            self._troubles[what] = reason
        now = next(iter(self._troubles.values()), None)
        if now != before and self._on_trouble is not None:
            self._on_trouble(now)


def _lacking(node: codec.Node, config: NetworkConfig) -> tuple[str, str] | None:
    """(reason, message) why the node's podCIDR cannot serve; None if it can."""
    try:
        subnets = codec.subnets_of(node, codec.families_of(config))
    except ValueError as error:
        return "BadPodCIDR", f"node {node.name}: {error}"
    pairs = ((config.network, subnets[0], "IPv4"), (config.network6, subnets[1], "IPv6"))
    for network, subnet, family in pairs:
        if network is None:
            continue
        if subnet is None:
            return "NoPodCIDR", (
                f"node {node.name} has no {family} podCIDR yet: run kube-controller-manager with"
                f" --allocate-node-cidrs=true and --cluster-cidr={network} (kubeadm init"
                f" --pod-network-cidr={network}), or set the node's spec.podCIDR"
            )
        if not network.contains(subnet):
            return "PodCIDROutsideNetwork", (
                f"podCIDR {subnet} of node {node.name} is not inside the network {network}: give"
                " kube-controller-manager's --cluster-cidr and net-conf.json the same network"
            )
    return None


def _wish(error: StoreError) -> float:
    """What the server asks for by Retry-After."""
    return error.retry_after if isinstance(error, KubeError) else 0.0


def _mark(path: str) -> tuple[int, ...]:
    """What changes with a file's content, also when a link leads to another file."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_config(path: str) -> str | None:
    try:
        return read_regular(path, _LARGEST_CONFIG).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        log.warning("cannot read %s: %s", path, reason)
        return None
