"""Reading a whole table at once gives what reading message by message gives."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from flannelpy.kernel import codec
from flannelpy.kernel.table import Table

NUMBER, OCTETS, USUAL, ODD = 1, 2, 3, 4
TABLE = Table("BxH", (NUMBER,), (OCTETS,), (NUMBER, OCTETS, USUAL))
FIXED = struct.Struct("=BxH")

attrs = st.lists(
    st.one_of(
        st.tuples(st.just(NUMBER), st.binary(min_size=4, max_size=4)),
        st.tuples(
            st.sampled_from((OCTETS, USUAL, ODD)), st.sampled_from((b"", b"abc", b"\0" * 6, b"x" * 16))
        ),
    ),
    max_size=4,
    unique_by=lambda attr: attr[0],
)
bodies = st.builds(
    lambda first, second, some: FIXED.pack(first, second) + b"".join(codec.attr(*one) for one in some),
    st.integers(0, 255),
    st.sampled_from((0, 7)),
    attrs,
)


def expected(body: bytes) -> tuple[object, ...]:
    found = codec.attributes(body, FIXED.size)
    number: object = struct.unpack("=I", found[NUMBER])[0] if NUMBER in found else b""
    return (*FIXED.unpack_from(body), number, found.get(OCTETS, b""), body if ODD in found else b"")


def read_all(data: bytes) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    offset = 0
    while codec.read_header(data, offset):
        some, after = TABLE.read(data, offset)
        assert after > offset
        rows += some
        offset = after
    return rows


@given(st.lists(st.tuples(bodies, st.integers(1, 5)), max_size=6))
def test_runs_of_messages_alike_and_unlike(runs: list[tuple[bytes, int]]) -> None:
    whole = [body for body, count in runs for _number in range(count)]
    data = b"".join(codec.header(len(body), 24, 2, 9) + body for body in whole)
    assert read_all(data) == [expected(body) for body in whole]
    for body in whole:
        assert TABLE.read_one(body) == expected(body)


def test_a_message_with_another_flag_or_type_ends_a_run() -> None:
    body = FIXED.pack(1, 2) + codec.attr_u32(NUMBER, 5)
    data = b"".join(
        codec.header(len(body), kind, flags, 9) + body for kind, flags in ((24, 2), (24, 18), (3, 2))
    )
    rows, offset = TABLE.read(data, 0)
    assert len(rows) == 1
    assert codec.read_header(data, offset) == (16 + len(body), 24, 18, 9)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_exception(data: bytes) -> None:
    read_all(data)
    TABLE.read_one(data)
