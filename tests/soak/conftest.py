"""The labs of tests/netns serve here too."""

from tests.netns.conftest import (
    _no_leftovers,
    make_lab,
    pytest_runtest_makereport,
    pytest_runtest_setup,
)

__all__ = ["_no_leftovers", "make_lab", "pytest_runtest_makereport", "pytest_runtest_setup"]
