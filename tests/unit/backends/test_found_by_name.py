"""How a backend is found by the name in the network config."""

import tomllib
from pathlib import Path

import pytest

from flannelpy.backend import _OWN, load
from tests.builders import V4, config

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())


def test_the_table_and_the_entry_points_are_the_same() -> None:
    assert PYPROJECT["project"]["entry-points"]["flannelpy.backends"] == _OWN


@pytest.mark.parametrize("name", _OWN)
def test_each_of_ours_is_loaded_by_its_name_in_any_case(name: str) -> None:
    backend = load(config(V4.replace("vxlan", name.upper())))
    assert backend.name == name
    assert len(set(backend.devices)) == len(backend.devices)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(LookupError, match="'pigeon' is not in this version, only vxlan, host-gw, udp, alloc"):
        load(config(V4.replace("vxlan", "pigeon")))
