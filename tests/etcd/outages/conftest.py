"""These tests make labs in network namespaces, like those of tests/netns."""

from tests.netns.conftest import _no_leftovers, pytest_runtest_setup

__all__ = ["_no_leftovers", "pytest_runtest_setup"]
