"""What a node says of itself to Kubernetes: the condition NetworkUnavailable, and Events. Pure values."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

UP = ("False", "FlannelIsUp", "Flannel is running on this node")
"""Status, reason and message, as flannel writes them."""


def condition(status: str, reason: str, message: str, now: float) -> Mapping[str, Any]:
    """A strategic merge patch of a node's status: the list of conditions is merged by `type`."""
    stamp = _stamp(now)
    return {
        "status": {
            "conditions": [
                {
                    "type": "NetworkUnavailable",
                    "status": status,
                    "reason": reason,
                    "message": message,
                    "lastTransitionTime": stamp,
                    "lastHeartbeatTime": stamp,
                }
            ]
        }
    }


def event(node: str, reason: str, message: str, now: float) -> Mapping[str, Any]:
    """A warning that `kubectl describe node` shows; for that the uid of a node is its name, as kubelet's."""
    stamp = _stamp(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{node[:200]}.{secrets.token_hex(8)}", "namespace": "default"},
        "involvedObject": {"kind": "Node", "name": node, "uid": node},
        "type": "Warning",
        "reason": reason,
        "message": message[:1000],
        "source": {"component": "flannelpy", "host": node},
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


def _stamp(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
