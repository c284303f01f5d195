"""The two ways in which a host keeps our rules: nf_tables by netlink, or the iptables programs.

Each keeps the rule set that is wanted and removes what the other way, an earlier flannelpy or a flannel left
of ours. A look that finds everything as it was costs no process, except with legacy iptables, which has no
other way to be looked at.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress

from flannelpy.errors import KernelError
from flannelpy.kernel import iptables
from flannelpy.kernel.iptables import Program
from flannelpy.kernel.netlink import NetlinkError
from flannelpy.kernel.nft_monitor import NftMonitor
from flannelpy.kernel.nftables import NO_NFTABLES, Nftables, droppers
from flannelpy.kernel.peer_filter import PeerFilterTable
from flannelpy.model.traffic import FamilyRules, RuleSet

_NOTHING = RuleSet(None, None)
_LOOK_EARLY = 0.9
"""So that what is found is repaired within one period, too."""
_LEGACY_DROPS = (
    "forwarded packets are dropped by the FORWARD policy of legacy iptables, which no rule of ours overrides:"
    " use one kind of iptables on this host (update-alternatives)"
)


class Firewall:
    """What both ways share: nf_tables, if the kernel has it, and the news from there.

    One that takes the place of a `former` goes on with its sockets: `close` either of the two.
    """

    def __init__(self, former: "Firewall | None" = None) -> None:
        self.trouble: str | None = None
        """Why packets may be dropped although all our rules stand; None = no reason is known."""
        self.period = math.inf
        """Seconds after which a look is due without any news."""
        self._nftables: Nftables | None = None
        self._monitor: NftMonitor | None = None
        self._legacy_seen: object = None
        if former is not None:
            self._nftables, self._monitor = former._nftables, former._monitor  # noqa: SLF001
            return
        with suppress(OSError):
            self._nftables = Nftables()
            self._monitor = NftMonitor(self._nftables.port)

    def close(self) -> None:
        """Give the sockets back."""
        for part in (self._nftables, self._monitor):
            if part is not None:
                part.close()

    async def keep(self, wanted: RuleSet) -> list[str]:
        """Make the rules as wanted; what was done, in words. KernelError or OSError: try again."""
        raise NotImplementedError

    async def causes(self) -> AsyncGenerator[str, None]:
        """One line each time that somebody changed something which may concern us."""
        if self._monitor is None:
            await asyncio.Event().wait()
            return
        async with aclosing(self._monitor.causes()) as causes:
            async for cause in causes:
                yield cause

    def _in_nftables(
        self, wanted: RuleSet, *, keep_iptables: bool, needed: RuleSet, forward_is_served: bool = True
    ) -> list[str]:
        """Our own tables as wanted; and who drops what is `needed`."""
        self.trouble = None
        if self._nftables is None:
            return []
        try:
            done = self._nftables.set(wanted, keep_iptables=keep_iptables)
        except NetlinkError as error:
            if error.errno not in NO_NFTABLES or wanted:
                raise
            return []
        served = forward_is_served and not done.refused
        found = droppers(needed, done.found, forward_is_served=served)
        if found:
            self.trouble = _dropped_by(found[0])
        return done.words

    async def _in_legacy(self, needed: RuleSet) -> list[str]:
        """Nothing of ours in legacy iptables; and whether its policy drops what is `needed`.

        The one is looked at when tables were loaded, the other each time: it takes no process. To be asked
        after nf_tables: what drops there is named first.
        """
        words: list[str] = []
        tables = {bits: iptables.legacy_tables(bits) for bits in (32, 128)}
        for bits, loaded in tables.items():
            program = iptables.find_legacy(bits) if loaded and tables != self._legacy_seen else None
            if program is not None:
                done, _saved = await program.set(FamilyRules(), random_fully=False)
                words += done
            forward = (needed.family(bits) or FamilyRules()).forward
            if forward and "filter" in loaded and _legacy_forward_drops(bits):
                self.trouble = self.trouble or _LEGACY_DROPS
        self._legacy_seen = tables
        return words


class NftFirewall(Firewall):
    """Everything by netlink. KernelError if the kernel has no nf_tables and it is `needed`."""

    def __init__(self, *, needed: bool, former: Firewall | None = None) -> None:
        super().__init__(former)
        if needed and (self._nftables is None or not self._nftables.works()):
            raise KernelError(
                'the kernel has no nf_tables, which "EnableNFTables":true in the network config asks for:'
                " modprobe nf_tables, or set it to false to use iptables"
            )

    async def keep(self, wanted: RuleSet) -> list[str]:
        """As `Firewall.keep`."""
        words = self._in_nftables(wanted, keep_iptables=False, needed=wanted)
        return [*words, *await self._in_legacy(wanted)]


class IptablesFirewall(Firewall):
    """The iptables programs, of whichever kind this host has; families without one are not touched.

    `resync` is the time between looks, in seconds, where the kernel does not announce changes.
    """

    def __init__(self, programs: dict[int, Program], resync: float, former: Firewall | None = None) -> None:
        super().__init__(former)
        self._programs = dict(programs)
        self._clean: dict[tuple[int, str], object] = {}
        """(Bits, table) -> what was wanted and the fingerprint of what stood, when last it was right."""
        self._legacy = any(program.legacy for program in programs.values())
        if self._legacy or self._nftables is None:
            self.period = resync * _LOOK_EARLY

    async def keep(self, wanted: RuleSet) -> list[str]:
        """As `Firewall.keep`."""
        words: list[str] = []
        for bits, program in list(self._programs.items()):
            done = await self._keep_family(bits, program, wanted)
            words += done
            if not done and wanted.family(bits) is None:
                del self._programs[bits]  # it was only here to be cleaned
        # What was left elsewhere goes last: its successor stands.
        nft = not self._legacy
        words += self._in_nftables(_NOTHING, keep_iptables=nft, needed=wanted, forward_is_served=nft)
        if nft:
            words += await self._in_legacy(wanted)
        return words

    async def _keep_family(self, bits: int, program: Program, wanted: RuleSet) -> list[str]:
        rules = wanted.family(bits) or FamilyRules()
        seen = {} if program.legacy else self._seen(bits, rules)
        changed = [table for table, what in seen.items() if self._clean.get((bits, table)) != what]
        if seen and not changed:
            return []
        only = changed[0] if len(changed) == 1 else ""
        words, _saved = await program.set(rules, random_fully=wanted.random_fully, only=only)
        if not words:
            self._clean.update({(bits, table): seen[table] for table in changed})
        return list(words)

    def _seen(self, bits: int, rules: FamilyRules) -> dict[str, object]:
        """By table: what changes whenever the rules of ours, their place, or our wishes do; {} = unknown."""
        try:
            prints = self._nftables.fingerprints(bits) if self._nftables is not None else {}
        except OSError:
            return {}
        return {table: (rules, found) for table, found in prints.items()}


async def firewall(
    families: Collection[int],
    before: Collection[int],
    *,
    use_nftables: bool,
    resync: float,
    former: Firewall | None = None,
) -> Firewall:
    """The firewall for these families (32, 128; none = only clean up); KernelError if it lacks something.

    `before` are families that may have rules from an earlier run: they are cleaned, and need nothing.
    `former` is the one whose place this takes; its rules go when those of this one stand.
    """
    if use_nftables or not families:
        return NftFirewall(needed=bool(families), former=former)
    programs = {}
    for bits in (32, 128):
        if bits in families:
            programs[bits] = await iptables.find(bits)
        elif bits in before:
            with suppress(KernelError):
                programs[bits] = await iptables.find(bits)
    return IptablesFirewall(programs, resync, former)


async def compare(wanted: RuleSet, *, use_nftables: bool) -> tuple[list[str], str | None]:
    """(what would be done to have these rules, in words, why rules that stand may not help); nothing is done.

    KernelError or OSError: it cannot be looked at.
    """
    words: list[str] = []
    served = True
    if not use_nftables:
        for bits in (32, 128):
            rules = wanted.family(bits)
            if rules and any(rules):
                program = await iptables.find(bits)
                served = not program.legacy
                done, _saved = await program.set(rules, random_fully=wanted.random_fully, only_show=True)
                words += done
    try:
        nftables = Nftables()
    except OSError:
        return words, None
    try:
        asked = wanted if use_nftables else _NOTHING
        keep = not use_nftables
        found = nftables.set(asked, keep_iptables=keep, only_show=True)
    finally:
        nftables.close()
    dropping = droppers(wanted, found.found, forward_is_served=served)
    return [*words, *found.words], _dropped_by(dropping[0]) if dropping else None


def _legacy_forward_drops(bits: int) -> bool:
    from flannelpy.kernel.xtables import forward_drops  # hardly a host has both kinds

    with suppress(OSError):
        return forward_drops(bits)
    return False


def _dropped_by(chain: str) -> str:
    return (
        f"forwarded packets are dropped by the policy of chain {chain}, which no rule of ours"
        " overrides: accept the overlay network there"
    )


async def remove_all(*, remove: bool) -> list[str]:
    """What there is of ours, wherever it may be, in words; with `remove` it is gone after this."""
    words: list[str] = []
    with suppress(OSError):
        nftables = Nftables()
        try:
            words += nftables.set(_NOTHING, keep_iptables=False, only_show=not remove).words
        finally:
            nftables.close()
        table = PeerFilterTable()
        try:
            if table.remove() if remove else table.exists():
                words.append("removed table inet flannelpy")
        finally:
            table.close()
    for bits in (32, 128):
        program = iptables.find_legacy(bits) if iptables.legacy_tables(bits) else None
        if program is not None:
            done, _saved = await program.set(FamilyRules(), random_fully=False, only_show=not remove)
            words += done
    return words
