"""Flags and FLANNELD_* variables -> Settings. Pure; the syntax is that of Go's `flag` package, as in flannel.

    argv, environ --read--> values with their sources --check--> Settings

Departures from flannel: an unknown flag or a bad value ends the start (flannel ignores bad variables and
exits with 0 for bad flags), and a word that would hide the flags after it is an error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flannelpy.errors import SettingsError
from flannelpy.flags import FLAGS, Flag, read_boolean
from flannelpy.model.address import Address, format_address

COMMAND_LINE = "command line"
DEFAULT = "default"

_USER_INFO = re.compile(r"//[^/,]*@")


class ShowHelp(NamedTuple):
    """The command line asks for the help text."""


class ShowVersion(NamedTuple):
    """The command line asks for the version."""


class Settings(NamedTuple):
    """One field for each flag of `flags.TABLE`; `repr` and `describe` keep the secrets."""

    etcd_endpoints: tuple[str, ...]
    etcd_prefix: str
    """Append "/config": no `/` at the end, "" for the root; relative if it was given so."""
    etcd_keyfile: str
    etcd_certfile: str
    etcd_cafile: str
    etcd_username: str
    etcd_password: str
    etcd_password_file: str
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: Address | None
    public_ip: Address | None
    public_ipv6: Address | None
    subnet_file: str
    state_dir: str
    subnet_lease_renew_margin: int
    """Minutes."""
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    iptables_forward_rules: bool
    iptables_resync: int
    """Seconds."""
    ip_blackhole_route: bool
    peer_filter: str
    """"count", "enforce" or "off"."""
    kube_subnet_mgr: bool
    kube_api_url: str
    kube_annotation_prefix: str
    kubeconfig_file: str
    net_config_path: str
    set_node_network_unavailable: bool
    healthz_ip: str
    healthz_port: int
    """0 or less: off."""
    readyz_missing_peers: int
    """Percent."""
    peer_probes: bool
    v: int
    vmodule: tuple[tuple[str, int], ...]
    """(glob on the stem of a source file, verbosity)."""
    log_backtrace_at: tuple[str, int] | None
    """(name of a source file, line)."""
    log_format: str
    """"text" or "json"."""
    ignored_words: tuple[str, ...] = ()
    """Words after the flags: without meaning, worth a warning."""
    sources: Mapping[str, str] = MappingProxyType({})
    """Flag name -> "default", "command line" or the name of a variable."""

    def __repr__(self) -> str:
        return f"Settings({describe(self)})"


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Settings | ShowHelp | ShowVersion:
    """The words after the program's name and the environment -> what to do; SettingsError with one line."""
    read = _command_line(argv)
    if isinstance(read, ShowHelp | ShowVersion):
        return read
    given, sources, words = read
    values: dict[str, Any] = {}
    for flag in FLAGS.values():
        text = environ.get(flag.env, "")
        if flag.name not in given and text:
            given[flag.name] = [_read(flag, text, flag.env)]
            sources[flag.name] = flag.env
        if flag.repeatable:
            values[flag.field] = tuple(value for value in given.get(flag.name, ()) if value)
        else:
            values[flag.field] = given[flag.name][-1] if flag.name in given else flag.read(flag.default)
        sources.setdefault(flag.name, DEFAULT)
    settings = Settings(**values, ignored_words=words, sources=MappingProxyType(sources))
    _check_pairs(settings)
    return settings


def help_text() -> str:
    """The text of `--help`."""
    from flannelpy import usage  # only --help needs it

    return usage.help_text()


def describe(settings: Settings) -> str:
    """One line: the values that differ from their defaults, with the variables they come from; no secrets."""
    parts = []
    for flag in FLAGS.values():
        default = () if flag.repeatable else flag.read(flag.default)
        if getattr(settings, flag.field) != default:
            source = settings.sources.get(flag.name, COMMAND_LINE)
            origin = "" if source in (COMMAND_LINE, DEFAULT) else f" (from {source})"
            parts.append(f"{flag.name}={_text(flag, settings)}{origin}")
    return " ".join(parts) or "all defaults"


def _text(flag: Flag, settings: Settings) -> str:
    value = getattr(settings, flag.field)
    if flag.secret:
        return "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return format_address(value)
    if flag.field == "vmodule":
        text = ",".join(f"{pattern}={level}" for pattern, level in value)
    elif flag.field == "log_backtrace_at":
        text = f"{value[0]}:{value[1]}"
    else:
        text = ",".join(value) if isinstance(value, tuple) else str(value)
    text = _USER_INFO.sub("//***@", text)
    return text if text.isprintable() and " " not in text and text else repr(text)


_VERSION = Flag("version", "", "false", read_boolean, "", "Show the version; it has no variable.")


