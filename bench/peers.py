"""Synthetic peers: leases of nodes that do not exist, and what a daemon should make of each in the kernel."""

import base64
import json
from dataclasses import dataclass

NETWORK = "10.0.0.0/8"
KEYS = "/coreos.com/network"
UNDERLAY_LENGTH = 15
ETCD_ADDRESS = "198.18.0.1"
NODE_ADDRESS = "198.18.0.2"
_FIRST_SUBNET = 10 << 24 | 64 << 16  # far above the subnets a daemon would pick for itself
_FIRST_PUBLIC = 198 << 24 | 18 << 16 | 1 << 8  # on the underlay's subnet, so that host-gw can be measured too


def network_config(backend: str) -> str:
    """The value of `<prefix>/config`, the same for every daemon."""
    return json.dumps({"Network": NETWORK, "SubnetLen": 24, "Backend": {"Type": backend}})


@dataclass(frozen=True, slots=True)
class Peer:
    """Remote node number `number` (0 to 48,000); addresses are 4 bytes, the MAC is 6."""

    number: int

    @property
    def subnet(self) -> bytes:
        """Base of the peer's /24."""
        return (_FIRST_SUBNET + (self.number << 8)).to_bytes(4, "big")

    @property
    def public_ip(self) -> bytes:
        return (_FIRST_PUBLIC + self.number).to_bytes(4, "big")

    @property
    def mac(self) -> bytes:
        return b"\x0a\x58" + self.number.to_bytes(4, "big")

    @property
    def neighbour(self) -> bytes:
        """The neighbour entry as `bench/observer.py` keys it."""
        return self.subnet + self.mac

    @property
    def fdb_entry(self) -> bytes:
        """The FDB entry as `bench/observer.py` keys it."""
        return self.mac + self.public_ip

    def key(self) -> str:
        """The etcd key, base64."""
        return base64_text(f"{KEYS}/subnets/{_dotted(self.subnet)}-24")

    def value(self, backend: str) -> str:
        """The lease's JSON as flannel writes it, base64."""
        lease: dict[str, object] = {
            "PublicIP": _dotted(self.public_ip),
            "PublicIPv6": None,
            "BackendType": backend,
        }
        if backend == "vxlan":
            lease["BackendData"] = {"VNI": 1, "VtepMAC": self.mac.hex(":")}
        return base64_text(json.dumps(lease, separators=(",", ":")))


def _dotted(address: bytes) -> str:
    return ".".join(map(str, address))


def base64_text(text: str) -> str:
    """A key or value as etcd's JSON gateway wants it."""
    return base64.b64encode(text.encode()).decode()
