"""The policy of a chain of legacy iptables, asked for without a process. Needs CAP_NET_ADMIN.

The `filter` table is read as iptables reads it: IPT_SO_GET_INFO tells where each chain's policy stands,
IPT_SO_GET_ENTRIES gives the table (linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h).
To be asked only where the table is loaded already: the question itself loads it.
"""

import ctypes
import os
import socket
import struct

_GET_INFO, _GET_ENTRIES = 64, 65
_FAMILY = {32: (socket.AF_INET, socket.IPPROTO_IP), 128: (socket.AF_INET6, socket.IPPROTO_IPV6)}
_INFO = struct.Struct("@32sI5I5III")
"""struct ipt_getinfo: name, valid hooks, where each hook begins, its policy, entries, size in bytes."""
_ENTRIES = struct.Struct("@32sI4x")
"""struct ipt_get_entries: name, size; the entries follow."""
_TARGET_AT = {32: 88, 128: 140}
"""Of target_offset in struct ipt_entry and struct ip6t_entry."""
_VERDICT_AT = 32
"""In struct xt_standard_target."""
_FORWARD = 2
"""NF_INET_FORWARD."""
_DROP = -1
"""-NF_DROP - 1."""
_LARGEST = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def forward_drops(bits: int) -> bool:
    """Whether the policy of FORWARD in legacy `filter` is DROP. Raises OSError if it cannot be asked."""
    family, level = _FAMILY[bits]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        info = _INFO.unpack(_ask(sock, level, _GET_INFO, _INFO.pack(b"filter", *[0] * 13)))
        policy, size = info[7 + _FORWARD], info[13]
        if size > _LARGEST:
            raise OSError(f"the filter table has {size} bytes")
        whole = _ask(sock, level, _GET_ENTRIES, _ENTRIES.pack(b"filter", size) + bytes(size))
    entry = _ENTRIES.size + policy
    (target,) = struct.unpack_from("@H", whole, entry + _TARGET_AT[bits])
    (verdict,) = struct.unpack_from("@i", whole, entry + target + _VERDICT_AT)
    return bool(verdict == _DROP)


def _ask(sock: socket.socket, level: int, option: int, question: bytes) -> bytes:
    """getsockopt(2) with a question in the buffer of its answer, which Python's has not."""
    buffer = ctypes.create_string_buffer(question, len(question))
    length = ctypes.c_uint32(len(question))
    if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return buffer.raw
