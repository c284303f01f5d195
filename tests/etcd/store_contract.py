"""What every Store does, run on the memory store and on a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import pytest

from flannelpy.errors import StoreError
from flannelpy.model.address import parse_prefix, parse_v4, parse_v6
from flannelpy.model.config import NetworkConfig, parse_config
from flannelpy.model.lease import Delta, Lease, LeaseAttrs, LeaseUpdate, Snapshot
from flannelpy.model.subnet import Previous, encode_attrs
from flannelpy.store import Head, Offer, Store

V4 = parse_config('{"Network":"10.5.0.0/16"}')
DUAL = parse_config('{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')
V6 = parse_config('{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')
NOTHING = Previous()


def attrs(number: int, *, v4: bool = True, v6: bool = False, vni: int = 1) -> LeaseAttrs:
    """Node number 1, 2, ..."""
    data = {"VNI": vni, "VtepMAC": f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"}
    return LeaseAttrs(
        parse_v4(f"192.0.{number >> 8}.{number & 255}") if v4 else None,
        parse_v6(f"2001:db8::{number:x}") if v6 else None,
        "vxlan",
        data if v4 else None,
        data if v6 else None,
    )


def offer(number: int, **options: Any) -> Offer:
    """The same attributes whatever is found."""
    return lambda _taken_over, _others: attrs(number, **options)


class Lab(Protocol):
    """A store's back door."""

    def node(self) -> Store:
        """Another node's store on the same data."""

    async def put(self, key: str, value: bytes, *, leased: bool = True) -> int:
        """Write a record on an etcd lease of its own -> the lease's id."""

    async def delete(self, key: str) -> None: ...

    async def expire(self, lease_id: int) -> None:
        """End an etcd lease as if its time were up."""

    async def set_config(self, text: str | None) -> None: ...

    async def records(self) -> dict[str, tuple[bytes, int]]:
        """key -> value, etcd lease id."""


