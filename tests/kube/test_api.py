"""The store on an API server: the stand-in, and the same on a real kube-apiserver (KUBE_APISERVER)."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import yaml

from flannelpy.errors import StoreError
from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.config import parse_config
from flannelpy.model.lease import Delta, Lease, LeaseAttrs, Snapshot
from flannelpy.model.subnet import Previous
from flannelpy.store.kube import KubeStore
from flannelpy.store.kube_client import KubeClient, KubeError, node_path
from flannelpy.store.kube_config import from_kubeconfig
from tests.kube.api import PREFIX, ApiServer, RealApi

V4 = parse_config('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}')
DUAL = parse_config(
    '{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/56","Backend":{"Type":"vxlan"}}'
)
NOTHING = Previous()
MANAGED = {"kube-subnet-manager": "true", "backend-type": "vxlan", "public-ip": "192.0.2.9"}


def attrs(number: int, *, v6: bool = False) -> LeaseAttrs:
    data = {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{number:02x}"}
    address6 = parse_address(f"2001:db8::{number}") if v6 else None
    return LeaseAttrs(parse_address(f"192.0.2.{number}"), address6, "vxlan", data, data if v6 else None)


def offer(number: int, *, v6: bool = False) -> Callable[[Lease | None, Sequence[Lease]], LeaseAttrs]:
    return lambda _remembered, _others: attrs(number, v6=v6)


def store_of(api: ApiServer, name: str, troubles: list[str | None] | None = None, **user: Any) -> KubeStore:
    path = api.kubeconfig(f"kubeconfig-{name}", user or None)
    client = KubeClient(from_kubeconfig(path, "", {}))
    return KubeStore(
        client,
        {"NODE_NAME": name},
        "flannel.alpha.coreos.com",
        "/nonexistent",
        set_condition=True,
        on_trouble=None if troubles is None else troubles.append,
    )


class Table:
    """What a watch has told."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.leases: dict[str, Lease] = {}
        self.seen: list[Snapshot | Delta] = []

    async def until(self, condition: Callable[["Table"], object], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            while not condition(self):
                update = await anext(self._source)
                self.seen.append(update)
                if isinstance(update, Snapshot):
                    self.leases = {lease.key: lease for lease in update.leases}
                else:
                    for key in update.gone:
                        self.leases.pop(key, None)
                    self.leases.update((lease.key, lease) for lease in update.put)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(whole())


def test_a_node_claims_its_pod_cidr(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.3.0/24",))

    async def scenario() -> None:
        store = store_of(api, "n1")
        own = await store.acquire(V4, offer(1), NOTHING)
        assert (own.key, own.subnet, own.attrs) == ("n1", parse_prefix("10.244.3.0/24"), attrs(1))
        before = api.node("n1")["metadata"]["resourceVersion"]
        assert await store.renew(own) == own
        assert api.node("n1")["metadata"]["resourceVersion"] == before, "nothing to write"
        await store.close()

    run(scenario)
    assert api.annotations("n1") == {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}',
        "public-ip": "192.0.2.1",
    }


def test_dual_stack(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.3.0/24", "fd00:244:0:3::/64"))

    async def scenario() -> None:
        store = store_of(api, "n1")
        own = await store.acquire(DUAL, offer(1, v6=True), NOTHING)
        assert own.subnet6 == parse_prefix("fd00:244:0:3::/64")
        assert own.attrs == attrs(1, v6=True)
        await store.close()

    run(scenario)
    assert api.annotations("n1")["public-ipv6"] == "2001:db8::1"


def test_a_watch_shows_what_happens_and_only_that(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.1.0/24",))
    api.add_node("stranger", ("10.244.9.0/24",))

    async def scenario() -> None:
        store, other = store_of(api, "n1"), store_of(api, "n2")
        own = await store.acquire(V4, offer(1), NOTHING)
        async with aclosing(store.watch()) as source:
            table = Table(source)
            await table.until(lambda t: t.seen)
            assert table.leases == {"n1": own}

            api.add_node("n2", ("10.244.2.0/24",))
            peer = await other.acquire(V4, offer(2), NOTHING)
            await table.until(lambda t: "n2" in t.leases)
            assert table.leases["n2"].attrs == peer.attrs

            heartbeat = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            api.call("PATCH", "/api/v1/nodes/n2/status", heartbeat, "application/strategic-merge-patch+json")
            api.annotate("stranger", **{key.replace("-", "_"): value for key, value in MANAGED.items()})
            await table.until(lambda t: "stranger" in t.leases)
            told = [lease.key for update in table.seen[1:] for lease in update.put]  # type: ignore[union-attr]
            assert told == ["n2", "stranger"], "a heartbeat, and our own writing, are no news"

            api.annotate("n2", public_ip="192.0.2.77")
            await table.until(lambda t: t.leases["n2"].attrs.public_ip == parse_address("192.0.2.77"))
            api.annotate("stranger", kube_subnet_manager=None)
            await table.until(lambda t: "stranger" not in t.leases)
            api.delete_node("n2")
            await table.until(lambda t: "n2" not in t.leases)
            api.add_node("n2", ("10.244.22.0/24",), {PREFIX + key: text for key, text in MANAGED.items()})
            await table.until(lambda t: "n2" in t.leases)
            assert table.leases["n2"].subnet == parse_prefix("10.244.22.0/24")
        await store.close()
        await other.close()

    run(scenario)


def test_somebody_else_writes_our_annotations(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.1.0/24",))

    async def scenario() -> None:
        store = store_of(api, "n1")
        own = await store.acquire(V4, offer(1), NOTHING)
        async with aclosing(store.watch()) as source:
            table = Table(source)
            await table.until(lambda t: t.seen)
            api.annotate("n1", backend_data="{}")
            await table.until(lambda t: t.leases["n1"].attrs != own.attrs)
            assert table.leases["n1"].revision > own.revision
            renewed = await store.renew(own)
            assert renewed is not None
            assert renewed.attrs == own.attrs
            await table.until(lambda t: t.leases["n1"].attrs == own.attrs)
            api.delete_node("n1")
            await table.until(lambda t: "n1" not in t.leases)
            assert await store.renew(renewed) is None
            with pytest.raises(StoreError, match="no node n1") as caught:
                await store.acquire(V4, offer(1), NOTHING)
            assert caught.value.transient
            api.add_node("n1", ("10.244.5.0/24",))
            assert await store.renew(renewed) is None, "another podCIDR"
            again = await store.acquire(V4, offer(1), NOTHING)
            assert again.subnet == parse_prefix("10.244.5.0/24")
        await store.close()

    run(scenario)


def test_a_node_without_a_pod_cidr_waits_and_says_why(api: ApiServer) -> None:
    api.add_node("n1")
    known = len(api.events())

    async def scenario() -> None:
        troubles: list[str | None] = []
        store = store_of(api, "n1", troubles)
        with pytest.raises(StoreError, match="--allocate-node-cidrs=true") as caught:
            await store.acquire(V4, offer(1), NOTHING)
        assert caught.value.transient
        assert api.condition("n1") == ("True", "NoPodCIDR")
        (event,) = api.events()[known:]
        assert event["reason"] == "NoPodCIDR"
        assert "--cluster-cidr=10.244.0.0/16" in event["message"]
        claim = asyncio.create_task(store.acquire(V4, offer(1), NOTHING))
        await asyncio.sleep(0)
        api.patch("n1", {"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}})
        assert (await claim).subnet == parse_prefix("10.244.7.0/24")
        await store.tell_up()
        assert api.condition("n1") == ("False", "FlannelIsUp")
        assert troubles[0] is not None
        assert troubles[-1] is None
        await store.close()

    run(scenario)


def test_a_pod_cidr_outside_of_the_network_is_refused(api: ApiServer) -> None:
    api.add_node("n1", ("10.3.0.0/24",))

    async def scenario() -> None:
        store = store_of(api, "n1")
        with pytest.raises(StoreError, match="is not inside the network") as caught:
            await store.acquire(V4, offer(1), NOTHING)
        assert not caught.value.transient
        await store.close()

    run(scenario)


def test_what_operators_annotate(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.1.0/24",))
    api.annotate("n1", public_ip_overwrite="203.0.113.5", node_public_ip="203.0.113.6")

    async def scenario() -> None:
        store = store_of(api, "n1")
        assert await store.operator_addresses() == (parse_address("203.0.113.6"), None)
        own = await store.acquire(V4, offer(1), NOTHING)
        assert own.attrs.public_ip == parse_address("203.0.113.5")
        assert await store.renew(own) == own
        await store.close()

    run(scenario)
    assert api.annotations("n1")["public-ip"] == "203.0.113.5"


def test_the_mac_is_remembered(api: ApiServer) -> None:
    api.add_node("n1", ("10.244.1.0/24",))
    data = {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"}
    api.annotate("n1", backend_data=json.dumps(data), backend_type="vxlan")
    api.add_node("n2", ("10.244.2.0/24",))

    async def scenario() -> None:
        one, two = store_of(api, "n1"), store_of(api, "n2")
        await two.acquire(V4, offer(2), NOTHING)
        seen: list[Any] = []

        def look(remembered: Lease | None, others: Sequence[Lease]) -> LeaseAttrs:
            seen.append((remembered and remembered.attrs.backend_data, [lease.key for lease in others]))
            return attrs(1)

        await one.acquire(V4, look, NOTHING)
        await one.close()
        await two.close()
        assert seen == [(data, ["n2"])]

    run(scenario)


def test_what_a_kube_apiserver_has_forgotten(real_api: RealApi) -> None:
    """After its restart its cache begins later than where we are: 410 as an event, and a new list."""
    for name, cidr in (("n1", "10.244.1.0/24"), ("n2", "10.244.2.0/24"), ("n3", "10.244.3.0/24")):
        real_api.add_node(name, (cidr,), {PREFIX + key: text for key, text in MANAGED.items()})

    async def scenario() -> None:
        store = store_of(real_api, "n1")
        await store.acquire(V4, offer(1), NOTHING)
        real_api.delete_node("n2")
        real_api.stop()
        real_api.start()
        store._nodes.revision = 1
        async with aclosing(store.watch()) as source:
            table = Table(source)
            await table.until(lambda t: sum(isinstance(u, Snapshot) for u in t.seen) == 2, 30)
            assert set(table.leases) == {"n1", "n3"}
            assert not any(isinstance(update, Snapshot) and update.new_history for update in table.seen)
            real_api.delete_node("n3")
            await table.until(lambda t: "n3" not in t.leases)
        await store.close()

    run(scenario)
    real_api.delete_node("n1")


def test_the_rights_of_the_manifest_are_enough_and_no_more(real_api: ApiServer) -> None:
    """As the service account of deploy/kubernetes/flannelpy.yml, by the token that a pod gets."""
    manifest = Path(__file__).parents[2] / "deploy/kubernetes/flannelpy.yml"
    kinds = {one["kind"]: one for one in yaml.safe_load_all(manifest.read_text()) if one}
    rbac, account = "/apis/rbac.authorization.k8s.io/v1", "/api/v1/namespaces/kube-flannel/serviceaccounts"
    real_api.call("POST", "/api/v1/namespaces", kinds["Namespace"])
    real_api.call("POST", account, kinds["ServiceAccount"])
    real_api.call("POST", f"{rbac}/clusterroles", kinds["ClusterRole"])
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = real_api.call("POST", f"{account}/flannel/token", request)["status"]["token"]
    real_api.add_node("n1")
    events = len(real_api.events())

    async def scenario() -> None:
        store = store_of(real_api, "n1", token=token)
        with pytest.raises(KubeError, match=r"403 to our get .our account may not do that"):
            await store.acquire(V4, offer(1), NOTHING)
        real_api.call("POST", f"{rbac}/clusterrolebindings", kinds["ClusterRoleBinding"])
        async with asyncio.timeout(10):
            while True:
                try:
                    await store.acquire(V4, offer(1), NOTHING)
                except KubeError:  # the authorizer has not seen it yet
                    await asyncio.sleep(0.1)
                except StoreError:  # no podCIDR
                    break
        assert len(real_api.events()) == events + 1
        spec = {"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}}
        with pytest.raises(KubeError, match="403"):
            await store._client.patch(node_path("n1"), spec)
        real_api.patch("n1", spec)
        await store.acquire(V4, offer(1), NOTHING)
        await store.tell_up()
        assert real_api.condition("n1") == ("False", "FlannelIsUp")
        async with aclosing(store.watch()) as source:
            table = Table(source)
            await table.until(lambda t: len(t.seen) > 1)
        await store.close()

    run(scenario)
    real_api.delete_node("n1")
