"""What one run measures, from a daemon's exec to its exit; what the figures mean is in bench/README.md."""

import math
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.observer import FDB, NEIGHBOUR, ROUTE
from bench.peers import Peer, base64_text
from bench.report import BURST
from bench.rig import Daemon, Rig

_START_DEADLINE_S, _PER_LEASE_S = 30.0, 0.02
_EVENT_DEADLINE_S = 2.0
_EVENT_GAP_S = 0.015
_BURST_DEADLINE_S = 5.0
_GONE_WHILE_DOWN = 10
_NAP_S = 0.001


@dataclass(frozen=True)
class Plan:
    """What to measure, from the command line."""

    daemons: dict[str, str]
    leases: list[int]
    rounds: int
    backend: str
    events: int


@dataclass
class Run:
    """One daemon, one number of leases, one round. `values` hold what was measured, `problems` tell what went
    wrong; a run is never left out."""

    daemon: str
    leases: int
    round: int
    values: dict[str, float] = field(default_factory=dict)
    etcd_requests: dict[str, int] = field(default_factory=dict)
    exit_codes: list[int | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class IncompleteError(Exception):
    """The daemon did not do what the next measurement rests on; the text says what."""


class Scenario:
    """One run: a daemon on a fresh node, measured from exec to exit."""

    def __init__(self, rig: Rig, plan: Plan, run: Run) -> None:
        self.rig, self.plan, self.run = rig, plan, run
        self.used = 0
        self.tables = (ROUTE, NEIGHBOUR, FDB) if plan.backend == "vxlan" else (ROUTE,)
        self.peers = self.fresh(run.leases)

    def measure(self) -> None:
        """Everything, in the order of the table."""
        self.rig.etcd.put_in_transactions(self.peers)
        daemon = self.cold_start()
        self.events(daemon)
        daemon = self.restart(daemon)
        self.bursts(daemon)
        self.stop(daemon, "exit_ms")

    def cold_start(self) -> Daemon:
        """With the leases in etcd: exec to subnet.env, to the first route, to the last with all it needs."""
        values, observer = self.run.values, self.rig.observer
        requests = self.rig.etcd.requests()
        observer.forget()
        daemon = self.rig.start(self.plan.daemons[self.run.daemon])
        own = time.process_time()
        self.follow(daemon)
        values["cpu_s"] = daemon.cpu_s()
        values["observer_cpu_s"] = time.process_time() - own
        if missing := self.missing(self.peers):
            raise IncompleteError(missing)
        values["settled_cpu_s"], values["idle_cpu_pct"] = settle(daemon)
        values["rss_mib"], values["peak_rss_mib"] = daemon.memory_mib()
        after = self.rig.etcd.requests()
        made = {name: count - requests.get(name, 0) for name, count in after.items()}
        self.run.etcd_requests = {name: count for name, count in sorted(made.items()) if count}
        values["etcd_requests"] = sum(count for name, count in made.items() if name != "messages")
        values["etcd_messages"] = made.get("messages", 0)
        return daemon

    def follow(self, daemon: Daemon) -> None:
        """Wait for subnet.env and for every peer's entries.

        While messages pour in, they are only stamped, once a millisecond, and read when there may be enough
        of them: the observer shall not compete with the daemon for a processor.
        """
        values, observer, subnet_file = self.run.values, self.rig.observer, self.rig.subnet_file
        poll = select.poll()
        for source in (observer, subnet_file, daemon):
            poll.register(source, select.POLLIN)
        counts = [observer.added[name] for name in self.tables]
        allowed = _START_DEADLINE_S + _PER_LEASE_S * len(self.peers)
        deadline = time.monotonic() + allowed
        while (
            short := sum(max(0, len(self.peers) - len(seen)) for seen in counts)
        ) or "env_ms" not in values:
            ready = [fd for fd, _ in poll.poll(1000)]
            if "env_ms" not in values and subnet_file.written():
                values["env_ms"] = daemon.age_ms(time.monotonic_ns())
            if observer.collect() >= short or not ready:
                observer.drain()
            if daemon.fileno() in ready:
                raise IncompleteError(daemon.ended())
            if not ready and time.monotonic() > deadline:
                missing = self.missing(self.peers) or "no subnet.env"
                raise IncompleteError(f"after {allowed:.0f} s: {missing}")
            if observer.fileno() in ready:
                time.sleep(_NAP_S)
        if self.peers:
            values["first_route_ms"] = daemon.age_ms(min(observer.added[ROUTE].values()))
            values["all_routes_ms"] = daemon.age_ms(max(max(seen.values()) for seen in counts))

    def missing(self, peers: Sequence[Peer]) -> str:
        """What the kernel, by dump, lacks of these peers; empty when it has the right entry for each."""
        present = self.rig.observer.present()
        wanted = {
            ROUTE: {peer.subnet for peer in peers},
            NEIGHBOUR: {peer.neighbour for peer in peers},
            FDB: {peer.fdb_entry for peer in peers},
        }
        short = [(name, len(wanted[name]), len(wanted[name] & present[name])) for name in self.tables]
        return ", ".join(f"{have} of {want} {name}" for name, want, have in short if have < want)

    def events(self, daemon: Daemon) -> None:
        """Single puts and deletes of new peers: start of the request to the announcement of the route."""
        peers, observer, etcd = self.fresh(self.plan.events), self.rig.observer, self.rig.etcd
        observer.forget()
        used = daemon.cpu_s()
        puts = [self.event("kv/put", etcd.put_request(peer), peer, observer.added[ROUTE]) for peer in peers]
        self.run.values["put_cpu_ms"] = (daemon.cpu_s() - used) * 1000 / len(peers)
        self.latencies("put", puts)
        if missing := self.missing(peers):
            self.run.problems.append(f"after {len(peers)} single puts: {missing}")
        gone = observer.removed[ROUTE]
        self.latencies(
            "delete", [self.event("kv/deleterange", _delete_request(peer), peer, gone) for peer in peers]
        )
        acks = []
        for number in range(50):
            begun = time.monotonic_ns()
            etcd.call("kv/put", {"key": base64_text("/bench/ack"), "value": base64_text(str(number))})
            acks.append((time.monotonic_ns() - begun) / 1e6)
            time.sleep(_EVENT_GAP_S)
        self.run.values["etcd_ack_ms"] = percentile(acks, 50)
        self.alive(daemon)

    def event(self, path: str, body: dict[str, Any], peer: Peer, seen: dict[bytes, int]) -> float | None:
        """ms from the request's start to the announcement; None when none came in time."""
        begun = time.monotonic_ns()
        self.rig.etcd.send(path, body)
        came = self.rig.observer.wait_for(lambda: peer.subnet in seen, _EVENT_DEADLINE_S)
        self.rig.etcd.answer()
        time.sleep(_EVENT_GAP_S)
        return (seen[peer.subnet] - begun) / 1e6 if came else None

    def latencies(self, name: str, all_taken: list[float | None]) -> None:
        took = [one for one in all_taken if one is not None]
        self.run.values[f"{name}_lost"] = lost = len(all_taken) - len(took)
        if lost:
            self.run.problems.append(
                f"single {name}s: {lost} of {len(all_taken)} not seen in {_EVENT_DEADLINE_S:.0f} s"
            )
        for label, at in (("p50", 50), ("p99", 99), ("max", 100)) if took else ():
            self.run.values[f"{name}_{label}_ms"] = percentile(took, at)

    def restart(self, daemon: Daemon) -> Daemon:
        """SIGTERM and a new start on the same kernel and subnet.env; some leases go while it is down."""
        values, observer = self.run.values, self.rig.observer
        self.stop(daemon, "restart_exit_ms")
        gone = self.peers[len(self.peers) - _GONE_WHILE_DOWN :] if len(self.peers) > _GONE_WHILE_DOWN else []
        kept = self.peers[: len(self.peers) - len(gone)]
        for peer in gone:
            self.rig.etcd.call("kv/deleterange", _delete_request(peer))
        before = observer.present()[ROUTE]
        self.rig.subnet_file.written()
        observer.forget()
        daemon = self.rig.start(self.plan.daemons[self.run.daemon])
        self.follow_restart(daemon)
        values["restart_cpu_s"], _ = settle(daemon)
        observer.drain()
        after = observer.present()[ROUTE]
        leaving = {peer.subnet for peer in gone}
        values["restart_vanished"] = len((set(observer.removed[ROUTE]) | (before - after)) - leaving)
        if gone:
            values["restart_stale"] = len(leaving & after)
        if missing := self.missing(kept):
            self.run.problems.append(f"after the restart: {missing}")
        self.peers = kept
        return daemon

    def follow_restart(self, daemon: Daemon) -> None:
        """Wait until subnet.env is written anew."""
        poll = select.poll()
        poll.register(self.rig.subnet_file, select.POLLIN)
        poll.register(daemon, select.POLLIN)
        deadline = time.monotonic() + _START_DEADLINE_S
        while not self.rig.subnet_file.written():
            self.alive(daemon)
            left = deadline - time.monotonic()
            if left <= 0:
                raise IncompleteError(f"restart: subnet.env not rewritten within {_START_DEADLINE_S:.0f} s")
            poll.poll(left * 1000)
        self.run.values["restart_env_ms"] = daemon.age_ms(time.monotonic_ns())

    def bursts(self, daemon: Daemon) -> None:
        """New leases put one after the other, and in two transactions: how many arrive, and the last when."""
        etcd = self.rig.etcd

        def one_by_one(peers: Sequence[Peer]) -> None:
            for peer in peers:
                etcd.call("kv/put", etcd.put_request(peer))
                self.rig.observer.drain()

        for name, put in (("burst", one_by_one), ("txn_burst", etcd.put_in_transactions)):
            peers = self.fresh(BURST)
            wanted = {peer.subnet for peer in peers}
            self.rig.observer.forget()
            added = self.rig.observer.added[ROUTE]
            begun = time.monotonic_ns()
            put(peers)
            self.run.values[f"{name}_put_ms"] = (time.monotonic_ns() - begun) / 1e6
            self.rig.observer.wait_for(lambda: wanted <= added.keys(), _BURST_DEADLINE_S)  # noqa: B023
            times = [stamp for subnet, stamp in added.items() if subnet in wanted]
            self.run.values[f"{name}_routes"] = len(times)
            if times:
                self.run.values[f"{name}_last_ms"] = (max(times) - begun) / 1e6
            if missing := self.missing(peers):
                self.run.problems.append(f"{name}: after {_BURST_DEADLINE_S:.0f} s {missing}")
            self.alive(daemon)

    def stop(self, daemon: Daemon, name: str) -> None:
        self.alive(daemon)
        took, code = daemon.stop()
        self.run.exit_codes.append(code)
        if code is None:
            raise IncompleteError(f"did not end within {took / 1000:.0f} s of SIGTERM and was killed")
        self.run.values[name] = took

    def alive(self, daemon: Daemon) -> None:
        if why := daemon.ended():
            raise IncompleteError(why)

    def fresh(self, count: int) -> list[Peer]:
        """Peers that nobody has used in this run."""
        self.used += count
        return [Peer(number) for number in range(self.used - count, self.used)]


def settle(daemon: Daemon) -> tuple[float, float]:
    """Wait until the daemon rests: under 10 ms of CPU in half a second, for at most 60 s.

    Returns its CPU seconds so far, and what it uses at rest, in percent over one second.
    """
    used = daemon.cpu_s()
    for _ in range(120):
        time.sleep(0.5)
        before, used = used, daemon.cpu_s()
        if used - before < 0.01:
            break
    time.sleep(1)
    return used, (daemon.cpu_s() - used) * 100


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _delete_request(peer: Peer) -> dict[str, Any]:
    return {"key": peer.key()}
