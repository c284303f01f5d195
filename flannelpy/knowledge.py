"""What a node knows from the store: the leases, those that are held, whether the config is still the same.

A copy of it goes to disk, so that a reboot while the store is away does not forget it.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress

from flannelpy.backend import load
from flannelpy.health import Health
from flannelpy.model.config import ConfigError, NetworkConfig, parse_config
from flannelpy.model.config_change import compare, with_live_part
from flannelpy.model.lease import Delta, Lease, LeaseUpdate, Snapshot
from flannelpy.model.leases import Leases
from flannelpy.model.subnet import is_compatible
from flannelpy.state_file import Memory, Origin
from flannelpy.store import TTL_SECONDS, Head, Mark, Store, mark_of

log = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
"""Between two writes of the copy, at least this long."""
_GATHER_SECONDS = 1.0
"""What comes together is written together."""


class Knowledge:
    """Owned by one node; `applied` is told the config with what changed in it without a restart."""

    def __init__(
        self,
        store: Store,
        config: NetworkConfig,
        config_text: str,
        origin: Origin,
        memory: Memory | None,
        health: Health,
        wall_clock: Callable[[], float],
        applied: Callable[[NetworkConfig], None],
    ) -> None:
        self._store = store
        self._config = config
        self._config_text = config_text
        self._origin = origin
        self._health = health
        self._wall_clock = wall_clock
        self._applied = applied
        self._leases = Leases() if memory is None else Leases(memory.peers, memory.held, memory.began)
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        """Our lease is another one: with the copy as it is, a start would claim what is not ours any more."""
        self._saved: Lease | None = None if memory is None else memory.own
        self._expires = 0.0 if memory is None else memory.expires
        """When the store forgets our record unless it is written again; 0 = it was not written yet."""
        health.lease_expires = self._expires
        self._asked = 0.0
        if memory is not None:
            store.remember(memory.head, _marks(memory))

    # --- leases ------------------------------------------------------------------------------------------

    def take_in(self, update: LeaseUpdate, own: Lease) -> LeaseUpdate:
        """What the store says; the same with the held peers in it."""
        told = self._leases.after(update, own)
        if isinstance(update, Snapshot) and update.new_history:
            self._say_new_history(update, own)
        self._count_held()
        if isinstance(update, Snapshot) or update.put or update.gone:
            self._dirty.set()
        return told

    def all_leases(self) -> tuple[Lease, ...]:
        """Every record that counts."""
        return tuple(self._leases.known.values())

    def has(self, key: str) -> bool:
        """Whether there is a record of this key."""
        return key in self._leases.known

    def held(self) -> tuple[Lease, ...]:
        """The peers without a record."""
        return tuple(one.lease for one in self._leases.held.values())

    def let_go(self) -> Delta:
        """End the hold: what the store says is all there is."""
        held = len(self._leases.held)
        gone = self._leases.let_go()
        if held:
            log.warning("%d held peers are let go", held)
        self._health.held = 0
        self._dirty.set()
        return gone

    def _say_new_history(self, update: Snapshot, own: Lease) -> None:
        peers = sum(key != own.key for key in self._leases.known)
        log.warning(
            "the store begins a new history (restored, emptied or replaced; revision %d): %d of %d peers have"
            " no record in it and are held until they are back; `flannelpy lease confirm` lets them go",
            update.revision,
            len(self._leases.held),
            peers,
        )

    def _count_held(self) -> None:
        before, now = self._health.held, len(self._leases.held)
        self._health.held = now
        if before and not now:
            log.info("all held peers are back in the store, or have given way")

    # --- the copy ----------------------------------------------------------------------------------------

    def asking(self) -> None:
        """Our record may be written from now on."""
        self._asked = self._wall_clock()

    def written(self, own: Lease) -> None:
        """It was: it lives for a whole TTL since then."""
        self._expires = self._health.lease_expires = self._asked + TTL_SECONDS
        self._dirty.set()
        if self._saved is not None and self._saved.key != own.key:
            self._urgent.set()

    async def keep_copy(self, own: Callable[[], Lease | None], save: Callable[[Memory], None]) -> None:
        """Write the copy soon after a change, for ever."""
        while True:
            await self._dirty.wait()
            await self._pause(_GATHER_SECONDS)
            self._dirty.clear()
            lease, head = own(), self._store.head
            if lease is not None and head is not None and self._expires:
                save(self._memory(lease, head))
                self._saved = lease
                self._urgent.clear()
                await self._pause(_SAVE_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Unless it is urgent."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._urgent.wait()

    def _memory(self, own: Lease, head: Head) -> Memory:
        leases = self._leases
        held = leases.held
        peers = tuple(one for one in leases.known.values() if one.key not in held and one.key != own.key)
        return Memory(
            origin=self._origin,
            config_text=self._config_text,
            config=self._config,
            own=own,
            expires=self._expires,
            saved=self._wall_clock(),
            head=head,
            peers=peers,
            held=tuple(held.values()),
            began=leases.began,
        )

    # --- the config --------------------------------------------------------------------------------------

    async def follow_config(self, own: Callable[[], Lease | None]) -> None:
        """Apply what disturbs nothing, and say what waits for a restart, for ever."""
        async with aclosing(self._store.watch_config()) as texts:
            async for text in texts:
                self._take_in_config(text, own())

    def _take_in_config(self, text: str | None, own: Lease | None) -> None:
        if text == self._config_text:
            self._say_pending(None)
            return
        place = self._store.config_place
        if text is None:
            self._say_pending(f"the network config at {place} was deleted")
            return
        try:
            new = parse_config(text)
            load(new)
        except (ConfigError, LookupError) as error:
            self._say_pending(f"the network config at {place} is not usable: {error}")
            return
        live, pending = compare(self._config, new)
        other = f"the network config at {place} is another one"
        if pending:
            self._say_pending(f"{other}: {'; '.join((*pending, *live))}")
            return
        self._config, self._config_text = with_live_part(self._config, new), text
        self._say_pending(None)
        if live:
            log.warning("the network config changed: %s; applied", "; ".join(live))
            self._applied(self._config)
            self._dirty.set()
        if own is not None and not is_compatible(self._config, own.subnet, own.subnet6):
            log.warning(
                "our lease %s is outside of SubnetMin to SubnetMax now; it stays until a restart", own.key
            )

    def _say_pending(self, reason: str | None) -> None:
        before, self._health.config_pending = self._health.config_pending, reason
        if reason == before:
            return
        if reason is None:
            log.info("the network config is the running one again")
        else:
            log.warning("%s; the running one stays until a restart", reason)


def _marks(memory: Memory) -> dict[str, Mark | None]:
    """The records that the store had. Of our own it is not known who wrote it last."""
    marks: dict[str, Mark | None] = {lease.key: mark_of(lease) for lease in memory.peers}
    marks.update((one.lease.key, None) for one in memory.held if one.stale)
    marks[memory.own.key] = None
    return marks
