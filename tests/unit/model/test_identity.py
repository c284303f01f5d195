"""Signatures are foreign data: whatever stands there, it is an identity or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannelpy.model.identity import Identity, parse, render

OLD = Identity("one", "aaaa", "p", 1000, 5)
NEW = Identity("two", "bbbb", "q", 2000, 5)


def test_the_first_one_stays() -> None:
    assert OLD.outranks(NEW)
    assert not NEW.outranks(OLD)
    assert OLD.outranks(OLD._replace(started=6)), "two containers of one machine"
    assert OLD.outranks(OLD._replace(process="q")) != OLD._replace(process="q").outranks(OLD)


def test_it_survives_the_store() -> None:
    assert parse(render(OLD)) == OLD


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "[" * 5000,
     '{"host":1,"boot":"b","process":"p","uplink":"","since":1,"started":1}',
     '{"host":"h","boot":"b","process":"p","uplink":"","since":true,"started":1}',
     '{"host":"\\u001b[2J","boot":"b","process":"p","uplink":"","since":1,"started":1}'],
)  # fmt: skip
def test_anything_else_is_nobody(text: str) -> None:
    assert parse(text) is None


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    assert parse(text) is None or isinstance(parse(text), Identity)
