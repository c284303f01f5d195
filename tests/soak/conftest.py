"""The labs of tests/netns serve here too; and another `-m` than that of `make soak` does not select these."""

import pytest

from tests.netns import conftest as netns
from tests.netns.conftest import _no_leftovers, make_lab, pytest_runtest_makereport

__all__ = ["_no_leftovers", "make_lab", "pytest_runtest_makereport"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.option.markexpr != "soak":
        pytest.skip("takes minutes: only `make soak` runs it")
    netns.pytest_runtest_setup(item)
