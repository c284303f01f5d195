"""Three bugs in the dealings with the store, put in on purpose: each must show."""

import pytest

from flannelpy.model.lease import Lease
from flannelpy.model.leases import Leases
from flannelpy.model.subnet import encode_attrs
from flannelpy.store import memory
from flannelpy.store.memory import MemoryStore
from tests.sim.store_world import simulate_store
from tests.sim.test_store_faults import nodes_of

_ENOUGH = 60
"""Seeds within which each must show."""


def found() -> str:
    """The first violation that a run shows."""
    for seed in range(_ENOUGH):
        violations = simulate_store(seed, nodes=nodes_of(seed)).violations
        if violations:
            return violations[0]
    pytest.fail(f"not noticed in {_ENOUGH} seeds")


def test_a_new_history_that_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "_hold", lambda *_arguments, **_options: None)
    assert "withdraws" in found()


def test_a_flawed_listing_that_is_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "lacks_most", lambda _known, _listing: False)
    assert "withdraws" in found()


def test_a_renewal_that_does_not_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: MemoryStore, _old: Lease, new: Lease) -> Lease:
        revision = self.data.put(new.key, encode_attrs(new.attrs).encode(), new.etcd_lease_id)
        return new._replace(revision=revision)

    monkeypatch.setattr(MemoryStore, "_replace", overwrite)
    assert found()
