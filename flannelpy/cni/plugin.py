#!/usr/bin/python3 -IS
"""The CNI plugin of flannelpy: reads subnet.env and has another plugin make the pod's network.

It takes flannel's place: the same configuration, the same defaults, the same state on disk, so that either
deletes what the other has added. CNI 0.3.1 to 1.1.0 (https://www.cni.dev/docs/spec/): the runtime talks to it
by variables (CNI_*), JSON on the standard input, and JSON on the standard output.

This file stands alone: a copy of it named `flannel` in /opt/cni/bin is all to be installed. It needs Python
3.9 or newer and nothing else, not the package. A pod waits for every millisecond of it, so it imports what is
compiled into the interpreter and little more, and an ADD ends by becoming the other plugin. What `flannelpy
cni install` writes is compiled already, which nearly halves the time.
"""

# The modules os, signal and socket are made of these, and take milliseconds to import.
import _signal  # type: ignore[import-not-found]
import _socket
import errno
import posix as os
import stat
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

Json = dict[str, object]

SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = SUPPORTED[-1]
ABOUT = f"""flannelpy-cni: the CNI plugin of flannelpy, also called as flannel; for container runtimes
CNI versions: {", ".join(SUPPORTED)}
"""

# The codes of the specification, and flannel's for all else.
WRONG_VERSION, UNKNOWN_CONTAINER, WRONG_ENVIRONMENT, FAILED_IO, NOT_JSON, WRONG_CONFIG = 1, 3, 4, 5, 6, 7
SAME_NETNS, TRY_AGAIN, NOT_READY, OTHER = 8, 11, 50, 999

LARGEST = 4 << 20
"""Bytes of input that are read at most: GC names every container of the host."""
LARGEST_FILE = 1 << 16
PATIENCE = 3.0
"""Seconds that STATUS gives a daemon which is just starting: an upgrade shall not make the node unready."""

NEEDS = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
    "VERSION": (),
}
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}

ENVIRON = {
    key.decode(errors="surrogateescape"): value.decode(errors="surrogateescape")
    for key, value in os.environ.items()
}

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME = _PLAIN | set("_.-")
_LONGEST_NAME = 200


class CniError(Exception):
    """What the runtime is told: a code of the specification, one line, and what is behind it."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


# --- JSON: the module json is as slow to import as Python is to start; what makes it fast is not ---


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return number


class _Reading:
    """What the compiled scanner wants to know."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float = staticmethod(_finite)
    parse_int = int

    @staticmethod
    def parse_constant(text: str) -> "NoReturn":
        raise ValueError(f"{text} is no JSON")


def _tools() -> "tuple[Callable[[str, int], tuple[Any, int]], Callable[[str], str]]":
    try:
        from _json import encode_basestring_ascii, make_scanner

        return make_scanner(_Reading), encode_basestring_ascii  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError):  # another Python than the ones we know
        import json

        decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_Reading.parse_constant)
        return decoder.raw_decode, json.dumps


_scan, _quoted = _tools()


def parsed(data: bytes, what: str) -> Json:
    """The JSON object in these bytes; CniError names `what` when there is none."""
    try:
        text = data.decode().strip(" \t\r\n")
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError, SystemError) as error:
        raise CniError(NOT_JSON, f"{what} is not JSON", _why_not_json(data) or str(error)) from None
    if end != len(text):
        raise CniError(NOT_JSON, f"{what} is not JSON", f"something follows it: {text[end : end + 20]!r}")
    if not isinstance(value, dict):
        raise CniError(NOT_JSON, f"{what} is not a JSON object")
    return value


def _why_not_json(data: bytes) -> str:
    """Where the fault is. The compiled scanner alone only says that there is one."""
    import json

    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        return "it is empty" if not data.strip() else str(error)
    return ""


