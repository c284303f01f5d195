"""What a scrape and `flannelpy status` cost a daemon, by the number of peers: CPU of its one thread.

    .venv/bin/python bench/page_cost.py

A scrape each 15 seconds and a status each minute are what a cluster usually asks for.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flannelpy.exposition import Exposition, families
from flannelpy.health import Health
from flannelpy.status import document, peers
from flannelpy.verdict import judge
from tests.unit.test_status import node


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _round in range(21):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return sorted(times)[10] * 1000


def main() -> None:
    health = Health()
    health.ready = True
    exposition = Exposition()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    exposition.page(families(None, {}, health, judge(health, 0.0, 10)))
    first = (time.perf_counter() - began) * 1000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"first scrape, with the import of prometheus-client: {first:.0f} ms, {grown:.1f} MiB")
    print("peers   scrape ms   bytes   status ms   status --peers ms   bytes")
    for count in (0, 1000, 5000):
        one = node(count)
        health.peers = count

        def scrape() -> bytes:
            return exposition.page(families(one, {}, health, judge(health, 0.0, 10))).body  # noqa: B023

        def status() -> str:
            return json.dumps(document(one, health, judge(health, 0.0, 10)))  # noqa: B023

        def listing() -> str:
            return json.dumps(peers(one, health))  # noqa: B023

        print(f"{count:5}   {median_ms(scrape):9.2f}   {len(scrape()):5}   {median_ms(status):9.2f}"
              f"   {median_ms(listing):17.1f}   {len(listing())}")  # fmt: skip


if __name__ == "__main__":
    main()
