"""eBPF with nothing but the kernel: an object file as a C compiler makes it, maps, programs. bpf(2), elf(5).

An object holds programs in sections `tc/<name>`, its licence in `license`, and refers to maps by the name of
a symbol in the section `maps`. Types and sizes of maps come from the caller; there is no BTF.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ARRAY, PERCPU_ARRAY, LPM_TRIE = 2, 6, 11
"""enum bpf_map_type."""
_NO_PREALLOC = 1
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _PROG_TEST_RUN = 0, 1, 2, 3, 5, 10
_SCHED_CLS = 3
_CALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
"""__NR_bpf by machine."""
_EM_BPF, _LITTLE, _BIG = 247, 1, 2
_SHT_SYMTAB, _SHT_REL = 2, 9
_LOAD_MAP = 0x18
"""BPF_LD | BPF_IMM | BPF_DW: the instruction that a map's descriptor is put into."""
_PSEUDO_MAP_FD = 1
_INSTRUCTION = 8
_LOG_BYTES = 1 << 16
_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


class Program(NamedTuple):
    """One program of an object."""

    code: bytes
    """Instructions of 8 bytes; maps are not filled in."""
    maps: tuple[tuple[int, str], ...]
    """(offset of an instruction, name of the map that it needs)."""


class Object(NamedTuple):
    """A whole object file."""

    programs: Mapping[str, Program]
    licence: str


class MapKind(NamedTuple):
    """What a map is made with: BPF_MAP_TYPE_*, bytes of key and value, most entries."""

    type: int
    key: int
    value: int
    entries: int


def read_object(data: bytes) -> Object:
    """An object file's programs; ValueError if it is none for this machine."""
    try:
        return _read(data)
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole object file: {error}") from None


def _read(data: bytes) -> Object:
    order = _LITTLE if sys.byteorder == "little" else _BIG
    if data[:4] != b"\x7fELF" or data[4] != 2 or data[5] != order:
        raise ValueError("not a 64-bit object file of this machine's byte order")
    (machine,) = struct.unpack_from("=H", data, 18)
    if machine != _EM_BPF:
        raise ValueError(f"machine {machine} is not BPF")
    (at,) = struct.unpack_from("=Q", data, 40)
    size, count, names_at = struct.unpack_from("=HHH", data, 58)
    # (name, type, offset, size, link, info) of each section
    raw = [struct.unpack_from("=IIQQQQIIQQ", data, at + number * size) for number in range(count)]
    sections = [(head[0], head[1], head[4], head[5], head[6], head[7]) for head in raw]
    contents = [data[offset : offset + length] for _name, _type, offset, length, _link, _info in sections]
    names = [_string(contents[names_at], section[0]) for section in sections]
    symbols: list[str] = []
    for number, section in enumerate(sections):
        if section[1] == _SHT_SYMTAB:
            strings = contents[section[4]]
            symbols = [
                _string(strings, struct.unpack_from("=I", contents[number], entry)[0])
                for entry in range(0, len(contents[number]), 24)
            ]
    needed: dict[int, list[tuple[int, str]]] = {}
    for number, section in enumerate(sections):
        if section[1] == _SHT_REL:
            for entry in range(0, len(contents[number]), 16):
                offset, info = struct.unpack_from("=QQ", contents[number], entry)
                needed.setdefault(section[5], []).append((offset, symbols[info >> 32]))
    programs = {
        name.removeprefix("tc/"): _program(contents[number], needed.get(number, []))
        for number, name in enumerate(names)
        if name.startswith("tc/")
    }
    licence = contents[names.index("license")] if "license" in names else b""
    return Object(programs, licence.rstrip(b"\0").decode())


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode() if offset < len(table) else ""


def _program(code: bytes, maps: list[tuple[int, str]]) -> Program:
    for offset, name in maps:
        if offset % _INSTRUCTION or offset + 2 * _INSTRUCTION > len(code) or code[offset] != _LOAD_MAP:
            raise ValueError(
                f"the reference to {name[:40]!r} at {offset} is in no instruction that loads a map"
            )
    if not code or len(code) % _INSTRUCTION:
        raise ValueError("a program is no whole number of instructions")
    return Program(code, tuple(maps))


