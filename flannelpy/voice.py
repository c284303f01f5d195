"""What the daemon says of itself to those who ask: systemd, the commands on this host, HTTP.

What makes the answers is loaded by the first who asks: a start does not wait for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flannelpy.health import Health
from flannelpy.node import Node
from flannelpy.notify import Notify
from flannelpy.verdict import Verdict, is_stuck, judge

if TYPE_CHECKING:
    from flannelpy import endpoints, status
    from flannelpy.exposition import Exposition

log = logging.getLogger("flannelpy.daemon")


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

    def store_trouble(self, reason: str | None) -> None:
        """Why the store cannot be reached or used; None: it answers again."""
        health, now = self._health, time.time()
        if reason == health.store_trouble:
            return
        if reason is None:
            log.info("the store answers again, after %.0f s", now - health.store_trouble_since)
            self._notify.status(health.summary)
        else:
            if health.store_trouble is None:
                health.store_trouble_since = now
            health.metrics.store_troubles += 1
            since = time.strftime("%H:%M:%SZ", time.gmtime(health.store_trouble_since))
            outcome = f"the network goes on with what was known at {since}" if health.ready else "waiting"
            log.warning("%s; %s", reason, outcome)
            self._notify.status(f"{reason}; {outcome}")
        health.store_trouble = reason

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
