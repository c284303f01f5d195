"""The vxlan backend: a VXLAN device per family, and per peer an FDB entry, a neighbour and a route.

Lease data is flannel's: `{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`. A peer's subnet base address (10.5.52.0 of
10.5.52.0/24) is its VTEP's overlay address; the route to the subnet goes via it, the neighbour gives it the
VTEP's MAC, the FDB entry gives the MAC the peer's public IP.
"""

from flannelpy.backends.vxlan.desired import VxlanBackend

__all__ = ["VxlanBackend"]