class Map:
    """A map in the kernel; it lives for as long as this or a program that uses it."""

    def __init__(self, name: str, kind: MapKind) -> None:
        self.kind = kind
        flags = _NO_PREALLOC if kind.type == LPM_TRIE else 0
        self.fd = _call(_MAP_CREATE, struct.pack("=IIIIIII16s", *kind, flags, 0, 0, name.encode()))

    def close(self) -> None:
        """Let it go."""
        os.close(self.fd)

    def put(self, key: bytes, value: bytes) -> None:
        """Set one entry."""
        self._access(_MAP_UPDATE, key, ctypes.create_string_buffer(value, len(value)))

    def remove(self, key: bytes) -> None:
        """Remove one entry, if there is one."""
        try:
            self._access(_MAP_DELETE, key, None)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def sum(self, number: int) -> int:
        """The sum over all CPUs of a 64-bit count in a PERCPU_ARRAY."""
        found = ctypes.create_string_buffer(8 * possible_cpus())
        self._access(_MAP_LOOKUP, struct.pack("=I", number), found)
        return sum(value for (value,) in struct.iter_unpack("=Q", found.raw))

    def _access(self, command: int, key: bytes, value: "ctypes.Array[ctypes.c_char] | None") -> None:
        own = ctypes.create_string_buffer(key, len(key))
        address = ctypes.addressof(value) if value is not None else 0
        _call(command, struct.pack("=IxxxxQQQ", self.fd, ctypes.addressof(own), address, 0))


def load_program(name: str, program: Program, licence: str, maps: Mapping[str, Map]) -> int:
    """The descriptor of a program that the kernel has verified. OSError with the verifier's last words."""
    code = bytearray(program.code)
    for offset, needed in program.maps:
        if needed not in maps:
            raise ValueError(f"program {name} needs a map {needed[:40]!r} that is not known")
        code[offset + 1] = (code[offset + 1] & 0x0F) | _PSEUDO_MAP_FD << 4
        struct.pack_into("=i", code, offset + 4, maps[needed].fd)
    text = ctypes.create_string_buffer(bytes(code), len(code))
    words = ctypes.create_string_buffer(licence.encode())
    log = ctypes.create_string_buffer(_LOG_BYTES)

    def load(level: int) -> int:
        where, size = (ctypes.addressof(log), _LOG_BYTES) if level else (0, 0)
        attributes = struct.pack(
            "=IIQQIIQII16s",
            *(_SCHED_CLS, len(code) // _INSTRUCTION, ctypes.addressof(text), ctypes.addressof(words)),
            *(level, size, where, 0, 0, name.encode()),
        )
        return _call(_PROG_LOAD, attributes)

    try:
        return load(0)
    except OSError as refused:
        if refused.errno not in (errno.EINVAL, errno.EACCES):
            raise
    try:
        return load(1)
    except OSError as refused:
        lines = log.value.decode(errors="replace").split("\n")[-3:]
        raise OSError(
            refused.errno, f"the kernel refuses program {name}: {' '.join(lines).strip()}"
        ) from None


def run_program(program: int, packet: bytes, room: int = 512) -> tuple[int, bytes]:
    """What a program returns for one frame, and what it has made of it (BPF_PROG_TEST_RUN)."""
    given = ctypes.create_string_buffer(packet, len(packet))
    made = ctypes.create_string_buffer(len(packet) + room)
    attributes = bytearray(
        struct.pack(
            "=IIIIQQ",
            *(program, 0, len(packet), len(made), ctypes.addressof(given), ctypes.addressof(made)),
        )
        + bytes(48)
    )
    buffer = _call_in_place(_PROG_TEST_RUN, bytes(attributes))
    _fd, returned, _in, length = struct.unpack_from("=IIII", buffer)
    return returned, made.raw[:length]


def possible_cpus() -> int:
    """How many values a per-CPU map has: the highest possible number and one."""
    return int(_POSSIBLE_CPUS.read_text().strip().replace(",", "-").rpartition("-")[2]) + 1


def _call(command: int, attributes: bytes) -> int:
    return _system_call(command, ctypes.create_string_buffer(attributes, len(attributes)))


def _call_in_place(command: int, attributes: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    _system_call(command, buffer)
    return buffer.raw


def _system_call(command: int, buffer: "ctypes.Array[ctypes.c_char]") -> int:
    number = _CALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) is not known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    found = int(libc.syscall(ctypes.c_long(number), command, ctypes.byref(buffer), len(buffer)))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found
