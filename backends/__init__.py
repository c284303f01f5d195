"""The backends: each says, as a pure function, what the kernel must hold for packets to reach the peers.

The files live in the repository's folder `backends/`; their import path is `flannelpy.backends`.
"""

if __name__ != "flannelpy.backends":  # run from the repository root, `import backends` would make second
    raise ImportError("import flannelpy.backends, not backends")  # copies of every class
