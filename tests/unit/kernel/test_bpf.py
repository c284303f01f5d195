"""The loader: object files, whole and damaged; what the kernel refuses."""

import errno
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannelpy.kernel import bpf, fast_path

DATA = fast_path.OBJECT.read_bytes() if fast_path.OBJECT.exists() else b""


def test_our_object_has_two_programs_and_three_maps() -> None:
    found = bpf.read_object(DATA)
    assert set(found.programs) == {"encap", "decap"}
    assert {name for program in found.programs.values() for _at, name in program.maps} == {
        "config",
        "peers",
        "counts",
    }
    assert found.licence == "Apache-2.0"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a 64-bit object file"),
        (b"MZ" + DATA[2:], "not a 64-bit object file"),
        (DATA[:5] + bytes([3 - DATA[5]]) + DATA[6:], "byte order"),
        (DATA[:18] + b"\x3e\0" + DATA[20:], "machine 62 is not BPF"),
        (DATA[:60], "not a whole object file"),
        (DATA[:-100], "not a whole object file"),
    ],
)
def test_what_is_no_object_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        bpf.read_object(data)


@given(damage=st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_damaged_object_is_read_or_refused(damage: list[tuple[int, int]]) -> None:
    data = bytearray(DATA)
    for at, value in damage:
        data[at] = value
    try:
        bpf.read_object(bytes(data))
    except ValueError:
        return


def test_a_map_that_nobody_knows_is_named() -> None:
    program = bpf.read_object(DATA).programs["encap"]
    with pytest.raises(ValueError, match="needs a map 'config'"):
        bpf.load_program("encap", program, "Apache-2.0", {})


@pytest.mark.root
def test_a_program_that_the_kernel_refuses_comes_with_its_words() -> None:
    endless = bpf.Program(struct.pack("=BBhi", 0x05, 0, -1, 0), ())
    with pytest.raises(OSError, match="the kernel refuses program endless") as refused:
        bpf.load_program("endless", endless, "Apache-2.0", {})
    assert refused.value.errno in (errno.EINVAL, errno.EACCES)


@pytest.mark.root
def test_maps_of_all_kinds() -> None:
    table = bpf.Map("peers", bpf.MapKind(bpf.LPM_TRIE, 8, 8, 100))
    key = struct.pack("=I4s", 24, bytes((10, 5, 2, 0)))
    table.put(key, b"12345678")
    table.remove(key)
    table.remove(key)  # not there is what was wanted
    counts = bpf.Map("counts", bpf.MapKind(bpf.PERCPU_ARRAY, 4, 8, 2))
    assert counts.sum(1) == 0
    assert bpf.possible_cpus() >= (os.cpu_count() or 1)
    table.close()
    counts.close()
