"""The daemon of this host as a command beside it finds it, by its socket; and the settings it runs with."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flannelpy import control, settings
from flannelpy.doctor.facts import Daemon
from flannelpy.errors import FlannelpyError
from flannelpy.settings import Settings

_DAEMON_SECONDS = 1.0


def find_daemon(subnet_file: str) -> Daemon:
    """The daemon that writes this subnet.env."""
    path = control.path_for(subnet_file)
    pid = control.holder(path)
    if pid is None:
        return Daemon(running=False, answers=False)
    try:
        status = control.ask(path, "status", _DAEMON_SECONDS)
    except FlannelpyError as error:
        return Daemon(running=True, answers=False, pid=pid, trouble=str(error))
    return Daemon(running=True, answers=True, pid=pid, status=status)


def settings_beside(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The daemon's flags and variables as this command line changes them. Raises SettingsError."""
    mine = _parsed(argv, environ)
    pid = control.holder(control.path_for(mine.subnet_file))
    if pid is None:
        return mine
    words, variables = _of_process(pid)
    with suppress(FlannelpyError):
        return _parsed([*words, *argv], {**environ, **variables})
    return mine


def _parsed(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    found = settings.parse(argv, environ)
    if not isinstance(found, Settings):
        raise FlannelpyError("see flannelpy --help for the daemon's flags")
    return found


def _of_process(pid: int) -> tuple[list[str], dict[str, str]]:
    """(the flags, the FLANNELD_ variables) of a running daemon; nothing where we may not look."""
    words: list[str] = []
    variables: dict[str, str] = {}
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        programs = [i for i, word in enumerate(line) if Path(word).name in ("flannelpy", "__main__.py")]
        words = line[programs[0] + 1 :] if programs else []
    with suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "surrogateescape")
        pairs = (item.partition("=") for item in text.split("\0"))
        variables = {name: value for name, _equals, value in pairs if name.startswith("FLANNELD_")}
    return words, variables
