"""flannelpy: an overlay network daemon, a drop-in for flannel."""

__version__ = "0.1.0"
