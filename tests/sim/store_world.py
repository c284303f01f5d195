"""A cluster whose store has bad moments: restored, emptied, cut off, tampered with; ten minutes and more."""

import asyncio

from flannelpy.model.config import ConfigError, parse_config
from flannelpy.model.config_change import compare
from flannelpy.model.kernel import FdbEntry, Item, Link, Neighbour, Route
from flannelpy.model.lease import Lease, same_node
from flannelpy.model.plan import Op, Put, Remove
from flannelpy.store.etcd_codec import Record, read_lease
from flannelpy.store.memory import MemoryData
from flannelpy.subnet_env import variables
from tests.sim import checks
from tests.sim.member import Member, current
from tests.sim.store_faults import StoreFaults
from tests.sim.withdrawals import Withdrawals
from tests.sim.world import (
    RECLAIM_SECONDS,
    SETTLED_SECONDS,
    TTL_SECONDS,
    Outcome,
    Records,
    World,
    furnish,
    outcome_of,
)

LIFE_SECONDS = 600.0
_FIGHT, _FIGHT_SECONDS = 8, 10.0
"""So many writes of one record within so many seconds are a fight."""


class StoreRecords(Records):
    """Records that may be replaced by others; what is deleted in one history is truly deleted."""

    world: "StoreWorld"

    def delete(self, key: str) -> None:
        if key in self.records:
            self.world.withdrawals.taken_away(key)
            self.world.reserved.discard(key)
        super().delete(key)

    def restore(self, backup: MemoryData) -> None:
        world = self.world
        world.strays += world.leftovers()
        before, changes = dict(self.records), self.between(0, self.revision)
        super().restore(backup)
        again = self.between(0, self.revision)
        world.blind = {
            one
            for one in (*world.members, *world.twins)
            if (head := one.seen_head()) is not None and _up_to(head, changes) == _up_to(head, again)
        }
        world.unaware |= {owner for key, was in before.items() if (owner := world.did_not_see(key, was))}
        world.began = world.loop.time()
        world.withdrawals.new_history(world.began, self.records)
        self.written = dict.fromkeys(self.records, world.loop.time())  # etcd starts their lives anew
        world.reserved = {key for key, record in self.records.items() if record.etcd_lease_id == 0}
        world.matched = False
        world.config_changed()

    def set_config(self, text: str | None) -> None:
        super().set_config(text)
        self.world.config_changed()


def _up_to(revision: int, changes: list[tuple[bool, Record]]) -> list[tuple[bool, Record]]:
    return [change for change in changes if change[1].revision <= revision]


