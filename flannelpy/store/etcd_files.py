"""What lies in files that others replace while we run: certificates and the password.

Nobody tells us, so the files are looked at whenever their content is about to be used: before a connection is
made, before a password is sent. What works is never given up for a file that is half written, or wrong.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from flannelpy.errors import FlannelpyError, StoreError

_log = logging.getLogger(__name__)
_MAX_PASSWORD = 4096

T = TypeVar("T")


class Kept(Generic[T]):
    """What `read` makes of some files, made anew when one of them has changed.

    Raises what `read` raises for the first reading; later that is logged, once for each change.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._paths = tuple(path for path in paths if path)
        self._read = read
        self._seen = self._marks()
        self._value = read()

    def current(self) -> T:
        """The newest value that could be read."""
        seen = self._marks()
        if seen != self._seen:
            self._seen = seen
            try:
                self._value = self._read()
            except FlannelpyError as error:
                _log.warning("%s; going on with what was read before", error)
            else:
                _log.info("read again after a change: %s", ", ".join(self._paths))
        return self._value

    def _marks(self) -> list[tuple[int, ...]]:
        return [_mark(path) for path in self._paths]


def _mark(path: str) -> tuple[int, ...]:
    """What changes with a file's content, also when a link leads to another file."""
    try:
        found = os.stat(path)  # noqa: PTH116 (pathlib costs 10 ms to import)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Login(NamedTuple):
    """Who we are for etcd: a user, and the password or a file with it."""

    user: str
    password: str = ""
    password_file: str = ""


def keep_password(login: Login) -> Callable[[], str]:
    """What gives the password of now. Raises StoreError if there is none to begin with."""
    if not login.password_file:
        return lambda: login.password
    path = login.password_file
    return Kept([path], lambda: read_password(path)).current


def read_password(path: str) -> str:
    """The first line of a file; an end of line behind it does not count. Raises StoreError."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            line = file.read(_MAX_PASSWORD).partition(b"\n")[0].removesuffix(b"\r")
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check --etcd-password-file") from None
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise StoreError(f"the password in {path} is not UTF-8; check --etcd-password-file") from None
    if not text:
        raise StoreError(f"{path} holds no password in its first line; check --etcd-password-file")
    return text