def rendered(value: object) -> str:
    """JSON without spaces, keys sorted as Go sorts them."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quoted(key)}:{rendered(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(rendered, value)) + "]"
    return (
        "true" if value is True else "false" if value is False else "null" if value is None else repr(value)
    )


# --- what the runtime gives us ---


def _is_name(text: str) -> bool:
    return text[:1] in _PLAIN and _NAME.issuperset(text) and len(text) <= _LONGEST_NAME and bool(text)


def check_environment(command: str) -> None:
    """CniError unless the variables that this command needs are there and harmless as parts of a path."""
    if command not in NEEDS:
        raise CniError(WRONG_ENVIRONMENT, f"unknown CNI_COMMAND: {command[:64]!r}")
    missing = [name for name in NEEDS[command] if not ENVIRON.get(name)]
    if missing:
        raise CniError(WRONG_ENVIRONMENT, f"{command} needs the variables {', '.join(missing)}")
    if "CNI_CONTAINERID" in NEEDS[command]:
        container, interface = ENVIRON["CNI_CONTAINERID"], ENVIRON["CNI_IFNAME"]
        if not _is_name(container):
            rule = f"letters, digits, '_', '.' and '-', a letter or digit first, at most {_LONGEST_NAME}"
            raise CniError(WRONG_ENVIRONMENT, f"CNI_CONTAINERID {container[:64]!r}: {rule}")
        wrong = interface in (".", "..") or any(c in "/:" or c.isspace() or c < "!" for c in interface)
        if wrong or len(interface.encode(errors="surrogateescape")) > 15:
            rule = "no interface name: 1 to 15 characters without '/', ':' and spaces"
            raise CniError(WRONG_ENVIRONMENT, f"CNI_IFNAME {interface[:64]!r} is {rule}")


def read_input() -> bytes:
    """All of the standard input; CniError if it is too much to be a configuration."""
    parts, size = [], 0
    while size <= LARGEST and (part := os.read(0, 1 << 16)):
        parts.append(part)
        size += len(part)
    if size > LARGEST:
        raise CniError(NOT_JSON, f"the configuration on the standard input is larger than {LARGEST} bytes")
    return b"".join(parts)


def check_config(conf: Json, command: str) -> None:
    """CniError names the first key of the configuration that breaks a rule. Defaults are filled in."""
    version = conf.get("cniVersion") or "0.1.0"
    if version not in SUPPORTED:
        rule = f"cniVersion {version!r} is not one of {', '.join(SUPPORTED)}"
        raise CniError(WRONG_VERSION, "incompatible CNI versions", rule)
    needs = SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(str(version)) < SUPPORTED.index(needs):
        raise CniError(WRONG_VERSION, f"{command} needs cniVersion {needs} or newer, not {version}")
    name = conf.get("name")
    if not isinstance(name, str) or not _is_name(name):
        raise CniError(
            WRONG_CONFIG, f"name {name!r}: the network needs a name of letters, digits, '_', '.' and '-'"
        )
    for key, default in (("subnetFile", "/run/flannel/subnet.env"), ("dataDir", "/var/lib/cni/flannel")):
        conf[key] = conf.get(key) or default
        if not isinstance(conf[key], str) or "\0" in str(conf[key]):
            raise CniError(WRONG_CONFIG, f"{key} must be a path")
    for key in ("delegate", "ipam"):
        conf[key] = {} if conf.get(key) is None else conf[key]
        if not isinstance(conf[key], dict):
            raise CniError(WRONG_CONFIG, f"{key} must be an object")
    delegate: Any = conf["delegate"]
    for key in ("name", "ipam"):
        if key in delegate:
            raise CniError(
                WRONG_CONFIG, f"delegate must not hold {key!r}: it goes beside delegate, not into it"
            )
    _check_routes(conf["ipam"])


def _check_routes(ipam: "Any") -> None:
    routes = ipam.get("routes") or []
    well = isinstance(routes, list) and all(
        isinstance(r, dict) and isinstance(r.get("dst"), str) for r in routes
    )
    if not well:
        raise CniError(WRONG_CONFIG, 'ipam.routes must be a list of objects like {"dst":"192.0.2.0/24"}')


# --- subnet.env ---


class Subnet:
    """What subnet.env says: CIDR blocks as text, the MTU, whether the daemon masquerades."""

    def __init__(self) -> None:
        self.networks: list[str] = []
        self.subnets: list[str] = []
        self.mtu = -1
        self.ip_masq = False


def read_regular(path: str, follow: bool = True) -> bytes:
    """A regular file's bytes; OSError, also when it is something else or too large to be ours."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        size = os.fstat(descriptor)
        if not stat.S_ISREG(size.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if size.st_size > LARGEST_FILE:
            raise OSError(errno.EFBIG, f"larger than {LARGEST_FILE} bytes", path)
        return os.read(descriptor, LARGEST_FILE + 1)
    finally:
        os.close(descriptor)


def read_subnet(path: str) -> Subnet:
    """subnet.env as the daemon writes it; unknown keys are skipped. CniError says why it cannot be used."""
    try:
        text = read_regular(path).decode()
    except FileNotFoundError:
        raise CniError(TRY_AGAIN, f"{path} is not there: {_why_missing(path)}") from None
    except (OSError, ValueError) as error:
        raise CniError(
            FAILED_IO, f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return _parse_subnet(text, path)


def _parse_subnet(text: str, path: str) -> Subnet:
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        key, equals, value = line.strip().partition("=")
        found[key] = value
        if key.startswith("FLANNEL_") and not equals:
            raise CniError(NOT_JSON, f"{path}: line {number}: {key[:64]} has no value")
    subnet, missing = Subnet(), []
    for kind, into in (("NETWORK", subnet.networks), ("SUBNET", subnet.subnets)):
        keys = [f"FLANNEL_{kind}", f"FLANNEL_IPV6_{kind}"]
        for key in keys:
            value = found.get(key, "")
            for item in filter(None, value.split(",") if kind == "NETWORK" else [value]):
                block = _block(item.strip(), "IPV6" in key, f"{path}: {key}")
                into += [] if block in into else [block]
        missing += [] if into else keys
    missing += [key for key in ("FLANNEL_MTU", "FLANNEL_IPMASQ") if key not in found]
    if missing:
        raise CniError(NOT_JSON, f"{path} is missing {', '.join(missing)}")
    mtu = found["FLANNEL_MTU"]
    if not (mtu.isascii() and mtu.isdigit() and len(mtu) < 11 and int(mtu) < 1 << 32):
        raise CniError(NOT_JSON, f"{path}: FLANNEL_MTU {mtu[:64]!r} is not a number of bytes")
    subnet.mtu = int(mtu)
    subnet.ip_masq = found["FLANNEL_IPMASQ"] == "true"
    return subnet


def _block(text: str, is_ipv6: bool, where: str) -> str:
    """`10.5.72.1/24` -> `10.5.72.0/24`; CniError if it is no block of this family."""
    address, _, length = text.partition("/")
    family = _socket.AF_INET6 if is_ipv6 else _socket.AF_INET
    try:
        packed = _socket.inet_pton(family, address)
        bits = len(packed) * 8 - int(length if length.isascii() and length.isdigit() else "none")
        base = (int.from_bytes(packed, "big") >> bits << bits).to_bytes(len(packed), "big")
    except (OSError, ValueError):  # a negative shift, too
        kind = "IPv6" if is_ipv6 else "IPv4"
        raise CniError(NOT_JSON, f"{where} {text[:64]!r} is not an {kind} block such as its subnet") from None
    return f"{_socket.inet_ntop(family, base)}/{int(length)}"


# --- the daemon, asked by its socket beside subnet.env ---


def ask_daemon(subnet_file: str) -> Json:
    """What `flannelpy status` shows; empty if it cannot say. OSError if nobody answers."""
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        client.settimeout(2.0)
        folder, slash, name = subnet_file.rpartition("/")
        client.connect(f"{folder}{slash}{name.rpartition('.')[0] or name}.sock")
        client.send(b'{"do":"status"}\n')
        data = b""
        while not data.endswith(b"\n") and len(data) < LARGEST and (part := client.recv(LARGEST_FILE)):
            data += part
    finally:
        client.close()
    try:
        answer = parsed(data, "the daemon's answer").get("ok")
    except CniError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _why_missing(subnet_file: str) -> str:
    try:
        said = _reasons(ask_daemon(subnet_file))
    except OSError:
        return (
            "no flannelpy daemon answers on this node; it writes the file once it has a subnet. See its log:"
            " kubectl -n kube-flannel logs ds/kube-flannel-ds, or journalctl -u flannelpy"
        )
    return f"the daemon of this node runs, but has no subnet yet: {said}"


def _reasons(said: Json) -> str:
    """What is wrong with the daemon in its own words, the worst first."""
    lists = [words for words in (said.get("faults"), said.get("flaws")) if isinstance(words, list)]
    return "; ".join(str(words) for some in lists for words in some)[:500] or "it does not say why"


# --- the other plugin, to which the work is delegated ---


def delegate_config(conf: Json, subnet: Subnet) -> Json:
    """What the other plugin gets: flannel's defaults below what the configuration asks for."""
    made: Json = dict(conf["delegate"])  # type: ignore[call-overload]
    made["name"] = conf["name"]
    made.setdefault("type", "bridge")
    made.setdefault("ipMasq", not subnet.ip_masq)  # only one of the two may masquerade
    made.setdefault("mtu", subnet.mtu)
    if made["type"] == "bridge":
        made.setdefault("isGateway", True)
    for key in ("cniVersion", "runtimeConfig"):
        if conf.get(key):
            made[key] = conf[key]
    ipam: Json = dict(conf["ipam"])  # type: ignore[call-overload]
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": block}] for block in subnet.subnets]
    ipam["routes"] = [*(ipam.get("routes") or []), *({"dst": network} for network in subnet.networks)]  # type: ignore[misc]
    made["ipam"] = ipam
    return made


def find_plugin(made: Json) -> str:
    """Where CNI_PATH has the program of this configuration's `type`. CniError: nowhere, or it would be us."""
    kind = made.get("type")
    if not isinstance(kind, str) or not kind or "/" in kind or "\0" in kind:
        raise CniError(WRONG_CONFIG, f"delegate.type {kind!r} must be the name of a CNI plugin")
    if kind in ("flannel", "flannelpy-cni"):
        raise CniError(WRONG_CONFIG, f"delegate.type is {kind}: it would call itself for ever; use bridge")
    folders = ENVIRON["CNI_PATH"].split(":")
    for folder in folders:
        path = f"{folder}/{kind}"
        if folder and stat.S_ISREG(_mode(path)):
            return path
    where = ", ".join(folder for folder in folders if folder)
    raise CniError(FAILED_IO, f"the CNI plugin {kind} is not in {where}: install the reference plugins there")


def _mode(path: str, follow: bool = True) -> int:
    """What kind of file it is (st_mode); 0 if there is none."""
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except OSError:
        return 0


def _standard_input(made: Json) -> int:
    descriptor = os.memfd_create("cni")
    os.write(descriptor, rendered(made).encode())
    os.lseek(descriptor, 0, 0)
    return descriptor


def become(program: str, made: Json) -> int:
    """The other plugin takes this process over: its answer goes to the runtime without a detour."""
    os.dup2(_standard_input(made), 0)
    try:
        os.execv(program, [program])
    except OSError as error:
        raise CniError(FAILED_IO, f"cannot run {program}: {error.strerror}") from None


def call(program: str, made: Json, variables: "dict[str, str]", quiet: bool = False) -> int:
    """Run the other plugin to its end -> its exit code, or 128 + signal. `quiet`: it answers on stderr."""
    into = [(os.POSIX_SPAWN_DUP2, _standard_input(made), 0)]
    if quiet:
        into.append((os.POSIX_SPAWN_DUP2, 2, 1))
    try:
        child = os.posix_spawn(program, [program], {**ENVIRON, **variables}, file_actions=into)
    except OSError as error:
        raise CniError(FAILED_IO, f"cannot run {program}: {error.strerror}") from None
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


# --- the state: with what each pod was added, so that it can be deleted when the daemon is gone ---
#
#     <dataDir>/<container>@<interface>    the other plugin's configuration
#     <dataDir>/<container>                flannel's name: a link to the first one, or flannel's own file


def keep(folder: str, container: str, interface: str, made: Json) -> None:
    """Store it durably and in one step, before anything is made that would have to be deleted."""
    _make_folder(folder)
    name = f"{container}@{interface}"
    temporary = f"{folder}/.{os.getpid()}.new"
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(descriptor, rendered(made).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, f"{folder}/{name}")
    try:
        os.symlink(name, f"{folder}/{container}")
    except FileExistsError:
        pass  # another interface has it, or this is not the first ADD


def _make_folder(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        above = path.rpartition("/")[0]
        if not above:
            raise
        _make_folder(above)
        _make_folder(path)


def kept(folder: str, container: str, interface: str) -> "tuple[str, bytes]":
    """Name and content of an attachment's file, ours or flannel's; an empty name if there is none."""
    for name in (f"{container}@{interface}", container):
        try:
            return name, read_regular(f"{folder}/{name}", follow=False)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise CniError(FAILED_IO, f"cannot read {folder}/{name}: {error.strerror}") from None
    return "", b""


def forget(folder: str, name: str) -> None:
    """Remove an attachment's file, and the link of flannel's name if it leads there."""
    container = name.partition("@")[0]
    link = f"{folder}/{container}"
    if name == container or (stat.S_ISLNK(_mode(link, follow=False)) and os.readlink(link) == name):
        os.unlink(link)
    if name != container:
        os.unlink(f"{folder}/{name}")


# --- the commands ---


def add(conf: Json) -> int:
    """Make the pod's interface."""
    made = delegate_config(conf, read_subnet(str(conf["subnetFile"])))
    program = find_plugin(made)
    netns = ENVIRON["CNI_NETNS"]
    try:
        theirs, ours = os.stat(netns), os.stat("/proc/self/ns/net")
        same = (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
    except OSError:
        same = False  # the other plugin says what is wrong with it
    if same and ENVIRON.get("CNI_NETNS_OVERRIDE", "").lower() not in ("1", "true"):
        raise CniError(SAME_NETNS, f"CNI_NETNS {netns} is the host's own namespace")
    keep(str(conf["dataDir"]), ENVIRON["CNI_CONTAINERID"], ENVIRON["CNI_IFNAME"], made)
    return become(program, made)


def delete(conf: Json) -> int:
    """Remove it. The state stays until the other plugin has succeeded; without a state there is nothing."""
    folder = str(conf["dataDir"])
    name, data = kept(folder, ENVIRON["CNI_CONTAINERID"], ENVIRON["CNI_IFNAME"])
    if not name:
        return 0
    made = _readable(conf, f"{folder}/{name}", data)
    if not made:
        return 0
    code = call(find_plugin(made), made, {"CNI_COMMAND": "DEL"})
    if code >= 128:
        raise CniError(
            OTHER, f"the CNI plugin {made['type']} was killed by signal {code - 128}; DEL may be repeated"
        )
    if code == 0:
        forget(folder, name)
    return code


def _readable(conf: Json, path: str, data: bytes) -> Json:
    """The configuration in a state file; if it is broken, what the same pod would get today; else nothing."""
    try:
        return parsed(data, path)
    except CniError as error:
        _say(f"{error} ({error.details}); going by {conf['subnetFile']}")
    try:
        return delegate_config(conf, read_subnet(str(conf["subnetFile"])))
    except CniError as error:
        _say(f"{error}; nothing is deleted, {path} stays")
        return {}


def _say(words: str) -> None:
    os.write(2, f"flannelpy-cni: {words}\n".encode(errors="replace"))


def check(conf: Json) -> int:
    """Is the interface as it was made? The other plugin knows; whether the subnet is still ours, we do."""
    container, folder = ENVIRON["CNI_CONTAINERID"], str(conf["dataDir"])
    name, data = kept(folder, container, ENVIRON["CNI_IFNAME"])
    if not name:
        raise CniError(
            UNKNOWN_CONTAINER, f"container {container[:64]} has not been added to this network here"
        )
    made = parsed(data, f"{folder}/{name}")
    now = delegate_config(conf, read_subnet(str(conf["subnetFile"])))
    then, ranges = made.get("ipam"), now["ipam"]["ranges"]  # type: ignore[index]
    if isinstance(then, dict) and then.get("ranges") != ranges:
        words = (
            f"the pod has an address of {rendered(then.get('ranges'))}, this node now has {rendered(ranges)}"
        )
        raise CniError(OTHER, f"{words}: delete the pod")
    for key in ("cniVersion", "prevResult"):
        if conf.get(key):
            made[key] = conf[key]
    return become(find_plugin(made), made)


def status(conf: Json) -> int:
    """May pods be added? If the daemon is ready, as far as it can be asked, and the other plugin, too."""
    subnet_file = str(conf["subnetFile"])
    end = monotonic() + PATIENCE
    while words := _unready(subnet_file):
        if monotonic() > end:
            raise CniError(NOT_READY, words)
        sleep(0.1)
    try:
        made = delegate_config(conf, read_subnet(subnet_file))
        program = find_plugin(made)
    except CniError as error:
        raise CniError(NOT_READY, str(error), error.details) from None
    return become(program, made)


def _unready(subnet_file: str) -> str:
    """Why no pod can be added now; empty if one can. Without a socket subnet.env alone counts."""
    try:
        read_subnet(subnet_file)
        said = ask_daemon(subnet_file)
    except CniError as error:
        return str(error)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"the flannelpy daemon of this node does not answer: {error.strerror or error}"
    return f"the flannelpy daemon is not ready: {_reasons(said)}" if said.get("state") == "not ready" else ""


def collect_garbage(conf: Json) -> int:
    """Delete this network's attachments that the runtime no longer knows; then the other plugin does so."""
    alive = conf.get("cni.dev/valid-attachments")
    if not isinstance(alive, list) or not all(isinstance(one, dict) for one in alive):
        raise CniError(WRONG_CONFIG, "GC needs cni.dev/valid-attachments, a list of {containerID, ifname}")
    valid = {f"{one.get('containerID')}@{one.get('ifname')}" for one in alive}
    valid |= {str(one.get("containerID")) for one in alive}
    folder, failed, last = str(conf["dataDir"]), [], {}
    for name, made in _attachments(folder, conf["name"]):
        last = made
        if name not in valid and not _delete_stale(folder, name, made):
            failed.append(name)
    if failed:
        raise CniError(OTHER, f"could not delete {len(failed)} stale attachments: {', '.join(failed)[:500]}")
    try:
        last = delegate_config(conf, read_subnet(str(conf["subnetFile"])))
    except CniError:  # the daemon is gone: as it was
        if not last:
            return 0
    keys = ("cniVersion", "cni.dev/valid-attachments", "cni.dev/attachments")
    return become(find_plugin(last), {**last, **{key: conf[key] for key in keys if key in conf}})


def _attachments(folder: str, network: object) -> "Iterator[tuple[str, Json]]":
    for name in sorted(os.listdir(folder)) if stat.S_ISDIR(_mode(folder)) else []:
        try:
            made = parsed(read_regular(f"{folder}/{name}", follow=False), name)
        except (OSError, CniError):
            continue  # a link, not ours, or broken: then its DEL will say so
        if made.get("name") == network and _is_name(name.partition("@")[0]):
            yield name, made


def _delete_stale(folder: str, name: str, made: Json) -> bool:
    container, _, interface = name.partition("@")
    variables = {"CNI_CONTAINERID": container, "CNI_IFNAME": interface or "eth0", "CNI_NETNS": ""}
    if call(find_plugin(made), made, {"CNI_COMMAND": "DEL", **variables}, quiet=True):
        return False
    forget(folder, name)
    return True


COMMANDS = {"ADD": add, "DEL": delete, "CHECK": check, "STATUS": status, "GC": collect_garbage}


def run(command: str, told: "dict[str, str]") -> int:
    """Do one command -> exit code. `told` gets the CNI version as soon as it is known."""
    check_environment(command)
    data = read_input()
    if command == "VERSION":
        answer = {"cniVersion": NEWEST, "supportedVersions": list(SUPPORTED)}
        os.write(1, rendered(answer).encode() + b"\n")
        return 0
    conf = parsed(data, "the configuration on the standard input")
    if conf.get("cniVersion") in SUPPORTED:
        told["cniVersion"] = str(conf["cniVersion"])
    check_config(conf, command)
    return COMMANDS[command](conf)


def main() -> int:
    """What the runtime calls. Every failure is one JSON object on the standard output, and exit code 1."""
    _signal.signal(
        _signal.SIGPIPE, _signal.SIG_DFL
    )  # Python ignores it, and the other plugin would inherit that
    command = ENVIRON.get("CNI_COMMAND", "")
    if not command:
        os.write(2, ABOUT.encode())
        return 0
    told = {"cniVersion": NEWEST}
    try:
        return run(command, told)
    except CniError as error:
        code, words, details = error.code, str(error), error.details
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, words, details = FAILED_IO, f"{where}{error.strerror or error}", ""
    except RecursionError:
        code, words, details = NOT_JSON, "the configuration is nested too deep", ""
    failure: Json = {**told, "code": code, "msg": words, **({"details": details} if details else {})}
    os.write(1, rendered(failure).encode() + b"\n")
    return 1


if __name__ == "__main__":
    os._exit(main())  # taking Python down takes a millisecond, and nothing is buffered
