"""The udp backend: each packet in a UDP datagram of its own, carried by a forwarder process. Needs only TUN.

The wire format is flannel's: port 8285, one whole IP packet as the payload, nothing else. `flannel0` is a
persistent TUN device with our subnet's base address and a route to the whole network; the forwarder
(`python -m flannelpy.backends.udp`) looks up which peer has the inner destination's subnet.

    desired.py, config.py      what must exist, as pure functions
    table.py                   subnet -> peer, and what a peer may send
    outbound.py, inbound.py    batches of packets: what leaves together, what is let in and written as one
    packet.py                  checksums, ECN, ICMP errors
    forwarder.py               the loop over the two descriptors
    protocol.py, control.py    how the daemon drives it
"""

from flannelpy.backends.udp.desired import UdpBackend

__all__ = ["UdpBackend"]
