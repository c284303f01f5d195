"""Log lines on stderr: one line a record, text or JSON, with klog's `--v`, `--vmodule`, `--log_backtrace_at`.

Messages carry foreign data (lease values, etcd's errors): control characters are escaped, so that nobody can
write a second line, and very long messages are cut. Tracebacks and stacks are lines of their own.
"""

import fnmatch
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from flannelpy.settings import Settings

OURS = "flannelpy"

_LONGEST = 16384
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {
    "message",
    "asctime",
    "taskName",
}


def setup(settings: Settings, environ: Mapping[str, str] = os.environ, stream: TextIO | None = None) -> None:
    """Send all records to `stream` (stderr) in the form that the settings ask for; may be called again.

    Our own loggers start at INFO, or at DEBUG when `--v` or `--vmodule` asks for 1 and more; those of
    libraries at WARNING.
    """
    target = sys.stderr if stream is None else stream
    handler = _Stream(target)
    if settings.log_format == "json":
        handler.setFormatter(_Json())
    else:
        handler.setFormatter(_Text(journal=_is_journal(target, environ)))
    if settings.vmodule:
        handler.addFilter(_Verbosity(settings.vmodule, settings.v))
    if settings.log_backtrace_at is not None:
        handler.addFilter(_Backtrace(*settings.log_backtrace_at))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Stream)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    verbose = max(settings.v, *(level for _, level in settings.vmodule), 0) > 0
    logging.getLogger(OURS).setLevel(logging.DEBUG if verbose else logging.INFO)


def one_line(text: str) -> str:
    """The text with everything escaped that is not printable, cut to 16 Ki characters."""
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text) - _LONGEST} more characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class _Stream(logging.StreamHandler[TextIO]):
    """Our handler, told from others by its class."""


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether the stream goes to the journal: systemd.exec(5) has the variable name its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _short(name: str) -> str:
    return name.removeprefix(OURS + ".")


def _stamp(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _extra_lines(record: logging.LogRecord) -> Iterator[str]:
    """The lines of the record's traceback and stack."""
    if record.exc_info and record.exc_info[0] is not None:
        for block in traceback.format_exception(*record.exc_info):
            yield from block.splitlines()
    if record.stack_info:
        yield from record.stack_info.splitlines()


class _Text(logging.Formatter):
    """`2026-11-23T05:24:23.123Z INFO  store  message`; in the journal `<6>store  message`."""

    _PRIORITIES = (
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
    )

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line, and one more for each line of a traceback."""
        head = self._head(record)
        first = f"{head}{one_line(record.getMessage())}"
        return "\n".join((first, *(f"{head}  | {one_line(line)}" for line in _extra_lines(record))))

    def _head(self, record: logging.LogRecord) -> str:
        name = _short(record.name)
        if self._journal:
            priority = next((code for level, code in self._PRIORITIES if record.levelno >= level), 7)
            return f"<{priority}>{name}  "
        return f"{_stamp(record)} {record.levelname:5} {name}  "


class _Json(logging.Formatter):
    """One JSON object a line: time, level, logger, msg, the fields of `extra=`, `stack` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; ASCII only."""
        entry: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "msg": one_line(record.getMessage()),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD:
                entry.setdefault(key, value)
        stack = list(_extra_lines(record))
        if stack:
            entry["stack"] = stack
        return json.dumps(entry, default=str, separators=(",", ":"))


class _Verbosity(logging.Filter):
    """`--vmodule`: the first rule whose glob matches the stem of the source file decides, else `--v`."""

    def __init__(self, rules: tuple[tuple[str, int], ...], otherwise: int) -> None:
        super().__init__()
        self._rules = rules
        self._otherwise = otherwise
        self._levels: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is wanted; only our own debug records depend on it."""
        if record.levelno > logging.DEBUG or record.name.partition(".")[0] != OURS:
            return True
        level = self._levels.get(record.pathname)
        if level is None:
            level = self._levels[record.pathname] = self._level(record)
        return level > 0

    def _level(self, record: logging.LogRecord) -> int:
        stem = record.module
        if stem == "__init__":
            # The name of a package is that of its folder.
            stem = record.pathname.rpartition("/")[0].rpartition("/")[2]
        matching = (level for glob, level in self._rules if fnmatch.fnmatchcase(stem, glob))
        return next(matching, self._otherwise)


class _Backtrace(logging.Filter):
    """`--log_backtrace_at`: adds the call stack to the records of one source line."""

    def __init__(self, name: str, line: int) -> None:
        super().__init__()
        self._place = (name, line)

    def filter(self, record: logging.LogRecord) -> bool:
        """True for every record."""
        if (record.filename, record.lineno) == self._place and not record.stack_info:
            frames = traceback.extract_stack()
            while frames and (frames[-1].filename, frames[-1].lineno) != (record.pathname, record.lineno):
                frames.pop()
            record.stack_info = "Stack:\n" + "".join(traceback.format_list(frames))
        return True
