"""One stand-in for the tests that only read and write; others start theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd_process import ETCD, EtcdProcess
from tests.kube.api import KUBE_APISERVER, ApiServer, RealApi, StandIn


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn(tmp_path / "api")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    server = StandIn(tmp_path_factory.mktemp("api"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def real_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApi]:
    if KUBE_APISERVER is None or ETCD is None:
        pytest.skip("needs a kube-apiserver (KUBE_APISERVER, or on PATH) and etcd")
    folder = tmp_path_factory.mktemp("real-api")
    etcd = EtcdProcess(folder / "etcd")
    etcd.start()
    server = RealApi(folder / "api", etcd.endpoint)
    yield server
    server.stop()
    etcd.kill()


@pytest.fixture(params=["stand-in", "real"])
def api(request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    """Without nodes."""
    server: ApiServer = request.getfixturevalue(
        {"stand-in": "shared_stand_in", "real": "real_api"}[request.param]
    )
    yield server
    for node in server.call("GET", "/api/v1/nodes")["items"]:
        server.delete_node(node["metadata"]["name"])
