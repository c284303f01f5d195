"""Log lines: form, verbosity, and that one record is one line whatever a message holds."""

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannelpy import log
from flannelpy.settings import Settings, parse

STORE = logging.getLogger("flannelpy.store")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("flannelpy")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


def start(*argv: str) -> io.StringIO:
    settings = parse(argv, {})
    assert isinstance(settings, Settings)
    stream = io.StringIO()
    # Else pytest keeps what is logged for its report, and a worker cannot send half a surrogate pair.
    logging.getLogger().handlers.clear()
    log.setup(settings, {}, stream)
    return stream


def test_text() -> None:
    stream = start()
    STORE.info("got %d leases", 3)
    STORE.warning("slow")
    STORE.debug("not shown")
    logging.getLogger("grpc").info("not shown")
    logging.getLogger("grpc").error("foreign")
    lines = stream.getvalue().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(stamp + " INFO  store  got 3 leases", lines[0])
    assert re.fullmatch(stamp + " WARNING store  slow", lines[1])
    assert re.fullmatch(stamp + " ERROR grpc  foreign", lines[2])
    assert len(lines) == 3


def test_the_time_is_that_of_the_record_in_utc() -> None:
    stream = start()
    record = logging.LogRecord("flannelpy.store", logging.INFO, "x.py", 1, "m", (), None)
    record.created, record.msecs = 1763875463.0004, 0.4
    STORE.handle(record)
    assert stream.getvalue() == "2025-11-23T05:24:23.000Z INFO  store  m\n"


@pytest.mark.parametrize("form", ["text", "json"])
def test_foreign_text_stays_in_its_line(form: str) -> None:
    stream = start(f"--log-format={form}")
    STORE.info("key %s", "a\nb\r\x1b[2J\x85\u2028\u202e\udcff")
    STORE.info("x" * 100_000)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[2] == ""
    assert all(line.isprintable() and len(line) < 20_000 for line in lines)
    message = json.loads(lines[0])["msg"] if form == "json" else lines[0]
    assert r"key a\nb\r\x1b[2J\x85\u2028\u202e\udcff" in message


def test_json_with_extra_fields_and_a_traceback() -> None:
    stream = start("--log-format=json")
    try:
        int("a\nb")
    except ValueError:
        STORE.exception("failed", extra={"peer": "10.0.0.1", "count": 3, "path": Path("/x"), "level": "kept"})
    entry = json.loads(stream.getvalue())
    stack = entry.pop("stack")
    assert list(entry) == ["time", "level", "logger", "msg", "peer", "count", "path"]
    assert list(entry.values())[1:] == ["error", "store", "failed", "10.0.0.1", 3, "/x"]
    assert stack[0].startswith("Traceback")
    assert stack[-1] == r"ValueError: invalid literal for int() with base 10: 'a\nb'"


def test_each_line_of_a_traceback_has_its_own_head() -> None:
    stream = start()
    try:
        Path("/\x1bx").read_text()
    except OSError:
        STORE.exception("failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) > 3
    assert all(" ERROR store  " in line for line in lines)
    assert r"  | FileNotFoundError: " in lines[-1]
    assert stream.getvalue().replace("\n", "").isprintable()


def test_in_the_journal_there_is_a_priority_and_no_time(tmp_path: Path) -> None:
    settings = parse(["--v=1"], {})
    assert isinstance(settings, Settings)
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        for environ in ({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, {"JOURNAL_STREAM": "1:2"}):
            log.setup(settings, environ, stream)
            for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
                STORE.log(level, "m")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[:5] == ["<7>store  m", "<6>store  m", "<4>store  m", "<3>store  m", "<2>store  m"]
    assert all(line.startswith("20") for line in lines[5:])
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], False),
        (["--v=1"], True),
        (["--v=-1"], False),
        (["--vmodule=test_log=1"], True),
        (["--vmodule=test_*=1"], True),
        (["--vmodule=other=9"], False),
        (["--v=1", "--vmodule=test_log=0"], False),
        (["--vmodule=test_l*=0,test_log=2"], False),
        (["--v=1", "--vmodule=other=0"], True),
    ],
)
def test_verbosity(argv: list[str], shown: bool) -> None:
    stream = start(*argv)
    STORE.debug("detail")
    STORE.info("always")
    text = stream.getvalue()
    assert ("detail" in text) is shown
    assert "always" in text


def test_a_package_is_matched_by_its_folder() -> None:
    stream = start("--vmodule=store=1")
    for path in ("/x/flannelpy/store/__init__.py", "/x/flannelpy/model/__init__.py"):
        STORE.handle(logging.LogRecord("flannelpy.store", logging.DEBUG, path, 1, path, (), None))
    assert "store/__init__" in stream.getvalue()
    assert "model/__init__" not in stream.getvalue()


def test_backtrace_of_one_line() -> None:
    here = sys._getframe().f_lineno
    stream = start(f"--log_backtrace_at=test_log.py:{here + 2}")
    STORE.info("with")
    STORE.info("without")
    lines = stream.getvalue().splitlines()
    assert lines[1].endswith("  | Stack:")
    assert lines[-2].endswith('  |     STORE.info("with")')
    assert lines[-1].endswith("  without")


def test_setup_again_replaces_the_handler() -> None:
    first, second = start(), start()
    STORE.info("once")
    assert (first.getvalue(), second.getvalue().count("once")) == ("", 1)
