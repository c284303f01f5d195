"""What goes wrong. Each fault says until when it lasts; a few are over at once."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from flannelpy.model.address import parse_prefix
from flannelpy.model.kernel import DeviceAddress, FdbEntry, Forward, Item, Link, Neighbour, Route, Tunnel
from flannelpy.model.plan import Op
from tests.sim.member import Member

if TYPE_CHECKING:
    from tests.sim.world import World

_OURS = ("flannel.1", "flannel-v6.1")
_ERRNOS = (errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.EPERM, errno.EAGAIN)
_STRANGE_MAC = b"\x02\xee\xee\xee\x00"
"""and the number of the node: two with one MAC would be another story."""
_STRANGE_IP = b"\xc0\x00\x02\x63"
_RESYNC_SECONDS = 75.0
"""What was lost without a word is found by the next full comparison, at most this much later."""


Kind = Callable[[Member], Awaitable[None]]


class Faults:
    """Strikes one at a time, chosen by the world's random numbers."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._random = world.random
        every = self.kinds()
        self._kinds = [kind for kind, _weight in every]
        self._weights = [weight for _kind, weight in every]

    def kinds(self) -> list[tuple[Kind, int]]:
        """What may happen to a node, and how often compared with the others."""
        return [
            (self._damage, 30),
            (self._deafen, 8),
            (self._refuse, 8),
            (self._kill, 8),
            (self._doom, 8),
            (self._lose_answer, 3),
            (self._leave, 4),
            (self._join, 4),
            (self._rob, 5),
            (self._cut_off, 8),
            (self._flaky, 4),
            (self._jump, 2),
            (self._move, 4),
            (self._unplug, 4),
            (self._resize, 2),
            (self._rejoin_elsewhere, 2),
        ]

    async def strike(self) -> None:
        """Let something happen to some node."""
        (kind,) = self._random.choices(self._kinds, self._weights)
        running = [member for member in self._world.members if member.running]
        if running:
            await kind(self._random.choice(running))

    def _lasting(self, text: str, seconds: float, end: Callable[[], None]) -> None:
        self._world.note(f"FAULT {text} for {seconds:.2f} s")
        self._world.fault_until(seconds)
        self._world.loop.call_later(seconds, end)

    # --- the kernel --------------------------------------------------------------------------------------

    async def _damage(self, member: Member) -> None:
        for _number in range(self._random.choice([1, 1, 2, 5])):
            self._damage_one(member)
        self._world.fault_until(0.0)

    def _damage_one(self, member: Member) -> None:
        kernel, random = member.kernel, self._random
        ours = [item for item in kernel.state.items() if _is_ours(item)]
        if not ours or random.random() < 0.15:
            stranger = random.choice(_strangers())
            if stranger.device in kernel.state.links:
                self._world.note(f"FAULT {member}: a stranger, {stranger}")
                kernel.others_put(stranger)
            return
        item = random.choice(ours)
        altered = None if random.random() < 0.5 else _altered(item, random.randrange(3), member.number)
        self._world.note(f"FAULT {member}: {item} {'removed' if altered is None else f'-> {altered!r}'}")
        if altered is None:
            kernel.others_remove(item)
        else:
            kernel.others_put(altered)

    async def _deafen(self, member: Member) -> None:
        told = self._random.random() < 0.6
        kernel = member.kernel
        kernel.deaf = True

        def end() -> None:
            missed = kernel.missed
            kernel.hear_again(told=told)
            if missed:
                self._world.note(f"{member} missed {missed} notices, {'told' if told else 'without a word'}")
                self._world.fault_until(0.0 if told else _RESYNC_SECONDS)

        self._lasting(f"{member} is deaf", self._random.uniform(0.1, 5.0), end)
        for _number in range(2):
            self._damage_one(member)

    async def _refuse(self, member: Member) -> None:
        random = self._random
        share = random.choice([0.1, 0.5, 1.0])
        code = random.choice(_ERRNOS)

        def refuse(_op: Op) -> int:
            return code if random.random() < share else 0

        def end() -> None:
            if member.refusal is refuse:
                member.refusal = lambda _op: 0

        member.refusal = refuse
        what = f"{member}'s kernel refuses {share:.0%} with {errno.errorcode[code]}"
        self._lasting(what, random.choice([0.5, 5.0, random.uniform(10.0, 60.0)]), end)
        self._damage_one(member)

    # --- the process -------------------------------------------------------------------------------------

    async def _kill(self, member: Member) -> None:
        await member.kill()
        if self._random.random() < 0.5:  # what happens meanwhile is announced to nobody
            self._damage_one(member)
        self._lasting(f"{member} is killed", self._random.uniform(0.01, 5.0), member.start)

    async def _doom(self, member: Member) -> None:
        """Dies within its next operations; something makes it work."""
        member.steps_to_live = self._random.choice([1, 2, 3, 5, 8, 13])
        self._world.note(f"FAULT {member} dies in {member.steps_to_live} operations")
        self._damage_one(member)

    async def _lose_answer(self, member: Member) -> None:
        """Dies after the next write to the store, without having heard of it."""
        if member.store is not None:
            self._world.note(f"FAULT {member} dies at its next answer")
            member.store.die_after_write = True
            await self._rob(member)

    async def _leave(self, member: Member) -> None:
        if sum(other.running for other in self._world.members) <= 2:
            return
        await member.kill()
        self._world.note(f"FAULT {member} leaves for good")
        for key in list(self._world.data.records):
            if self._world.owner(key) is member:
                self._world.data.delete(key)
        self._world.fault_until(0.0)

    async def _join(self, _member: Member) -> None:
        member = self._world.join()
        self._world.note(f"FAULT {member} joins")
        member.start()
        self._world.fault_until(0.0)

    # --- the store ---------------------------------------------------------------------------------------

    async def _rob(self, member: Member) -> None:
        for key in list(self._world.data.records):
            if self._world.owner(key) is member:
                self._world.note(f"FAULT an operator deletes {member}'s {key}")
                self._world.rob(key)

    async def _cut_off(self, member: Member) -> None:
        random = self._random
        everybody = random.random() < 0.3
        members = list(self._world.members) if everybody else [member]
        robbed = random.random() < 0.3

        def connect(connected: bool) -> None:
            for one in members:
                one.connect(connected=connected)

        def end() -> None:
            if random.random() < 0.5:
                self._world.data.compact()
            connect(connected=True)

        connect(connected=False)
        what = "everybody" if everybody else str(member)
        self._lasting(
            f"{what} is cut off from the store", random.choice([0.5, 5.0, random.uniform(10.0, 60.0)]), end
        )
        if robbed:
            await self._rob(member)
            if not everybody and random.random() < 0.5:
                await self._join(member)

    async def _flaky(self, member: Member) -> None:
        store = member.store
        if store is None:
            return

        def end() -> None:
            store.flaky = 0.0

        store.flaky = self._random.choice([0.2, 0.6])
        self._lasting(f"{member}'s store is flaky", self._random.uniform(1.0, 10.0), end)
        if self._random.random() < 0.5:
            await self._rob(member)

    async def _jump(self, _member: Member) -> None:
        hours = self._random.choice([1, 1, 22])
        self._world.note(f"FAULT the clock jumps {hours} h")
        self._world.loop.jump(hours * 3600.0)
        self._world.data.expire_old()
        self._world.fault_until(0.0)

    # --- the uplink --------------------------------------------------------------------------------------

    async def _move(self, member: Member) -> None:
        """Another address, as from DHCP: the old one goes, the new one comes, then the default route."""
        if "eth0" not in member.kernel.uplinks:
            return
        self._world.note(f"FAULT {member}'s uplink gets another address")
        before = member.uplink()
        if self._random.random() < 0.5:
            member.kernel.others_set_uplink(before._replace(addresses=()))
            _forgive(member)
            await asyncio.sleep(self._random.uniform(0.0, 2.0))
        if "eth0" not in member.kernel.uplinks:
            return
        self._world.plug_in(member, index=before.ifindex, routed=False)
        self._lasting(f"{member} has no default route", self._random.uniform(0.0, 1.0), member.route)

    async def _unplug(self, member: Member) -> None:
        """The uplink is deleted; it comes back with another number, as itself or with other addresses."""
        kernel = member.kernel
        if "eth0" not in kernel.uplinks:
            return
        before = member.uplink()
        again = before._replace(ifindex=before.ifindex + 10)
        moved = self._random.random() < 0.3
        kernel.others_delete_uplink("eth0")
        _forgive(member)

        def end() -> None:
            if moved:
                self._world.plug_in(member, index=again.ifindex)
            else:
                kernel.others_set_uplink(again)
                member.route()

        self._lasting(f"{member}'s uplink is gone", self._random.uniform(0.0, 8.0), end)

    async def _resize(self, member: Member) -> None:
        if "eth0" in member.kernel.uplinks:
            mtu = self._random.choice([1500, 1400, 9000])
            self._world.note(f"FAULT {member}'s uplink has MTU {mtu}")
            member.kernel.others_set_uplink(member.uplink()._replace(mtu=mtu))
            self._world.fault_until(0.0)

    async def _rejoin_elsewhere(self, member: Member) -> None:
        """A machine is installed anew: nothing is left of its kernel's state, and it has lost subnet.env."""
        await member.kill()
        self._world.note(f"FAULT {member} is installed anew")
        wipe(member)
        member.start()
        self._world.fault_until(0.0)


