"""The host-gw backend: the fastest one, for nodes of one L2 network. No device, no encapsulation.

A peer's subnet is routed via its public IP over the uplink, and that is all. So every peer must be on-link
there, and no address may be translated between the nodes. It has no options; its leases carry no data.
"""

from flannelpy.backends.hostgw.desired import HostGwBackend

__all__ = ["HostGwBackend"]