class StoreWorld(World):
    """Who wrote what is known here: each record is judged by its author, each operation by what was told."""

    def __init__(self, seed: int, nodes: int, rounds: int, faults: int) -> None:
        super().__init__(seed, nodes, rounds, faults)
        self.withdrawals = Withdrawals(TTL_SECONDS)
        self.reserved: set[str] = set()
        """Keys without an etcd lease: they stay so."""
        self.matched = True
        """Whether the present history ever had a config of the right network."""
        self.twins: dict[Member, Member] = {}
        """Clone -> the machine that it is a copy of."""
        self.left: set[Member] = set()
        self.blind: set[Member] = set()
        """Nodes for which the present history is how the one that they had seen may have gone on."""
        self.unaware: set[Member] = set()
        """Nodes whose record was given away and brought back by a restore before they saw either."""
        self.strays: list[Lease] = []
        """What operators and clones wrote."""
        self._writes: dict[str, list[float]] = {}
        self.data = StoreRecords(self)
        self.data.config = self.config_text
        self.store_faults = StoreFaults(self)

    # --- the story ---------------------------------------------------------------------------------------

    async def live(self) -> None:
        await self.start_all()
        await self.settle()
        self.store_faults.back_up()
        end = self.loop.time() + LIFE_SECONDS
        while self.loop.time() < end and not self.violations:
            for _number in range(self.random.randint(1, self.faults_a_round)):
                gap = self.random.choice([0.0, 0.05, 2.0, 20.0])
                await asyncio.sleep(gap and self.random.expovariate(1 / gap))
                if self.violations:
                    break
                await self.store_faults.strike()
            await self.settle()
        for member in [*self.members, *self.twins]:
            await member.kill()

    async def settle(self) -> None:
        """Ten seconds after the last fault.

        A record that is lost again is taken back after a minute; who met an older record in a new history
        knows whether it counts when all have written once more, after a minute, too.
        """
        self.fault_until(0.0)
        while self.loop.time() < self.calm_at or await self._mend_wrong():  # noqa: ASYNC110  # that moves on
            await asyncio.sleep(self.calm_at - self.loop.time() + 1e-3)
        await super().settle()
        await asyncio.sleep(1.0)  # leftovers were deleted: everybody hears of it
        if self.random.random() < 0.6:
            self.store_faults.back_up()

    def is_to_wait(self) -> bool:
        for member in self.members:
            if member.running and member in self.taken and not self._is_as_written(member):
                # Twice as long after what looked like a second machine: a write of its own, brought back.
                self.calm_at = max(self.calm_at, self.taken[member] + 2 * RECLAIM_SECONDS)
            if member.running and member.store is not None:
                self.calm_at = max(self.calm_at, member.store.doubts)
        return self.loop.time() < self.calm_at + SETTLED_SECONDS

    async def _mend_wrong(self) -> bool:
        """An operator restarts who was started with the config of another network.

        And who cannot know that its peers have seen its subnet given to another node: the restore has hidden
        that from it, they hold what they have seen, and it has no reason to write before its next renewal.
        """
        wrong = [one for one in self.members if one.running and one.config and not self._is_right(one)]
        unaware = [one for one in self.unaware if one.running and self.withdrawals.told[one].at < self.began]
        self.unaware.clear()
        wrong += sorted(set(unaware) - set(wrong), key=str)
        for member in wrong:
            await member.kill()
            self.note(f"{member} is restarted by an operator")
            member.start()
            self.fault_until(1.0)
        return bool(wrong)

    def did_not_see(self, key: str, was: Record) -> Member | None:
        """Who has a record again that another node's had replaced without its knowledge."""
        owner = self.owner(key) if key in self.data.records else None
        if owner is None or owner is self.owner_of(was) or owner.store is None:
            return None
        return None if read_lease(was).attrs in owner.store.seen.get(key, ()) else owner

    def _is_as_written(self, member: Member) -> bool:
        told = self.withdrawals.told.get(member)
        record = self.data.records.get(told.lease.key) if told else None
        return told is not None and record is not None and record.revision == told.lease.revision

    def is_current(self, owner: Member, lease: Lease) -> bool:
        told = self.withdrawals.told.get(owner)
        return told is not None and told.lease.key == lease.key and super().is_current(owner, lease)

    def leftovers(self) -> list[Lease]:
        """Records that their nodes do not count on any more."""
        found = []
        for key, record in self.data.records.items():
            owner, lease = self.owner(key), read_lease(record)
            if owner is None or not self.is_current(owner, lease):
                found.append(lease)
        return found

    def excused(self, member: Member) -> list[Lease]:
        """What may be held: nobody can know that a node is gone, or moved before the new history was met."""
        met = member.store.met if member.store is not None else 0.0
        if not met and not (member.memory is not None and member.memory.held):
            return []  # it holds nobody
        told, ever = self.withdrawals.told, self.withdrawals.ever
        held = [
            lease
            for peer, leases in ever.items()
            if not peer.running or told[peer].at <= met
            for lease in leases
        ]
        held += [  # under an address that is not its own any more
            lease
            for peer, leases in ever.items()
            for lease in leases
            if not same_node(lease.attrs, told[peer].lease.attrs)
        ]
        return [*held, *self.strays]

    # --- what is written ---------------------------------------------------------------------------------

    def author(self) -> Member | None:
        """Whose code is running; None = an operator's."""
        name = current.get()
        return next((one for one in (*self.members, *self.twins) if str(one) == name), None)

    def wrote(self, key: str, before: Record | None) -> None:
        record, now = self.data.records[key], self.loop.time()
        lease, author = read_lease(record), self.author()
        self.note(f"store: {key} = {self.owner(key)} @{record.revision}, by {author or 'an operator'}")
        owner = None if before is None else self.owner_of(before)
        if author is None or author in self.twins:
            self.strays.append(lease)
            self._judge_stranger(key, author)
            if self.owner(key) is not owner:
                self.withdrawals.taken_away(key)
        if author is None:
            if lease.etcd_lease_id == 0:
                self.reserved.add(key)
            return
        if before is not None and owner is not self.twins.get(author, author):
            self.violation(f"{key} of {owner or 'a foreign node'} was overwritten by {author}")
        self._judge_write(author, lease, before, now)
        if author not in self.twins:
            self.withdrawals.wrote(author, lease, now)

    def _judge_stranger(self, key: str, author: Member | None) -> None:
        """A clone, or an operator, writes what its owner did not tell: nobody can know who it is from."""
        owner, attrs = self.owner(key), read_lease(self.data.records[key]).attrs
        told = self.withdrawals.told.get(owner) if owner else None
        if author is not None:
            self.withdrawals.displaced(self.twins[author])
        elif owner is not None and told is not None and (told.lease.key, told.lease.attrs) != (key, attrs):
            self.withdrawals.displaced(owner)

    def _judge_write(self, author: Member, lease: Lease, before: Record | None, now: float) -> None:
        own = self.withdrawals.told.get(author)
        forgot = (
            own is not None and abs(own.at - author.died) < 0.2
        )  # it died before it knew, or could save it
        if (
            own is not None
            and not forgot
            and own.lease.key != lease.key
            and author.health.ready
            and self._is_right(author)
        ):
            there = [read_lease(record) for record in self.data.records.values()]
            if not any(
                (one.key == own.lease.key or checks.overlap(one.key, [own.lease.key]))
                and not _is_same_machine(one, own.lease)
                for one in there
            ):
                self.violation(f"{author} moves to {lease.key}, but nobody else has {own.lease.key}")
        other = checks.overlap(lease.key, self.data.records)
        if other is not None:
            self.violation(f"two nodes own one subnet: {lease.key} and {other}")
        if lease.etcd_lease_id and lease.key in self.reserved:
            self.violation(f"{author} made a lease of the reservation {lease.key}")
        is_newcomer = own is not None and own.at >= self.began  # it claimed by a config that it had just read
        store = author.store
        if (
            before is None
            and not self.matched
            and not is_newcomer
            and store is not None
            and store.met >= self.began
            and author.health.ready
            and self._is_right(author)
        ):
            self.violation(f"{author} wrote {lease.key} into a history without a config of its network")
        writes = self._writes.setdefault(lease.key, [])
        writes.append(now)
        if len(writes) > _FIGHT and now - writes[-_FIGHT - 1] < _FIGHT_SECONDS:
            self.violation(f"{lease.key} is written again and again, now by {author}")
        for peer, told in self.withdrawals.told.items():
            if peer in (author, self.twins.get(author)) or not checks.overlap(lease.key, [told.lease.key]):
                continue
            self.withdrawals.displaced(peer)
            # Of another network that it was in it has forgotten all.
            remembers = author.memory is None or not compare(self.config, author.memory.config).pending
            knows = (author.health.ready or remembers) and any(
                route.destination in told.lease.subnets() and route.key not in author.foreign.routes
                for route in author.kernel.state.routes.values()
            )
            lasts = now - told.at < TTL_SECONDS
            # What is there under our address, by a clone perhaps, is taken over.
            if (
                before is None
                and knows
                and lasts
                and self._is_alive(peer)
                and self.withdrawals.is_claimed(told.lease, now)
            ):
                self.violation(
                    f"{author} claims {lease.key} although it knows that {peer} has {told.lease.key}"
                )

    def _is_alive(self, member: Member) -> bool:
        return member.running or member not in self.left

    def _is_abandoned(self, member: Member, item: Item) -> bool:
        """Whether it is for a peer in a network that the node does not run any more."""
        config = member.config
        if config is None or not isinstance(item, Route):
            return False
        return not any(net and net.contains(item.destination) for net in (config.network, config.network6))

    def _is_inside(self, lease: Lease) -> bool:
        """Whether it is a lease of our network."""
        networks = (self.config.network, self.config.network6)
        return all(any(net and net.contains(subnet) for net in networks) for subnet in lease.subnets())

    def _is_right(self, member: Member) -> bool:
        return member.config is not None and not compare(self.config, member.config).pending

    def config_changed(self) -> None:
        """Whether it is the right network's."""
        try:
            config = parse_config(self.data.config or "")
        except ConfigError:
            return
        self.matched = self.matched or not compare(self.config, config).pending

    def must_live_from_memory(self, member: Member) -> None:
        """It had a usable memory, and time enough to do without the store."""
        memory = member.memory
        assert memory is not None
        if not member.health.ready or not member.env:
            self.violation(f"{member} did not come up from memory")
            return
        known = [(lease.key, lease.attrs) for lease in memory.peers]
        for peer, (lease, _at, _wall) in self.withdrawals.told.items():
            if peer is member or (lease.key, lease.attrs) not in known or not self._is_inside(lease):
                continue
            for item in checks.peer_items(member, peer, lease, self.shape, as_told=True):
                if member.kernel.state.table(item).get(item.key) != item:
                    self.violation(f"{member} came up from memory without {item}")

    def clone(self, member: Member, booted: int) -> Member:
        """Another machine with the same address; it has nothing yet."""
        twin = Member(self, 100 + self._hosts, member.segment)
        self._hosts += 1
        twin.machine, twin.booted = member.machine, member.booted + booted
        twin.kernel.others_set_uplink(member.uplink())
        twin.route()
        furnish(twin)
        self.twins[twin] = member
        return twin

    def holds(self, member: Member, own: Lease) -> bool:
        member = self.twins.get(member, member)
        return own.key in self.data.records and self.owner(own.key) is member

    # --- what the members do -----------------------------------------------------------------------------

    def env_written(self, member: Member) -> None:
        """Without the store's word only for as long as the store would keep the lease."""
        told = self.withdrawals.told.get(self.twins.get(member, member))
        if told is None or member.store is None or member.store.spoke or member in self.twins:
            return
        if min(self.loop.time() - told.at, member.wall_clock() - told.wall) > TTL_SECONDS + 1.0:
            self.violation(f"{member} uses a lease that has expired: {variables(member.env)}")
        knew = told.at < member.died - 0.2 and member.unanswered != told.lease.key
        if member.memory and member.memory.own.key != told.lease.key and knew:
            self.violation(f"{member} uses {member.memory.own.key}, but has moved to {told.lease.key}")

    def stepped(self, member: Member, op: Op) -> None:
        super().stepped(member, op)
        store = member.store
        if (
            isinstance(op, Remove)
            and not isinstance(op.item, Link)
            and store is not None
            and not store.listed
            and not self._is_abandoned(member, op.item)
        ):
            self.violation(f"{member} did not know the peers yet: {op}")
        if not self._is_right(member):
            return  # it was started while the store described another network
        harmed = self.withdrawals.harmed(member, op, self.shape, self.loop.time())
        if harmed is None:
            return
        peer, lease = harmed
        record = self.data.records.get(lease.key)
        is_change = isinstance(op, Put) or isinstance(op.item, FdbEntry | Neighbour)  # the route stays
        known = store.last_told(lease.key) if store is not None else None
        if is_change and record is not None and record.revision > (known or lease).revision:
            return  # restored from a backup with higher revisions: by all that can be known it is newer
        if self._is_elsewhere_since(lease, (known or lease).revision):
            return  # the same, and it has another subnet there
        if not self._is_inside(lease):
            return  # that one was
        if member in self.blind and store is not None and store.met < self.began:
            return  # it may have: nobody can tell that it has not
        if self._is_reserved_elsewhere(lease):
            return  # two places for one MAC, and a reservation stays: only an operator can end that
        at = self.withdrawals.told[peer].at
        if store is not None and self.began <= at <= store.met and self.loop.time() < store.doubts:
            return  # it looks like what a backup holds, until it is repeated
        if (
            self._is_alive(peer)
            and peer not in self.twins.values()
            and not self._is_claimed_since(peer, lease)
        ):
            self.violation(f"{member} withdraws {peer}, which lives with {lease.key}: {op}")

    def _is_elsewhere_since(self, lease: Lease, revision: int) -> bool:
        """Whether a record that looks newer tells of that machine in another subnet."""
        there = [read_lease(record) for record in self.data.records.values() if record.revision > revision]
        data = (lease.attrs.backend_data, lease.attrs.backend_v6_data)
        return any(
            one.key != lease.key
            and (
                same_node(one.attrs, lease.attrs)
                or (one.attrs.backend_data, one.attrs.backend_v6_data) == data != (None, None)
            )
            for one in there
        )

    def _is_reserved_elsewhere(self, lease: Lease) -> bool:
        """Whether a reservation has its MAC under an address that it had once."""
        there = [read_lease(record) for record in self.data.records.values() if record.etcd_lease_id == 0]
        data = (lease.attrs.backend_data, lease.attrs.backend_v6_data)
        return any(
            one.key != lease.key
            and (one.attrs.backend_data, one.attrs.backend_v6_data) == data != (None, None)
            and not same_node(one.attrs, lease.attrs)
            for one in there
        )

    def _is_claimed_since(self, peer: Member, lease: Lease) -> bool:
        """Whether a newcomer, who could not know better, was given its subnet in the present history.

        Or a backup has a lease of the node's own with half of the pair that it has now: the older one counts.
        """
        records = self.data.records
        is_another = lease.key in records and self.owner(lease.key) is not peer
        return is_another or checks.overlap(lease.key, records) is not None


def _is_same_machine(one: Lease, other: Lease) -> bool:
    """Perhaps under another address: then only a MAC can tell."""
    data = [(lease.attrs.backend_data, lease.attrs.backend_v6_data) for lease in (one, other)]
    return same_node(one.attrs, other.attrs) or data[0] == data[1] != (None, None)


def simulate_store(seed: int, *, nodes: int, journal: bool = False) -> Outcome:
    """One run, the same for the same arguments."""
    return outcome_of(StoreWorld(seed, nodes, 0, 6), journal=journal)