def _command_line(
    argv: Sequence[str],
) -> tuple[dict[str, list[Any]], dict[str, str], tuple[str, ...]] | ShowHelp | ShowVersion:
    """The words -> (values by flag name, sources, words after the flags)."""
    table = {**FLAGS, "version": _VERSION}
    given: dict[str, list[Any]] = {}
    position = 0
    while position < len(argv) and _is_flag(argv[position]):
        name, equals, text = _split(argv[position])
        position += 1
        if name in ("h", "help"):
            return ShowHelp()
        if name not in table:
            hint = _closest(name, table)
            raise SettingsError(f"unknown flag --{_bare(name)}{hint}; --help lists all flags")
        flag = table[name]
        if flag.is_boolean and not equals:
            text = "true"
        elif not equals:
            if position == len(argv):
                raise SettingsError(f"--{name} needs a value: --{name}={flag.word}")
            text = argv[position]
            position += 1
        given.setdefault(name, []).append(_read(flag, text, COMMAND_LINE))
    words = _words_after_flags(argv[position:], position + 1, table)
    if given.pop("version", [False])[-1]:
        return ShowVersion()
    return given, dict.fromkeys(given, COMMAND_LINE), words


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and word != "--"


def _split(word: str) -> tuple[str, str, str]:
    """`-name=text` or `--name=text` -> (name, "=" or "", text)."""
    name, equals, text = word[1:].removeprefix("-").partition("=")
    if not name or name[0] == "-":
        # Never with its value: that may be a password.
        raise SettingsError(f"{_show(word.partition('=')[0])} is not a flag: write --name=value, see --help")
    return name, equals, text


def _words_after_flags(rest: Sequence[str], position: int, known: Iterable[str]) -> tuple[str, ...]:
    """The words without a meaning; SettingsError if there are flags among them.

    `position` is that of the first one, counted from 1. The words are not shown: after
    `--etcd-password= secret` the stray one is the secret, and so may be what begins with a dash.
    """
    hidden = next((word for word in rest[1:] if word.startswith("-") and word != "-"), None)
    if hidden is not None:
        name = hidden.lstrip("-").partition("=")[0]
        what = f"--{name}" if name in known else "a flag"
        raise SettingsError(
            f"{what} stands after word {position} of the command line, which is no flag, and behind such a "
            "word flags are not read any more: remove that word, or join it to its flag with = "
            "(a boolean takes a value only so: --ip-masq=false)"
        )
    return tuple(rest[1:] if rest and rest[0] == "--" else rest)


def _read(flag: Flag, text: str, source: str) -> Any:
    """The value of a text; SettingsError names the flag or variable, the text and the rule."""
    try:
        return flag.read(text)
    except ValueError as error:
        # What looks like a password in a URL may be split over items of a list: then nothing is shown.
        shown = "***" if flag.secret or ("@" in text and flag.name == "etcd-endpoints") else _show(text)
        reason = _bare(str(error), 300)
        raise SettingsError(f"{_place(flag.name, source)}={shown}: {reason}") from None


def _place(name: str, source: str) -> str:
    return f"--{name}" if source in (COMMAND_LINE, DEFAULT) else source


def _bare(text: str, limit: int = 64) -> str:
    """A text that fits into one line: bounded, control characters escaped."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut if cut.isprintable() else repr(cut)[1:-1]


def _show(text: str) -> str:
    """A value as a quoted text."""
    return f'"{_bare(text)}"'


def _closest(name: str, known: Iterable[str]) -> str:
    import difflib  # only a mistake needs it

    found = difflib.get_close_matches(name[:64].lower().replace("_", "-"), known, n=1, cutoff=0.5)
    return f", did you mean --{found[0]}?" if found else ""


def _check_pairs(settings: Settings) -> None:
    """SettingsError when one of two values that only work together is missing, or one too many is given."""
    password = "etcd-password-file" if settings.etcd_password_file else "etcd-password"
    if settings.etcd_password_file and settings.etcd_password:
        places = [_place(name, settings.sources[name]) for name in ("etcd-password", "etcd-password-file")]
        raise SettingsError(f"{places[0]} and {places[1]} are both given: give one of them")
    for one, other in (("etcd-keyfile", "etcd-certfile"), ("etcd-username", password)):
        values = [getattr(settings, FLAGS[name].field) for name in (one, other)]
        if bool(values[0]) != bool(values[1]):
            missing = other if values[0] else one
            present = one if values[0] else other
            place = _place(present, settings.sources[present])
            raise SettingsError(
                f"{place} is given without --{missing}: --{one} and --{other} only work together, "
                f"give --{missing} too (or {FLAGS[missing].env})"
            )