def wipe(member: Member) -> None:
    """As after a boot: the kernel has nothing of ours, and /run is empty."""
    for name in _OURS:
        link = member.kernel.state.links.get(name)
        if link is not None:
            member.kernel.others_remove(link)
    for route in list(member.kernel.state.routes.values()):
        if _is_ours(route):
            member.kernel.others_remove(route)
    member.env = ""


def _is_ours(item: Item) -> bool:
    if isinstance(item, Link):
        return item.name in _OURS
    return item.device in _OURS or (isinstance(item, Route) and item.device == "eth0" and item.protocol == 70)


def _forgive(member: Member) -> None:
    """What the kernel took away with an uplink's addresses, or with the uplink, is nobody's fault."""
    for item in list(member.foreign.items()):
        if item.key not in member.kernel.state.table(item):
            member.foreign.discard(item)


def _altered(item: Item, way: int, number: int) -> Item:
    """The same object with another value."""
    mac = _STRANGE_MAC + bytes([number])
    match item:
        case Link():
            changes: tuple[dict[str, Any], ...] = ({"up": False}, {"mtu": 1300}, {"mac": mac})
            return item._replace(**changes[way])
        case DeviceAddress(device=device):
            return DeviceAddress(device, parse_prefix("10.99.0.1/32"))
        case FdbEntry():
            return item._replace(remote=_STRANGE_IP if len(item.remote) == 4 else bytes(15) + b"\x09")
        case Neighbour():
            return item._replace(mac=mac)
        case Tunnel() | Forward():
            raise TypeError(f"{item}: nobody but the daemon changes it")
        case Route():
            if way == 0:
                return item._replace(protocol=4)
            return item._replace(extra=b"x") if way == 1 else item._replace(device="eth1", onlink=False)


def _strangers() -> tuple[DeviceAddress | FdbEntry | Neighbour | Route, ...]:
    return (
        DeviceAddress("flannel.1", parse_prefix("10.99.0.2/32")),
        FdbEntry("flannel.1", b"\x02\xee\xee\xee\xee\x02", _STRANGE_IP),
        Neighbour("flannel.1", b"\x0a\x05\x63\x00", b"\x02\xee\xee\xee\xee\x02"),
        Neighbour("flannel-v6.1", bytes(15) + b"\x07", b"\x02\xee\xee\xee\xee\x02"),
        Route(parse_prefix("203.0.113.128/25"), "flannel.1", None, protocol=4),
        Route(parse_prefix("fd00:77::/64"), "flannel-v6.1", None, protocol=4, metric=1024),
    )