class Updates:
    """A watch, applied to a table, until something can be seen in it."""

    def __init__(self, source: AsyncIterator[LeaseUpdate]) -> None:
        self._source = source
        self.seen: list[LeaseUpdate] = []
        self.table: dict[str, Lease] = {}

    async def until(self, condition: Callable[["Updates"], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition(self):
                update = await anext(self._source)
                self.seen.append(update)
                if isinstance(update, Snapshot):
                    self.table = {lease.key: lease for lease in update.leases}
                else:
                    for key in update.gone:
                        self.table.pop(key, None)
                    self.table.update((lease.key, lease) for lease in update.put)

    @property
    def unreadable(self) -> dict[str, str]:
        return {key: reason for update in self.seen for key, reason in update.unreadable}


class StoreContract:
    """Subclasses provide `run`: it makes a lab, awaits the scenario on it, and takes it down."""

    def run(self, scenario: Callable[[Any], Awaitable[None]]) -> None:
        raise NotImplementedError

    @pytest.mark.parametrize(
        ("config", "families"),
        [(V4, {}), (DUAL, {"v6": True}), (V6, {"v4": False, "v6": True})],
        ids=["v4", "dual", "v6"],
    )
    def test_new_nodes_get_subnets_of_their_own(
        self, config: NetworkConfig, families: dict[str, bool]
    ) -> None:
        async def scenario(lab: Lab) -> None:
            leases = await asyncio.gather(
                *(lab.node().acquire(config, offer(n, **families), NOTHING) for n in range(1, 41))
            )
            for family in (0, 1):
                subnets = [pair for lease in leases if (pair := (lease.subnet, lease.subnet6)[family])]
                assert len(set(subnets)) == (40 if families.get(("v4", "v6")[family], family == 0) else 0)
            records = await lab.records()
            assert records == {
                lease.key: (encode_attrs(lease.attrs).encode(), lease.etcd_lease_id) for lease in leases
            }
            assert all(lease.etcd_lease_id and lease.created == lease.revision for lease in leases)

        self.run(scenario)

    def test_a_start_is_told_who_signed_the_record_that_it_takes_over(self) -> None:
        async def scenario(lab: Lab) -> None:
            first, second, third = lab.node(), lab.node(), lab.node()
            own = await first.acquire(V4, offer(1), NOTHING)
            assert first.replaced is None
            await first.sign(own, "the first")
            again = await second.acquire(V4, offer(1), NOTHING)
            assert (again.key, second.replaced) == (own.key, "the first")
            await third.acquire(V4, offer(1), NOTHING)
            assert third.replaced is None, "the second one does not sign"

        self.run(scenario)

    def test_a_node_takes_its_own_lease_over(self) -> None:
        async def scenario(lab: Lab) -> None:
            first = await lab.node().acquire(V4, offer(1), NOTHING)
            await lab.node().acquire(V4, offer(2), NOTHING)
            offered: list[tuple[Lease | None, Sequence[Lease]]] = []

            def new_offer(taken_over: Lease | None, others: Sequence[Lease]) -> LeaseAttrs:
                offered.append((taken_over, others))
                return attrs(1, vni=7)

            second = await lab.node().acquire(V4, new_offer, NOTHING)
            assert (second.key, second.created) == (first.key, first.created)
            assert second.revision > first.revision
            assert second.etcd_lease_id not in (0, first.etcd_lease_id)
            assert offered[0] == (None, ())
            assert offered[-1][0] == first
            assert [lease.attrs for lease in offered[-1][1]] == [attrs(2)]
            records = await lab.records()
            assert len(records) == 2
            assert records[first.key] == (encode_attrs(attrs(1, vni=7)).encode(), second.etcd_lease_id)

        self.run(scenario)

    def test_a_reservation_stays_one(self) -> None:
        async def scenario(lab: Lab) -> None:
            await lab.put("10.5.9.0-24", encode_attrs(attrs(1)).encode(), leased=False)
            node = lab.node()
            own = await node.acquire(V4, offer(1, vni=2), NOTHING)
            renewed = await node.renew(own)
            assert renewed is not None
            assert (own.key, own.etcd_lease_id, renewed.etcd_lease_id) == ("10.5.9.0-24", 0, 0)
            assert renewed.revision > own.revision
            assert await lab.records() == {own.key: (encode_attrs(attrs(1, vni=2)).encode(), 0)}

        self.run(scenario)

    def test_the_previous_subnet_is_preferred_if_it_is_free(self) -> None:
        async def scenario(lab: Lab) -> None:
            previous = Previous(parse_prefix("10.5.0.0/16"), parse_prefix("10.5.77.0/24"))
            first = await lab.node().acquire(V4, offer(1), previous)
            second = await lab.node().acquire(V4, offer(2), previous)
            assert first.key == "10.5.77.0-24"
            assert second.key != first.key

        self.run(scenario)

    def test_of_several_own_leases_the_previous_one_counts(self) -> None:
        async def scenario(lab: Lab) -> None:
            for key in ("10.5.7.0-24", "10.5.8.0-24", "10.5.9.0-24"):
                await lab.put(key, encode_attrs(attrs(1)).encode())
            previous = Previous(parse_prefix("10.5.0.0/16"), parse_prefix("10.5.8.0/24"))
            assert (await lab.node().acquire(V4, offer(1), previous)).key == "10.5.8.0-24"

        self.run(scenario)

    def test_a_lease_that_does_not_fit_the_config_is_replaced(self) -> None:
        async def scenario(lab: Lab) -> None:
            await lab.put("10.99.1.0-24", encode_attrs(attrs(1)).encode())
            await lab.put("10.99.2.0-24", encode_attrs(attrs(2)).encode())
            own = await lab.node().acquire(V4, offer(1), NOTHING)
            assert set(await lab.records()) == {own.key, "10.99.2.0-24"}

        self.run(scenario)

    def test_a_full_pool_is_said_and_nothing_is_left_behind(self) -> None:
        config = parse_config('{"Network":"10.5.0.0/22","SubnetMin":"10.5.1.0"}')

        async def scenario(lab: Lab) -> None:
            nodes = await asyncio.gather(
                *(lab.node().acquire(config, offer(n), NOTHING) for n in range(1, 6)),
                return_exceptions=True,
            )
            errors = [node for node in nodes if isinstance(node, BaseException)]
            assert len(errors) == 2
            assert all(isinstance(error, StoreError) and not error.transient for error in errors)
            assert "10.5.0.0/22" in str(errors[0])
            assert len(await lab.records()) == 3

        self.run(scenario)

    def test_own_leases_of_an_older_config_do_not_fill_the_pool(self) -> None:
        config = parse_config(
            '{"Network":"10.5.0.0/22","SubnetLen":25,"SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.128"}'
        )

        async def scenario(lab: Lab) -> None:
            await lab.put("10.5.1.0-24", encode_attrs(attrs(1)).encode())
            await lab.put("10.5.2.0-24", encode_attrs(attrs(2)).encode())
            own = await lab.node().acquire(config, offer(1), NOTHING)
            assert own.key in ("10.5.1.0-25", "10.5.1.128-25")
            assert set(await lab.records()) == {own.key, "10.5.2.0-24"}

        self.run(scenario)

    def test_a_record_with_an_unreadable_value_is_not_free(self) -> None:
        config = parse_config('{"Network":"10.5.0.0/22","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0"}')

        async def scenario(lab: Lab) -> None:
            await lab.put("10.5.2.0-24", b"{")
            assert (await lab.node().acquire(config, offer(1), NOTHING)).key == "10.5.1.0-24"

        self.run(scenario)

    def test_renewal_is_a_compare_and_swap(self) -> None:
        async def scenario(lab: Lab) -> None:
            node = lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            renewed = await node.renew(own)
            assert renewed is not None
            assert renewed == own._replace(revision=renewed.revision, etcd_lease_id=renewed.etcd_lease_id)
            assert renewed.revision > own.revision
            assert renewed.etcd_lease_id != own.etcd_lease_id
            assert await node.renew(own) is None, "an outdated revision"

            await lab.put(own.key, encode_attrs(attrs(2)).encode())
            assert await node.renew(renewed) is None, "somebody else's by now"
            assert (await lab.records())[own.key][0] == encode_attrs(attrs(2)).encode()

            await lab.delete(own.key)
            assert await node.renew(renewed) is None
            assert await lab.records() == {}

        self.run(scenario)

    def test_a_watch_shows_what_happens_and_only_that(self) -> None:
        async def scenario(lab: Lab) -> None:
            node = lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: bool(u.seen))
                assert isinstance(updates.seen[0], Snapshot)
                assert updates.table == {own.key: own}

                peer = await lab.node().acquire(V4, offer(2), NOTHING)
                await updates.until(lambda u: peer.key in u.table)
                assert updates.table == {own.key: own, peer.key: peer}

                lease_id = await lab.put("10.5.3.0-24", encode_attrs(attrs(3)).encode())
                await updates.until(lambda u: "10.5.3.0-24" in u.table)
                await lab.expire(lease_id)
                await updates.until(lambda u: "10.5.3.0-24" not in u.table)
                await lab.delete(peer.key)
                await updates.until(lambda u: peer.key not in u.table)
                assert all(isinstance(update, Delta) for update in updates.seen[1:])
                revisions = [update.revision for update in updates.seen]
                assert revisions == sorted(revisions)

        self.run(scenario)

    def test_bad_records_are_named_and_hide_nothing(self) -> None:
        good = encode_attrs(attrs(2)).encode()
        bad = {
            "foo": good,
            "10.5.1.0": good,
            "10.5.1.0-24/x": good,
            "10.5.2.0-24": b"not JSON",
            "10.5.3.0-24": b'{"PublicIP":null}',
            "10.5.4.0-24": b"\xff\xfe",
            "10.5.5.0-24": b'{"PublicIP":"192.0.2.9","x":"' + b"x" * 70_000 + b'"}',
            "k" * 500: b"",
        }

        async def scenario(lab: Lab) -> None:
            early, late = list(bad)[::2], list(bad)[1::2]
            for key in early:
                await lab.put(key, bad[key])
            await lab.put("10.5.200.0-24", good)
            node = lab.node()
            async with aclosing(node.watch()) as source:
                updates = Updates(source)
                await updates.until(lambda u: bool(u.seen))
                assert len(updates.unreadable) == len(early)
                for key in late:
                    await lab.put(key, bad[key])
                await lab.put("10.5.200.0-24", b"broken")
                await lab.put("10.5.201.0-24", good)
                await updates.until(lambda u: "10.5.201.0-24" in u.table)
                assert set(updates.table) == {"10.5.200.0-24", "10.5.201.0-24"}
                assert len(updates.unreadable) == len(bad) + 1
                assert all(len(key) <= 80 and 0 < len(why) <= 200 for key, why in updates.unreadable.items())

        self.run(scenario)

    def test_the_config_is_watched(self) -> None:
        async def scenario(lab: Lab) -> None:
            async with aclosing(lab.node().watch_config()) as texts:
                async with asyncio.timeout(10):
                    assert await anext(texts) is None
                    for text in ("one", "two", None, "three"):
                        await lab.set_config(text)
                        assert await anext(texts) == text

        self.run(scenario)

    def test_a_start_leaves_the_subnets_of_a_history_that_ended_alone(self) -> None:
        """Their nodes may live and come back; a copy of an earlier life is all that tells of them."""
        small = parse_config('{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.4.0"}')

        async def scenario(lab: Lab) -> None:
            node = lab.node()
            known = ("10.5.1.0-24", "10.5.2.0-24", "10.5.4.0-24", "what is this")
            node.remember(Head(12345, 99, 10**9), dict.fromkeys(known))
            own = await node.acquire(small, offer(1), NOTHING)
            assert own.key == "10.5.3.0-24"

        self.run(scenario)

    def test_a_record_with_another_beginning_is_not_the_one_that_we_wrote(self) -> None:
        """In another history the same revision may be another change."""

        async def scenario(lab: Lab) -> None:
            node = lab.node()
            own = await node.acquire(V4, offer(1), NOTHING)
            assert await node.renew(own._replace(created=own.created + 1)) is None
            assert await node.renew(own) is not None

        self.run(scenario)
