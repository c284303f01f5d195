"""What goes wrong with the datastore, with what operators do in it, and with machines while it is away."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from flannelpy.model.config import NetworkConfig
from flannelpy.model.config_change import compare
from flannelpy.model.subnet import encode_attrs
from flannelpy.store.etcd_codec import read_lease
from flannelpy.store.memory import MemoryData
from tests.sim.faults import Faults, Kind, wipe
from tests.sim.member import Member

if TYPE_CHECKING:
    from tests.sim.store_world import StoreWorld

_AWAY = (0.5, 5.0, 30.0, 90.0)
_MEMORY_SECONDS = 13.0
"""A start goes on from memory after 5 s of waiting for the config, and as much for the lease."""


class StoreFaults(Faults):
    """Strikes one at a time; some last."""

    _world: "StoreWorld"

    def __init__(self, world: "StoreWorld") -> None:
        super().__init__(world)
        self._backups: list[MemoryData] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def kinds(self) -> list[tuple[Kind, int]]:
        return [
            (self._kill, 8),
            (self._doom, 2),
            (self._lose_answer, 3),
            (self._leave, 3),
            (self._join, 4),
            (self._rob, 4),
            (self._cut_off, 8),
            (self._flaky, 3),
            (self._jump, 2),
            (self._restore, 9),
            (self._empty, 7),
            (self._mislead, 8),
            # Not both: a record of a backup that has neither the subnet nor the address of a node, but its
            # MAC, cannot be told from a second machine's.
            (self._random.choice([self._overwrite, self._readdress]), 4),
            (self._reserve, 4),
            (self._recreate, 3),
            (self._expire, 4),
            (self._reboot_away, 7),
            (self._long_night, 2),
            (self._set_clock, 3),
            (self._break_config, 6),
            (self._clone, 3),
        ]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, text: str, seconds: float, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A fault whose end takes its time, too."""

        async def finish() -> None:
            await end()
            self._world.fault_until(0.0)

        self._lasting(text, seconds, lambda: self._spawn(finish()))

    async def _leave(self, member: Member) -> None:
        await super()._leave(member)
        if not member.running:
            self._world.left.add(member)

    # --- another history ---------------------------------------------------------------------------------

    def back_up(self) -> None:
        """Keep a copy of the store for a day when it is needed."""
        self._backups.append(self._world.data.backup())
        self._world.note("the store is backed up")

    async def _restore(self, _member: Member) -> None:
        world, data = self._world, self._world.data
        cluster = data.cluster
        age = self._random.choice([1, 1, 2, 5])
        was_empty = not data.records  # then there is nothing to tell two histories by but the cluster id
        data.restore(self._backups[-min(age, len(self._backups))])
        if self._random.random() < 0.4 and not was_empty:  # a disk that was set back
            data.cluster = cluster
            if self._random.random() < 0.5:  # and whose revision passes the old one before anybody looks
                data.revision += 1000
                data.wake()
        records = [f"{key} = {world.owner(key)} @{one.revision}" for key, one in sorted(data.records.items())]
        world.note(f"FAULT the store is restored at {data.head}: {', '.join(records)}")
        self._lasting("the store has another history", 0.1, self._set_right_config)

    async def _empty(self, _member: Member) -> None:
        world = self._world
        world.note("FAULT the store is empty")
        world.data.restore(MemoryData(None))
        seconds = self._random.choice([0.1, 1.0, 20.0, 100.0])
        if self._random.random() < 0.4:
            world.loop.call_later(seconds / 2, lambda: world.data.set_config(self._other_network()))
        self._lasting("the store has no config", seconds, self._set_right_config)

    async def _mislead(self, member: Member) -> None:
        """After a compaction the listing lacks most of the records, once. A few are believed to be all."""
        store = member.store
        if store is None or len(store._seen.marks) < 10:
            return
        member.connect(connected=False)

        def end() -> None:
            self._world.data.revision += 1
            self._world.data.compact()
            store.flawed = len(store._seen.marks) >= 10
            member.connect(connected=True)

        self._lasting(
            f"{member} is cut off and will read a flawed listing", self._random.uniform(0.5, 5.0), end
        )

    # --- the config --------------------------------------------------------------------------------------

    async def _break_config(self, _member: Member) -> None:
        world, text = self._world, self._world.config_text
        broken = self._random.choice(
            [
                None,
                "{",
                text.replace('"Network"', '"Netwerk"'),
                self._other_network(),
                text.replace('"SubnetMin":"10.5.1.0"', '"SubnetMin":"10.5.3.0"').replace(
                    "{", '{"EnableNFTables":true,', 1
                ),
            ]
        )
        world.data.set_config(broken)
        self._lasting(f"the config is {broken}", self._random.choice(_AWAY), self._set_right_config)

    def _other_network(self) -> str:
        return self._world.config_text.replace("10.5.", "10.7.").replace("fd00:5:", "fd00:7:")

    def _set_right_config(self) -> None:
        world = self._world
        if world.data.config != world.config_text:
            world.data.set_config(world.config_text)
            world.note("the config is right again")
        world.fault_until(0.0)

    async def _restart(self, member: Member) -> None:
        await member.kill()
        self._world.note(f"{member} is restarted by an operator")
        member.start()
        self._world.fault_until(0.0)

    # --- records -----------------------------------------------------------------------------------------

    def _key_of(self, member: Member) -> str | None:
        records = self._world.data.records
        return next((key for key in records if self._world.owner(key) is member), None)

    async def _overwrite(self, member: Member) -> None:
        """An operator gives a subnet that is in use to a node that we do not know."""
        key, world = self._key_of(member), self._world
        if key is None:
            return
        attrs = read_lease(world.data.records[key]).attrs
        last = self._random.randrange(1, 250)
        data = {"VNI": 1, "VtepMAC": f"02:00:00:00:09:{last:02x}"}
        foreign = attrs._replace(
            public_ip=attrs.public_ip and bytes((198, 18, 9, last)),
            public_ipv6=attrs.public_ipv6
            and bytes.fromhex("20010db8000000090000000000000000")[:15] + bytes([last]),
            backend_data=attrs.backend_data and data,
            backend_v6_data=attrs.backend_v6_data and data,
        )
        world.note(f"FAULT an operator gives {key} of {member} to a foreign node")
        world.data.put(key, encode_attrs(foreign).encode(), self._random.choice([0, world.data.grant()]))
        world.fault_until(0.0, robbed=member)

    async def _reserve(self, member: Member) -> None:
        key, world = self._key_of(member), self._world
        if key is not None:
            world.note(f"FAULT an operator makes a reservation of {key} of {member}")
            world.data.put(key, world.data.records[key].value, 0)
            world.fault_until(0.0, robbed=member)

    async def _recreate(self, member: Member) -> None:
        key, world = self._key_of(member), self._world
        if key is None:
            return
        world.note(f"FAULT an operator deletes and re-creates {key} of {member}")
        value = world.data.records[key].value
        world.rob(key)
        await asyncio.sleep(self._random.choice([0.0, 0.1]))
        if key not in world.data.records:
            world.data.put(key, value, 0)
            world.fault_until(0.0, robbed=member)

    async def _expire(self, member: Member) -> None:
        """A node is down or cut off for so long that its lease ends."""
        world = self._world
        if self._random.random() < 0.5:
            await member.kill()
            self._lasting(f"{member} is down", self._random.choice(_AWAY), member.start)
        else:
            member.connect(connected=False)
            self._lasting(
                f"{member} is cut off", self._random.choice(_AWAY), lambda: member.connect(connected=True)
            )
        for key, record in list(world.data.records.items()):
            if record.etcd_lease_id and world.owner(key) is member:
                world.note(f"FAULT {key} expires")
                world.rob(key)

    # --- machines ----------------------------------------------------------------------------------------

    async def _reboot_away(self, member: Member) -> None:
        """The machine starts anew while the store is away: nothing is left but the state file."""
        world, members = self._world, self._random.choice([[member], list(self._world.members)])
        for one in members:
            one.connect(connected=False)
        await member.kill()
        wipe(member)
        member.start()
        changes = member.clock_changes
        heals, starts, memory = member.heals, member.starts, member.memory
        usable = (
            memory is not None
            and memory.is_valid_at(member.wall_clock())
            and _is_same(world.config, memory.config)
            and world.is_at(member, memory.own)
        )

        started = world.loop.time()

        def look() -> None:
            punctual = world.loop.time() < started + _MEMORY_SECONDS + 1.0  # the clock did not jump
            if (
                punctual
                and member.clock_changes == changes
                and usable
                and memory is not None
                and world.is_at(member, memory.own)
                and member.running
                and (member.heals, member.starts) == (heals, starts + 1)
            ):
                world.must_live_from_memory(member)

        def end() -> None:
            for one in members:
                one.connect(connected=True)

        world.loop.call_later(_MEMORY_SECONDS, look)
        self._lasting(
            f"{member} reboots while the store is away", self._random.choice([15.0, 40.0, 100.0]), end
        )

    async def _long_night(self, member: Member) -> None:
        """A machine sleeps for longer than its lease lasts, and wakes while the store is away."""
        world = self._world
        for one in world.members:
            one.connect(connected=False)
        await member.kill()
        if self._random.random() < 0.5:
            wipe(member)
        world.note("FAULT 25 h pass")
        world.loop.jump(25 * 3600.0)
        world.data.expire_old()
        member.start()

        def end() -> None:
            for one in world.members:
                one.connect(connected=True)

        self._lasting("the store is away in the morning", 30.0, end)

    async def _set_clock(self, member: Member) -> None:
        hours = self._random.choice([-30, -1, 1, 30])
        member.clock_error = hours * 3600.0
        member.clock_changes += 1

        def end() -> None:
            member.clock_error = 0.0
            member.clock_changes += 1

        self._lasting(f"{member}'s wall clock is {hours:+} h off", self._random.choice(_AWAY), end)

    async def _readdress(self, member: Member) -> None:
        if "eth0" in member.kernel.uplinks and member not in self._world.twins.values():
            self._world.note(f"FAULT {member} gets another address")
            self._world.plug_in(member, index=member.uplink().ifindex)
            self._world.fault_until(0.0)

    async def _clone(self, member: Member) -> None:
        """A copy of a machine runs for a while, with its address, and perhaps its disk."""
        world = self._world
        if member in world.twins.values():
            return
        twin = world.clone(member, booted=self._random.choice([-1000, 1000]))
        twin.memory = self._random.choice([None, member.memory])
        twin.start()

        async def end() -> None:
            await twin.kill()
            del world.twins[twin]
            await self._restart(member)

        self._later(f"{twin} is a clone of {member}", self._random.choice([5.0, 70.0, 200.0]), end)


def _is_same(one: NetworkConfig, other: NetworkConfig) -> bool:
    return not compare(one, other).pending
