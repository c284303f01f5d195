"""One node's life, given its parts: claim a subnet, prepare the device, write subnet.env, follow the peers.

Everything that touches the outside comes in from `daemon.py`, so a simulation can run many of these.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from flannelpy import subnet_env, surroundings
from flannelpy.backend import Backend
from flannelpy.claim import Claim, Telling
from flannelpy.health import Health
from flannelpy.hold import Hold
from flannelpy.knowledge import Knowledge
from flannelpy.model.address import Address
from flannelpy.model.config import NetworkConfig
from flannelpy.model.identity import Identity
from flannelpy.model.kernel import Shaken
from flannelpy.model.lease import Delta, Lease, Snapshot, same_node
from flannelpy.model.leftover import leftover_routes
from flannelpy.model.peer_filter import COUNT, ENFORCE, fate, port_of
from flannelpy.model.subnet import Previous
from flannelpy.model.traffic import RuleSet, Wishes, rules
from flannelpy.model.uplink import Wish
from flannelpy.reconcile import Reconciler
from flannelpy.rules import Firewall, Rules
from flannelpy.state_file import Memory, Origin
from flannelpy.store import Store
from flannelpy.strangers import Strangers
from flannelpy.strangers import Table as FilterTable
from flannelpy.surroundings import Host, Surroundings

if TYPE_CHECKING:
    from flannelpy import status
    from flannelpy.model.probe import Target
    from flannelpy.probes import Pinger

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0
"""How long a start waits for the store before it goes on with what an earlier life has saved."""


class Parts(NamedTuple):
    """What a node is made of."""

    store: Store
    host: Host
    config: NetworkConfig
    config_text: str
    """The same as the store has it."""
    backend: Backend
    wish: Wish
    """What the operator says about the uplink."""
    host_id: str
    store_hosts: tuple[Address, ...]
    """Addresses of the datastore that are known without asking anybody."""
    previous: Previous
    """What subnet.env said."""
    margin_minutes: int
    us: Identity
    origin: Origin
    memory: Memory | None
    """What an earlier life of this node has saved about this network."""
    store_is_silent: bool
    """The config is from memory already."""
    save: Callable[[Memory], None]
    write_subnet_env: Callable[[str], None]
    firewall: Firewall | None
    """Where masquerade and forward rules are kept; None = nowhere."""
    turn_rules: Callable[[NetworkConfig, Firewall], Awaitable[tuple[Wishes, Firewall]]]
    """Makes what takes its place when EnableNFTables changes. May raise KernelError."""
    traffic: Wishes
    blackhole: bool
    """Keep a blackhole route to our own subnet."""
    peer_filter: FilterTable | None
    enforce: bool
    """The operator wants the filter to drop what no lease explains."""
    open_pinger: "Callable[[], Pinger] | None"
    """Sends probes to peers; None = they are off."""
    on_ready: Callable[[str], None]
    """Told, in one line, when the node is ready."""
    health: Health
    random: Random
    wall_clock: Callable[[], float] = time.time
    """Seconds since 1970."""


class Node:
    """A node of the overlay. Raises UplinkError at once if there is no usable uplink."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        parts.host.subscribe()
        self._around = Surroundings(
            parts.host,
            parts.backend,
            parts.config,
            parts.wish,
            parts.host_id,
            parts.store_hosts,
            parts.previous,
            surroundings.Telling(lambda: self._claim.publish(), self._look_for_uplink),
        )
        self._knowledge = Knowledge(
            parts.store,
            parts.config,
            parts.config_text,
            parts.origin,
            parts.memory,
            parts.health,
            parts.wall_clock,
            self._config_applied,
        )
        self._claim = Claim(
            parts.store,
            parts.config,
            self._around.offer,
            parts.previous,
            parts.margin_minutes,
            parts.random,
            parts.health,
            parts.us._replace(uplink=surroundings.shown(self._around.facts.uplink)),
            Telling(self._moved, self._knowledge.asking, self._knowledge.written),
            self._knowledge.held,
        )
        self._reconciler: Reconciler | None = None
        self._rules: Rules | None = None
        self._strangers: Strangers | None = None
        self._traffic = parts.traffic
        self._enable_nftables = parts.config.enable_nftables
        self._env = ""
        self._hold = Hold(
            holds=lambda: bool(self._knowledge.held()),
            hears=lambda: parts.health.store_trouble is None,
            end=self.confirm,
        )

    async def live(self) -> None:
        """From the claim on a subnet to the end."""
        parts = self._parts
        own, from_memory = await self._first_lease()
        log.info("our lease is %s", own.key)
        reconciler = self._reconciler = Reconciler(
            parts.host,
            parts.backend,
            parts.config,
            self._around.facts,
            own,
            self._around.scope(own),
            parts.health,
            parts.random,
            self._around.learn,
            from_memory=from_memory,
            blackhole=parts.blackhole,
        )
        reconciler.prepare()
        if parts.firewall is not None:
            self._rules = Rules(parts.firewall, self._decide_rules, own, parts.health)
            await self._rules.prepare()
        self._leave_former_network(own)
        self._write_subnet_env(own)
        port = port_of(parts.config, parts.host.links(parts.backend.devices))
        if parts.peer_filter is not None and port is not None:
            done = fate(parts.config, enforce=parts.enforce)
            if done.droppable:
                parts.health.peer_filter = ENFORCE if done.dropped else COUNT
            self._strangers = Strangers(parts.peer_filter, port, parts.health, done)
        if self._knowledge.held():
            self._hold.begin()
        if from_memory:
            reconciler.offer(Delta(self._knowledge.all_leases(), (), 0))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_store(reconciler), name="follow the peers")
            tasks.create_task(self._follow_kernel(reconciler), name="follow the kernel")
            tasks.create_task(reconciler.run(), name="reconcile")
            tasks.create_task(self._hold.run(), name="end the hold of peers")
            if self._rules is not None:
                tasks.create_task(self._rules.listen(), name="follow the rules")
                tasks.create_task(self._rules.run(), name="keep the rules")
            if self._strangers is not None:
                tasks.create_task(self._strangers.run(), name="keep the peer filter")
            tasks.create_task(self._claim.keep(), name="keep the lease")
            tasks.create_task(self._tell_ready(reconciler, own), name="tell when ready")
            if parts.open_pinger is not None and parts.backend.follows_peers:
                tasks.create_task(self._probe_peers(reconciler, parts.open_pinger), name="probe the peers")
            knowledge = self._knowledge
            tasks.create_task(knowledge.follow_config(self._own), name="follow the config")
            tasks.create_task(knowledge.keep_copy(self._own, parts.save), name="keep a copy")

    def _leave_former_network(self, own: Lease) -> None:
        """Remove our routes into it before subnet.env, which names it, is written anew.

        Whoever starts after that would not know that they are ours.
        """
        parts = self._parts
        former = {parts.previous.network, parts.previous.network6}
        former -= {parts.config.network, parts.config.network6, None}
        if not former:
            return
        observed = parts.host.observe(self._around.scope(own))
        ops = leftover_routes(
            observed, filter(None, former), filter(None, (parts.config.network, parts.config.network6))
        )
        if ops:
            log.info("leaving the former network: %d routes removed", len(ops))
            parts.host.apply(list(ops))

    def held(self) -> list[str]:
        """The keys of the peers that are held."""
        return [lease.key for lease in self._knowledge.held()]

    def confirm(self) -> int:
        """Let the held peers go; how many there were."""
        gone = self._knowledge.let_go()
        if self._reconciler is not None:
            self._reconciler.offer(gone)
        return len(gone.gone) + len(gone.put)

    def now(self) -> "status.Node":
        """The node as it is."""
        from flannelpy import status  # only for those who ask

        parts, known = self._parts, self._knowledge
        leases = {lease.key: lease for lease in known.all_leases()}
        return status.Node(
            parts.config, parts.backend, self._around.facts, self._claim.own, leases, known.held()
        )

    def packets(self) -> Mapping[str, int]:
        """What a forwarder has counted; empty where there is none."""
        return self._parts.host.packets()

    async def _first_lease(self) -> tuple[Lease, bool]:
        """(our lease, whether it is from memory because the store does not answer)."""
        memory = self._parts.memory
        if memory is None or not self._is_usable(memory):
            own = await self._claim.take()
            self._claim.confirm(once=not self._is_changed(own))
            return own, False
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if self._parts.store_is_silent else PATIENCE_SECONDS):
                return await self._claim.take(), False
        now = self._parts.wall_clock()
        if not memory.is_valid_at(now):  # the machine slept meanwhile
            return await self._claim.take(), False
        log.warning(
            "the store does not answer: starting with our lease %s and %d peers as they were %.0f s ago",
            memory.own.key,
            len(memory.peers) + len(memory.held),
            now - memory.saved,
        )
        self._claim.resume(memory.own, memory.expires - now)
        return memory.own, True

    def _is_changed(self, own: Lease) -> bool:
        """Whether an earlier life of this node told something else."""
        memory, previous = self._parts.memory, self._parts.previous
        if memory is not None:
            return (own.key, own.attrs) != (memory.own.key, memory.own.attrs)
        had = (previous.subnet, previous.subnet6)
        return had != (None, None) and had != (own.subnet, own.subnet6)

    def _is_usable(self, memory: Memory) -> bool:
        """Whether the lease is still ours: in time, for this network, and for the address that we have.

        SubnetMin and SubnetMax say where new subnets come from.
        """
        own = memory.own
        return (
            memory.is_valid_at(self._parts.wall_clock())
            and _is_inside(self._parts.config, own)
            and same_node(own.attrs, self._around.offer(own, ()))
        )

    def _own(self) -> Lease | None:
        return self._claim.own

    async def _follow_store(self, reconciler: Reconciler) -> None:
        async with aclosing(self._parts.store.watch()) as updates:
            async for update in updates:
                self._claim.notice(update)
                own = self._claim.own
                if own is not None:
                    reconciler.offer(self._knowledge.take_in(update, own))
                if self._strangers is not None:
                    uplink, known = self._around.facts.uplink, self._knowledge
                    here = (uplink.address, uplink.address6)
                    self._strangers.offer(here, (*known.all_leases(), *known.held()))
                if isinstance(update, Snapshot) and update.new_history:
                    self._hold.begin()

    async def _follow_kernel(self, reconciler: Reconciler) -> None:
        async with aclosing(self._parts.host.changes()) as changes:
            async for notices in changes:
                reconciler.offer(notices)

    async def _tell_ready(self, reconciler: Reconciler, own: Lease) -> None:
        await reconciler.first_pass_done.wait()
        parts = self._parts
        parts.health.ready = True
        devices = ", ".join(parts.backend.own(own, self._around.facts).links)
        parts.on_ready(f"{own.key}{' on ' if devices else ''}{devices}, {parts.health.peers} peers")
        self._around.warn_of_overlaps(own)

    async def _probe_peers(self, reconciler: Reconciler, open_pinger: "Callable[[], Pinger]") -> None:
        await reconciler.first_pass_done.wait()
        from flannelpy.probes import Probes, Situation  # not before the node is ready

        parts, knowledge, around = self._parts, self._knowledge, self._around

        def look() -> Situation:
            facts = around.facts
            return Situation(self._probe_targets, knowledge.has, parts.backend.mtu(facts), facts.uplink.mtu)

        await Probes(open_pinger, look, parts.health, parts.random).run()

    def _probe_targets(self) -> "list[Target]":
        from flannelpy.model.probe import targets

        own, refused = self._claim.own, self._parts.health.refused
        peers = [lease for lease in self._knowledge.all_leases() if lease.key not in refused]
        return [] if own is None else targets(peers, own, routed=not self._parts.backend.devices)

    # --- changes -----------------------------------------------------------------------------------------

    def _look_for_uplink(self) -> None:
        if self._reconciler is not None:
            self._reconciler.offer([Shaken("there was no uplink")])

    def _config_applied(self, config: NetworkConfig) -> None:
        self._claim.use(config)
        if self._rules is not None and config.enable_nftables != self._enable_nftables:
            self._enable_nftables = config.enable_nftables
            self._rules.turn(partial(self._other_rules, config))

    async def _other_rules(self, config: NetworkConfig, former: Firewall) -> Firewall:
        self._traffic, firewall = await self._parts.turn_rules(config, former)
        self._parts.health.rules_absent = None
        return firewall

    # --- outcomes ----------------------------------------------------------------------------------------

    def _moved(self, own: Lease) -> None:
        """Our lease is another one now, or tells something else."""
        if self._reconciler is None:
            return
        self._reconciler.move(own)
        if self._rules is not None:
            self._rules.move(own, lambda: self._write_subnet_env(own))
        else:
            self._write_subnet_env(own)

    def _decide_rules(self, own: Lease) -> RuleSet:
        return rules(self._parts.config, own, self._traffic)

    def _write_subnet_env(self, own: Lease) -> None:
        parts = self._parts
        text = subnet_env.render(
            parts.config, own, parts.backend.mtu(self._around.facts), parts.traffic.masquerade
        )
        if text == self._env:
            return
        if self._env:
            log.warning("subnet.env changes: restart Docker, or the pods, on this node to use it")
        parts.write_subnet_env(text)
        self._env = text


def _is_inside(config: NetworkConfig, lease: Lease) -> bool:
    """Whether it has a subnet of each family that the network has, and of no other."""
    pairs = ((config.network, lease.subnet), (config.network6, lease.subnet6))
    return all(
        network.contains(subnet) if network and subnet else network is subnet is None
        for network, subnet in pairs
    )
