"""What the daemon says of itself to those who ask: systemd, the commands on this host, HTTP.

What makes the answers is loaded by the first who asks: a start does not wait for it.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flannelpy.health import Health
from flannelpy.node import Node
from flannelpy.notify import Notify
from flannelpy.verdict import Verdict, is_stuck, judge

if TYPE_CHECKING:
    from flannelpy import endpoints, status
    from flannelpy.exposition import Exposition


class Voice:
    """Owned by one daemon. It speaks from the first moment on; `node` comes later."""

    def __init__(self, health: Health, notify: Notify, missing_percent: int) -> None:
        self._health = health
        self._notify = notify
        self._missing_percent = missing_percent
        self._exposition: Exposition | None = None
        self._node: Node | None = None
        self.commands: dict[str, Callable[[], Any]] = {
            "status": self._status,
            "peers": self._peers,
            "probes": lambda: dict(health.metrics.probes),
        }
        """For the control socket."""

    def pages(self) -> "endpoints.Pages":
        """For HTTP."""
        from flannelpy import endpoints

        return {
            "/healthz": lambda: endpoints.healthz(self._verdict()),
            "/readyz": lambda: endpoints.readyz(self._verdict()),
            "/metrics": self._metrics,
        }

    def tell(self, text: str) -> None:
        """The node in one line, for all who ask."""
        self._health.summary = text
        self._notify.status(text)

    def speak_for(self, node: Node) -> None:
        """There is a node now."""
        self._node = node
        self.commands.update(held=node.held, confirm=node.confirm)

    async def feed_watchdog(self, seconds: float) -> None:
        """Signs of life, for ever, unless the reconciler has stopped: then systemd starts the daemon anew."""
        while True:
            if not is_stuck(self._health, asyncio.get_running_loop().time()):
                self._notify.alive()
            await asyncio.sleep(seconds / 3)

    def _verdict(self) -> Verdict:
        return judge(self._health, asyncio.get_running_loop().time(), self._missing_percent)

    def _now(self) -> "status.Node | None":
        return None if self._node is None else self._node.now()

    def _status(self) -> dict[str, Any]:
        from flannelpy import status

        return status.document(self._now(), self._health, self._verdict())

    def _peers(self) -> list[dict[str, Any]]:
        from flannelpy import status

        return status.peers(self._now(), self._health)

    def _metrics(self) -> "endpoints.Answer":
        from flannelpy.exposition import Exposition, families

        if self._exposition is None:
            self._exposition = Exposition()
        packets = self._node.packets() if self._node else {}
        return self._exposition.page(families(self._now(), packets, self._health, self._verdict()))
