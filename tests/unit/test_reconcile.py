"""The loop when the kernel is silent, refuses, or is damaged: no storm, nothing lost, nothing starved."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from flannelpy.backend import load
from flannelpy.health import Health
from flannelpy.kernel.fake import FakeKernel
from flannelpy.model.kernel import FdbEntry, Neighbour, Route, Scope, State
from flannelpy.model.lease import Delta, Snapshot
from flannelpy.model.plan import Op, Put
from flannelpy.reconcile import Reconciler, Work
from tests.builders import config, facts, lease

OWN = lease("10.5.1.0/24", "192.0.2.1", mac="02:00:00:00:00:01")
PEER = lease("10.5.2.0/24")


class SulkyKernel(FakeKernel):
    """Fails to tell its tables for a while."""

    def __init__(self) -> None:
        super().__init__(foreign=["eth0"])
        self.sulks = False
        self.asked = 0

    def observe(self, scope: Scope, *, devices_only: bool = False) -> State:
        self.asked += 1
        if self.sulks:
            raise OSError(19, "No such device")
        return super().observe(scope, devices_only=devices_only)


def run(test: Callable[[Reconciler, SulkyKernel], Awaitable[None]]) -> None:
    async def main() -> None:
        kernel, backend = SulkyKernel(), load(config())
        scope = Scope(frozenset(backend.devices), (config().network,))  # type: ignore[arg-type]
        node = Reconciler(
            kernel, backend, config(), facts(), OWN, scope, Health(), Random(1), lambda known: known
        )
        node.prepare()
        task = asyncio.create_task(node.run())
        try:
            await test(node, kernel)
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what it waits for has no event
            await asyncio.sleep(0.01)


def routes(kernel: SulkyKernel) -> int:
    return len(kernel.state.routes)


def test_a_kernel_that_does_not_answer_is_asked_again_calmly_and_no_update_is_lost() -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        kernel.sulks, kernel.asked = True, 0
        node.offer(Snapshot((OWN, PEER), 10))
        await asyncio.sleep(0.6)
        assert 1 <= kernel.asked <= 4
        kernel.sulks = False
        await until(lambda: routes(kernel) == 1)
        await until(node.first_pass_done.is_set)

    run(test)


def test_a_refused_route_gets_its_turn_however_much_comes_in() -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        node.offer(Snapshot((OWN,), 10))
        await until(node.first_pass_done.is_set)
        tries = 0

        def refuse(op: Op) -> int:
            nonlocal tries
            tries += isinstance(op, Put) and isinstance(op.item, Route)
            return 12 if tries == 1 and isinstance(op.item, Route) else 0

        kernel.refuse = refuse
        node.offer(Delta((PEER,), (), 11))

        async def renewals() -> None:
            for revision in range(12, 2000):
                node.offer(Delta((PEER._replace(revision=revision),), (), revision))
                await asyncio.sleep(0.005)

        busy = asyncio.create_task(renewals())
        await until(lambda: routes(kernel) == 1)
        busy.cancel()

    run(test)


@pytest.mark.parametrize("kind", [FdbEntry, Neighbour, Route])
def test_what_needs_a_refused_object_waits_with_it_and_what_is_needed_stays(kind: type) -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        node.offer(Snapshot((OWN, PEER), 10))
        await until(node.first_pass_done.is_set)
        before = State(kernel.state.items())
        kernel.refuse = lambda op: 12 if isinstance(op.item, kind) else 0
        moved = lease("10.5.3.0/24", "192.0.2.3", mac="02:00:00:00:00:03")
        node.offer(Delta((moved,), (PEER.key,), 11))
        await until(lambda: node._health.metrics.failures > 0)
        new = [item for item in kernel.state.items() if item not in set(before.items())]
        assert {type(item) for item in new} < {FdbEntry, Neighbour, Route}
        assert not any(isinstance(item, Route) for item in new), "it would lead nowhere"
        lost = [item for item in before.items() if item not in set(kernel.state.items())]
        assert {type(item) for item in lost} <= {Route, Neighbour} - {kind}
        kernel.refuse = lambda _op: 0
        await until(lambda: [str(one.destination) for one in kernel.state.routes.values()] == ["10.5.3.0/24"])
        await until(lambda: len(kernel.state) == len(before))

    run(test)


def test_a_deadline_that_passes_while_a_full_pass_must_wait_does_not_spin() -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        node.offer(Snapshot((OWN,), 10))
        await until(node.first_pass_done.is_set)
        turns = 0
        gather = node._gather

        async def counted() -> Work:
            nonlocal turns
            turns += 1
            return await gather()

        node._gather = counted  # type: ignore[method-assign]
        now = asyncio.get_running_loop().time()
        node._not_before, node._resync_at, node._retry_at = now + 0.3, now, now
        node.offer(Delta((), (), 11))
        await asyncio.sleep(0.5)
        assert turns < 10
        assert not node._all_dirty

    run(test)


def test_an_event_reads_no_table() -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        others = [
            lease(f"10.5.{n}.0/24", f"192.0.2.{n}", mac=f"02:00:00:00:00:{n:02x}") for n in range(10, 20)
        ]
        node.offer(Snapshot((OWN, *others), 10))
        await until(lambda: routes(kernel) == 10)
        await asyncio.sleep(0.05)
        kernel.asked = 0
        node.offer(Delta((PEER,), (), 11))
        await until(lambda: routes(kernel) == 11)
        node.offer(Delta((), (PEER.key,), 12))
        await until(lambda: routes(kernel) == 10)
        assert kernel.asked == 0

    run(test)


def test_a_machine_that_was_paused_in_the_middle_of_a_pass_does_not_rest_for_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(node: Reconciler, kernel: SulkyKernel) -> None:
        loop = asyncio.get_running_loop()
        time = loop.time
        monkeypatch.setattr(kernel, "observe", lambda scope: _paused(monkeypatch, loop, time, scope, kernel))
        node.offer(Snapshot((OWN, PEER), 10))
        await node.first_pass_done.wait()
        assert node._not_before <= loop.time() + 8.0

    run(test)


def _paused(
    monkeypatch: pytest.MonkeyPatch,
    loop: asyncio.AbstractEventLoop,
    time: Callable[[], float],
    scope: Scope,
    kernel: SulkyKernel,
) -> State:
    monkeypatch.setattr(loop, "time", lambda: time() + 3600.0)
    return FakeKernel.observe(kernel, scope)
