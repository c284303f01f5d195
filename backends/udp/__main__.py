"""The forwarder process: `python -m flannelpy.backends.udp`. Started by the daemon, or by systemd on demand.

It is given a listening UNIX socket and, over that, its TUN and its UDP socket: it opens nothing itself and
needs no privileges, so it gives up those that it has before anybody can talk to it.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from flannelpy.backends.udp import protocol
from flannelpy.backends.udp.control import Control

log = logging.getLogger("flannelpy.backends.udp")

_NOBODY = 65534
_SYSTEMD_FD = 3
"""SD_LISTEN_FDS_START."""
_PRIORITY = -10
"""Packets wait for this process as they would for the kernel: it should not queue behind ordinary ones."""
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


def main(argv: list[str]) -> int:
    """0: told to stop. 1: an error, which is said. With --counters: print what a forwarder has counted."""
    parser = argparse.ArgumentParser(prog="python -m flannelpy.backends.udp", description=__doc__)
    parser.add_argument("--fd", type=int, default=_SYSTEMD_FD, help="the listening socket's descriptor")
    parser.add_argument("--counters", metavar="DEVICE", help="print the counters of that device's forwarder")
    options = parser.parse_args(argv)
    if options.counters:
        return _print_counters(options.counters)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s forwarder: %(message)s")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    control = Control(socket.socket(fileno=options.fd))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, min(_PRIORITY, os.getpriority(os.PRIO_PROCESS, 0)))
        Path("/proc/self/autogroup").write_text(f"{_PRIORITY}\n")  # where sessions compete, not processes
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("flannelpy-udp")
    drop_privileges()
    # The loop makes no reference cycles; what a collection would find is nothing, at the price of pauses.
    gc.collect()
    gc.disable()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(f"signal {number}"))
    try:
        control.run()
    except SystemExit:
        return 0
    except BaseException:
        log.exception("the forwarder ends")
        return 1
    return 0


def drop_privileges() -> None:
    """Become nobody if we may, and give up every capability in any case."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # a unit's bounding set may lack CAP_SETUID
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if libc.capset(header, nothing) != 0 or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot give up privileges: {os.strerror(code)}")


def _print_counters(device: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        try:
            connection.connect(protocol.address_of(device))
            connection.send(protocol.encode({"do": "counters"}))
            answer = protocol.decode(connection.recv(protocol.MAX_MESSAGE))
        except OSError as error:
            sys.stderr.write(
                f"no forwarder of {device} answers in this network namespace: {error.strerror}\n"
            )
            return 1
    sys.stdout.write(json.dumps(answer.get("counters", answer), indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
