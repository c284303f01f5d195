"""What probing peers costs a daemon: packets a second and CPU of its one thread, by the number of peers.

    sudo .venv/bin/python bench/probe_cost.py

Real sockets in a network namespace of its own, whose kernel answers for all peers, or for none of them.
"""

import asyncio
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from flannelpy.health import Health
from flannelpy.kernel.echo import Echo
from flannelpy.model.address import Address
from flannelpy.model.lease import Lease
from flannelpy.model.probe import targets
from flannelpy.probes import Probes, Situation
from tests.builders import lease

SECONDS = 40.0
OWN = lease("10.255.0.0/24", "192.0.2.1")


class Counted(Echo):
    """Counts what it sends."""

    sent = 0
    bytes = 0

    async def ask(
        self, address: Address, size: int, seconds: float, *, next_hop: bool = False
    ) -> float | None:
        Counted.sent += 1
        Counted.bytes += size
        return await super().ask(address, size, seconds, next_hop=next_hop)

    async def is_refused(self, address: Address, seconds: float, *, summed_here: bool = False) -> bool:
        Counted.sent += 1
        Counted.bytes += 84
        return await super().is_refused(address, seconds, summed_here=summed_here)


def peers(count: int) -> dict[str, Lease]:
    found = [lease(f"10.{n >> 8}.{n & 255}.0/24", f"172.16.{n >> 8}.{n & 255}") for n in range(count)]
    return {one.key: one for one in found}


async def probe(count: int) -> tuple[float, Health]:
    """(CPU seconds, what was found)."""
    known, health = peers(count), Health()

    def look() -> Situation:
        return Situation(lambda: targets(known.values(), OWN), known.__contains__, 1450, 1500)

    began = time.process_time()
    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            await Probes(Counted, look, health, Random(1)).run()  # noqa: S311
    return time.process_time() - began, health


def inside() -> None:
    """In the namespace."""
    rules = (
        "ip link set lo up",
        "ip route add local 10.0.0.0/8 dev lo",
        "ip route add local 172.16.0.0/12 dev lo",
    )
    for line in rules:
        subprocess.run(line.split(), check=True)
    print("peers   all answer: packets/s   kB/s   CPU %   none answers: packets/s   kB/s   CPU %   named")
    for count in (3, 1000, 5000):
        cells = []
        for silent in (False, True):
            table = f"{'add' if silent else 'delete'} table inet t"
            script = table + (
                "; add chain inet t c { type filter hook input priority 0; }"
                "; add rule inet t c meta l4proto icmp drop"
                if silent
                else ""
            )
            subprocess.run(["nft", script], check=silent, capture_output=not silent)
            Counted.sent = Counted.bytes = 0
            cpu, health = asyncio.run(probe(count))
            cells.append(f"{Counted.sent / SECONDS:9.1f}   {Counted.bytes / SECONDS / 1000:4.1f}"
                         f"   {cpu / SECONDS * 100:5.2f}")  # fmt: skip
            if silent:
                cells.append(f"{len(health.unreached)}")
        print(f"{count:5}           {cells[0]}               {cells[1]}   {cells[2]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        inside()
    else:
        sys.exit(subprocess.call(["unshare", "--net", sys.executable, __file__, "--inside"]))
