"""The copy on disk: it comes back as it was, and nothing else is ever believed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannelpy import state_file
from flannelpy.model.address import parse_prefix
from flannelpy.model.config import parse_config
from flannelpy.model.leases import Held
from flannelpy.state_file import Memory, Origin
from flannelpy.store import TTL_SECONDS, Head
from tests.builders import lease

TEXT = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
ORIGIN = Origin("/coreos.com/network", ("http://a:2379", "http://b:2379"))
MEMORY = Memory(
    ORIGIN, TEXT, parse_config(TEXT), lease("10.5.1.0/24", "192.0.2.1"), 2000.0, 1000.0, Head(7, 2, 90),
    (lease("10.5.2.0/24", "192.0.2.2"),), (Held(lease("10.5.3.0/24", "192.0.2.3"), 5),), 80,
)  # fmt: skip


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    path = state_file.path_for(str(tmp_path / "made"), ORIGIN.prefix)
    assert state_file.read(path) == (None, None)
    state_file.write(path, MEMORY)
    assert state_file.read(path) == (MEMORY, None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_kubernetes_nodes_have_names_for_keys(tmp_path: Path) -> None:
    named = (
        lease("10.5.2.0/24", "192.0.2.2")._replace(key="node2"),
        lease("10.5.4.0/24", "192.0.2.4")._replace(key="10.5.9.0-24"),
        lease("10.5.5.0/24", "192.0.2.5")._replace(key="six", subnet=None, subnet6=parse_prefix("fd00::/64")),
    )
    memory = MEMORY._replace(own=MEMORY.own._replace(key="node1"), peers=named)
    path = tmp_path / "x.json"
    state_file.write(path, memory)
    assert state_file.read(path) == (memory, None)


def test_it_is_of_one_network_and_valid_for_a_time() -> None:
    assert MEMORY.origin.is_same(Origin(ORIGIN.prefix, ("http://b:2379", "http://c:2379")))
    assert not MEMORY.origin.is_same(Origin(ORIGIN.prefix, ("http://c:2379",)))
    assert not MEMORY.origin.is_same(Origin("/other", ORIGIN.endpoints))
    assert [MEMORY.is_valid_at(now) for now in (999, 1000, 1999, 2000)] == [False, True, True, False]
    # Written by a clock that was a day ahead, saved by the right one.
    ahead = MEMORY._replace(expires=MEMORY.saved + 2 * TTL_SECONDS)
    lasting = [ahead.is_valid_at(MEMORY.saved + TTL_SECONDS + more) for more in (-1, 0)]
    assert lasting == [True, False]
    assert state_file.path_for("/s", "/a/b") != state_file.path_for("/s", "/a-b")


def changed(**values: object) -> str:
    return json.dumps({**json.loads(state_file.render(MEMORY)), **values})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, changed(version=2),
     changed(leases=[]), changed(leases=[{}]), changed(leases=5),
     changed(leases=[{"key": "x", "value": "{}", "created": 1, "revision": 1, "etcd_lease": 1}]),
     changed(config="{}"), changed(head=[1]), changed(head="abc"), changed(expires="soon"),
     changed(began=None),
     "\x00" * 50],
)  # fmt: skip
def test_anything_else_is_named_and_not_used(text: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    memory, warning = state_file.read(path)
    assert memory is None
    assert warning is not None
    assert str(path) in warning
    assert len(warning) < 400


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    assert state_file.read(tmp_path) == (None, f"{tmp_path} is not used: not a regular file")


@given(st.data())
def test_a_cut_or_changed_file_is_no_traceback(data: st.DataObject) -> None:
    text = state_file.render(MEMORY)
    start = data.draw(st.integers(0, len(text)))
    broken = text[:start] + data.draw(st.text(max_size=5)) + text[start + data.draw(st.integers(0, 9)) :]
    try:
        memory = state_file.parse(broken)
    except ValueError:
        return
    assert isinstance(memory, Memory)
