"""sd_notify(3): tell systemd how the service is, over the datagram socket that NOTIFY_SOCKET names."""

import os
import socket
from collections.abc import Mapping

_SEND_TIMEOUT_S = 1.0


class Notify:
    """The notifications of one process; without NOTIFY_SOCKET, or if systemd is away, they do nothing.

    Every method returns whether the message was handed over, and never raises.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of an abstract socket; other forms (vsock:) are not for us.
        self._address = "\0" + path[1:] if path[:1] == "@" else path if path[:1] == "/" else ""
        self.watchdog_seconds = _watchdog_seconds(environ) if self._address else None
        """How long systemd waits for `alive` before it kills the process; None = it does not watch."""

    def ready(self) -> bool:
        """The start is complete: units that are ordered after this one may start."""
        return self._send("READY=1")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send("STATUS=" + " ".join(text.split()))

    def stopping(self) -> bool:
        """The shutdown has begun."""
        return self._send("STOPPING=1")

    def alive(self) -> bool:
        """A sign of life for the watchdog."""
        return self._send("WATCHDOG=1")

    def _send(self, message: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                # A full queue must not stop the daemon, but a lost READY=1 would leave the unit starting.
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto(message.encode("utf-8", "replace"), self._address)
        except (OSError, ValueError):
            return False
        return True


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """sd_watchdog_enabled(3): WATCHDOG_USEC, unless WATCHDOG_PID is another process."""
    text, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if process not in ("", str(os.getpid())) or not (text.isascii() and text.isdigit()) or int(text) == 0:
        return None
    return int(text) / 1e6
