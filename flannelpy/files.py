"""Files that others read, or wrote: replaced in one step, read with a bound."""

import contextlib
import os
import stat
from pathlib import Path


def read_regular(path: str | Path, largest: int) -> bytes:
    """A regular file's content; OSError, or ValueError when it is something else or has more bytes."""
    # Not blocking: somebody's pipe at this path must not stop the start.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(largest + 1)
    finally:
        os.close(descriptor)
    if len(data) > largest:
        raise ValueError(f"larger than {largest} bytes")
    return data


def replace(target: Path, text: str, mode: int) -> None:
    """A reader sees the old text or the new one, whatever happens in between; OSError leaves the old one.

    UTF-8, with this mode whatever the umask. A missing folder is made (0755).
    """
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.parent.chmod(0o755)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        # Exclusive: never through a link that somebody else put there.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        temporary.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
