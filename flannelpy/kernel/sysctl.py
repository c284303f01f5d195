"""The few knobs under /proc/sys."""

import contextlib
from pathlib import Path

_ROOT = Path("/proc/sys")


def write_quietly(name: str, value: str) -> None:
    """Write a knob that only matters if it exists and may be written: no error otherwise."""
    with contextlib.suppress(OSError):
        (_ROOT / name).write_text(value)
