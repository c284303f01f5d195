"""The alloc backend: a subnet for this node and subnet.env, and nothing else.

Packets are somebody else's task: a cloud's route table, a routing daemon, an operator's own routes. It has
no options. As flannel writes it, the lease names no backend type and carries no data.
"""

from flannelpy.backends.alloc.desired import AllocBackend

__all__ = ["AllocBackend"]
