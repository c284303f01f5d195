"""What happened to a new record before the answer to its writing came."""

import pytest

from flannelpy.model.lease import Delta, LeaseUpdate, Snapshot
from flannelpy.model.meanwhile import Meanwhile
from tests.builders import lease

OWN = lease("10.5.9.0/24", "192.0.2.1")._replace(revision=20)
ECHO = Delta((OWN,), (), 20)
THEIRS = OWN._replace(revision=21)


@pytest.mark.parametrize(
    ("updates", "lost", "written"),
    [
        ((), False, None),
        ((ECHO,), False, None),
        ((Delta((), (OWN.key,), 19),), False, None),
        ((ECHO, Delta((), (OWN.key,), 21)), True, None),
        ((ECHO, Delta((THEIRS,), (), 21)), False, THEIRS),
        # The deltas were lost, and a listing came: without it, with it, with it as it cannot be read.
        ((Snapshot((), 19),), False, None),
        ((Snapshot((), 25),), True, None),
        ((Snapshot((THEIRS,), 25),), False, THEIRS),
        ((Snapshot((), 25, ((OWN.key, "not JSON"),)),), False, None),
        # What was deleted in a history that has ended has a high number, and says nothing about this one.
        ((Delta((), (OWN.key,), 900), Snapshot((), 15, new_history=True), ECHO), False, None),
    ],
)
def test_what_is_told(updates: tuple[LeaseUpdate, ...], lost: bool, written: object) -> None:
    meanwhile = Meanwhile()
    for update in updates:
        meanwhile.take_in(update)
    assert (meanwhile.is_lost(OWN), meanwhile.written_since(OWN)) == (lost, written)
