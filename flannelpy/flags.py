"""The table of flags: flannel's own and `--log-format`. Parsing, environment, `--help` and tests read it.

A reader turns the text of a value into the value, or raises ValueError with the rule that the text breaks.
Texts of booleans and integers are those of Go's `flag` package (strconv.ParseBool, ParseInt with base 0).
"""

import posixpath
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from flannelpy.model.address import Address, is_unicast, parse_address, parse_v4, parse_v6
from flannelpy.model.annotations import key_prefix
from flannelpy.model.uplink import compile_regex

Reader: TypeAlias = Callable[[str], Any]

TRUE_TEXTS = ("1", "t", "T", "TRUE", "true", "True")
FALSE_TEXTS = ("0", "f", "F", "FALSE", "false", "False")

_GO_INTEGER = re.compile(
    r"[+-]?(?:0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+|0(?:_?[0-7])*|[1-9](?:_?[0-9])*)"
)
_OLD_OCTAL = re.compile(r"[+-]?0_?[0-7]")
_ENDPOINT = re.compile(
    r"(?:(?P<scheme>https?)://(?:[^/@\s]*@)?)?(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(?P<port>[0-9]{1,5}))?/?",
    re.ASCII | re.IGNORECASE,
)


def read_text(text: str) -> str:
    """Any text."""
    return text


def read_path(text: str) -> str:
    """The path of a file that is written: not empty."""
    if not text:
        raise ValueError("must be the path of a file, not empty")
    return text


def read_boolean(text: str) -> bool:
    """One of Go's twelve texts."""
    if text in TRUE_TEXTS:
        return True
    if text in FALSE_TEXTS:
        return False
    raise ValueError("must be true or false (also 1, t, T, TRUE, True, 0, f, F, FALSE, False)")


def read_integer(text: str) -> int:
    """A Go integer: decimal, 0x, 0o, 0b or a leading 0 for octal, `_` between digits, 64 bits."""
    if len(text) > 80 or not _GO_INTEGER.fullmatch(text):
        raise ValueError("must be a whole number (decimal, or with 0x, 0o or 0b in front)")
    value = int(text, 8 if _OLD_OCTAL.match(text) else 0)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("must fit into 64 bits")
    return value


def integer(low: int | None, high: int | None, rule: str) -> Reader:
    """A reader of integers between two bounds, both included."""

    def read(text: str) -> int:
        value = read_integer(text)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(rule)
        return value

    return read


def choice(*texts: str) -> Reader:
    """A reader that takes one of the given texts."""

    def read(text: str) -> str:
        if text not in texts:
            raise ValueError("must be " + " or ".join(texts))
        return text

    return read


def read_address(text: str) -> Address | None:
    """An address of either family; empty means none."""
    return parse_address(text) if text else None


def _public(text: str, parse: Callable[[str], Address], family: str) -> Address | None:
    if not text:
        return None
    try:
        address = parse(text)
    except ValueError:
        raise ValueError(f"must be an {family} address, without a prefix length or port") from None
    if not is_unicast(address):
        raise ValueError(
            f"must be an {family} address that peers can send to, not a loopback, multicast or broadcast one"
        )
    return address


def read_public_ip(text: str) -> Address | None:
    """A unicast IPv4 address; empty means none."""
    return _public(text, parse_v4, "IPv4")


def read_public_ipv6(text: str) -> Address | None:
    """A unicast IPv6 address; empty means none."""
    return _public(text, parse_v6, "IPv6")


def read_regex(text: str) -> str:
    """A regular expression that compiles."""
    try:
        compile_regex(text)
    except ValueError as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return text


def read_prefix(text: str) -> str:
    """The cleaned prefix: prefix + "/config" is Go's `path.Join(text, "config")`; "/" becomes ""."""
    if not text or posixpath.normpath(text) == ".":
        raise ValueError("must name a key prefix, for example /coreos.com/network")
    cleaned = posixpath.normpath(text)
    return "/" + cleaned.strip("/") if cleaned.strip("/") and cleaned[0] == "/" else cleaned.strip("/")


def read_endpoints(text: str) -> tuple[str, ...]:
    """A comma list -> endpoints in normal form: `http(s)://host[:port]` or `unix://path`, without a last `/`.

    Users of the texts must hide what stands before an `@`: it may be a password.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(
            "must be a comma list of at least one etcd endpoint, for example http://127.0.0.1:2379"
        )
    return tuple(_endpoint(part) for part in parts)


def _endpoint(text: str) -> str:
    if text.startswith("unix://") and len(text) > len("unix://") and text.isprintable() and " " not in text:
        return text
    match = _ENDPOINT.fullmatch(text)
    if not match or not (match["scheme"] or match["port"]):
        raise ValueError(
            "each endpoint must be http://host:port, https://host:port, unix://path or host:port"
        )
    if match["port"] and not 1 <= int(match["port"]) <= 65535:
        raise ValueError("the port of an endpoint must be 1 to 65535")
    if not match["scheme"]:
        return "http://" + text.rstrip("/")
    scheme, _, rest = text.rstrip("/").partition("://")
    return f"{scheme.lower()}://{rest}"


def read_annotation_prefix(text: str) -> str:
    """The text itself, if annotations can begin so."""
    key_prefix(text)
    return text


def read_vmodule(text: str) -> tuple[tuple[str, int], ...]:
    """`pattern=N,...` -> ((pattern, N), ...). Empty items are skipped; the first match counts (klog)."""
    rules = []
    for item in filter(None, text.split(",")):
        pattern, equals, level = item.partition("=")
        if not pattern or not equals or not level.isascii() or not level.isdigit() or len(level) > 9:
            raise ValueError("must be a comma list of pattern=N, for example etcd*=2, where N is 0 or more")
        rules.append((pattern, int(level)))
    return tuple(rules)


def read_backtrace_at(text: str) -> tuple[str, int] | None:
    """`file:line` -> (file, line); empty means none."""
    if not text:
        return None
    name, colon, line = text.partition(":")
    if not name or not colon or not line.isascii() or not line.isdigit() or len(line) > 9 or int(line) == 0:
        raise ValueError("must be file:line, for example daemon.py:120")
    return name, int(line)


class Flag(NamedTuple):
    """One flag. Its field in `Settings` is the name with `_` for `-`."""

    name: str
    group: str
    default: str
    """The text of the default, read like any other value; empty = none. Not read for a repeatable flag."""
    read: Reader
    word: str
    """What stands for the value in `--help`; empty for a boolean."""
    help: str
    repeatable: bool = False
    secret: bool = False

    @property
    def field(self) -> str:
        """The name of the field in `Settings`."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """The environment variable that is read when the flag is not on the command line."""
        return "FLANNELD_" + self.name.replace("-", "_").replace(".", "_").upper()

    @property
    def is_boolean(self) -> bool:
        """Whether the flag takes a value only with `=`."""
        return self.read is read_boolean


ETCD = "etcd"
UPLINK = "uplink"
NETWORK = "network and leases"
TRAFFIC = "traffic rules"
KUBE = "kubernetes"
HEALTH = "health"
LOGGING = "logging"

_RENEW_RULE = "must be 1 to 1439 minutes: a lease lives 1440 and is renewed that long before its end"

# fmt: off
TABLE = (
    Flag("etcd-endpoints", ETCD, "http://127.0.0.1:4001,http://127.0.0.1:2379", read_endpoints, "LIST",
         "Comma list of etcd members: http://host:port, https://host:port, unix://path or host:port (http)."),
    Flag("etcd-prefix", ETCD, "/coreos.com/network", read_prefix, "KEY",
         "Where the network lives in etcd: its config is KEY/config, its leases are below KEY/subnets/."),
    Flag("etcd-keyfile", ETCD, "", read_text, "FILE",
         "Private key of the TLS client certificate; only together with --etcd-certfile."),
    Flag("etcd-certfile", ETCD, "", read_text, "FILE",
         "TLS client certificate; only together with --etcd-keyfile."),
    Flag("etcd-cafile", ETCD, "", read_text, "FILE",
         "Certificate authorities that etcd's certificate is checked against, instead of the system's."),
    Flag("etcd-username", ETCD, "", read_text, "NAME",
         "User for etcd's authentication; only together with a password."),
    Flag("etcd-password", ETCD, "", read_text, "TEXT",
         "Its password. Better given by the environment: a command line can be read by every user.",
         secret=True),
    Flag("etcd-password-file", ETCD, "", read_text, "FILE",
         "File with the password in its first line, instead of --etcd-password; read again when it changes."),
    Flag("iface", UPLINK, "", read_text, "NAME|IP",
         "Interface, or address of one, that carries the overlay; repeat it for second choices. Without any "
         "of the three --iface flags it is the interface of the default route.", repeatable=True),
    Flag("iface-regex", UPLINK, "", read_regex, "REGEX",
         "Regular expression on addresses, then on interface names; repeatable; tried after every --iface.",
         repeatable=True),
    Flag("iface-can-reach", UPLINK, "", read_address, "IP",
         "Take the interface that the kernel would use to reach this address; tried last."),
    Flag("public-ip", UPLINK, "", read_public_ip, "IPV4",
         "IPv4 address that peers send to, where it is not the uplink's own (NAT)."),
    Flag("public-ipv6", UPLINK, "", read_public_ipv6, "IPV6",
         "The same for IPv6."),
    Flag("subnet-file", NETWORK, "/run/flannel/subnet.env", read_path, "FILE",
         "Written for Docker and CNI once the subnet stands; read at start to get the same subnet again."),
    Flag("state-dir", NETWORK, "/var/lib/flannelpy", read_text, "FOLDER",
         "Where our lease and the peers are remembered for a start without the store; empty: nowhere."),
    Flag("subnet-lease-renew-margin", NETWORK, "60", integer(1, 1439, _RENEW_RULE), "MINUTES",
         "How long before the end of its 24 hours a lease is renewed."),
    Flag("ip-masq", TRAFFIC, "false", read_boolean, "",
         "Masquerade what leaves the overlay network."),
    Flag("ip-masq-fully-random-disable", TRAFFIC, "false", read_boolean, "",
         "Do not randomise the source ports of masqueraded connections."),
    Flag("iptables-forward-rules", TRAFFIC, "true", read_boolean, "",
         "Accept forwarded packets from and to the overlay network."),
    Flag("iptables-resync", TRAFFIC, "5", integer(1, None, "must be at least 1 second"), "SECONDS",
         "How often the rules are compared with what they should be."),
    Flag("ip-blackhole-route", TRAFFIC, "false", read_boolean, "",
         "Keep a blackhole route for our own subnet, so that packets to unused addresses end here."),
    Flag("peer-filter", TRAFFIC, "count", choice("count", "enforce", "off"), "MODE",
         "Encapsulated packets (vxlan, udp) that come from no peer: count and name them, or drop them too "
         "(enforce); off: do not look."),
    Flag("kube-subnet-mgr", KUBE, "false", read_boolean, "",
         "Take the subnets from Kubernetes nodes instead of etcd."),
    Flag("kube-api-url", KUBE, "", read_text, "URL",
         "Kubernetes API server; without it the kubeconfig's, else the one a pod is told."),
    Flag("kube-annotation-prefix", KUBE, "flannel.alpha.coreos.com", read_annotation_prefix, "TEXT",
         "Prefix of the node annotations."),
    Flag("kubeconfig-file", KUBE, "", read_text, "FILE",
         "kubeconfig with the credentials for the API server."),
    Flag("net-config-path", KUBE, "/etc/kube-flannel/net-conf.json", read_text, "FILE",
         "The network config when the subnets come from Kubernetes."),
    Flag("set-node-network-unavailable", KUBE, "true", read_boolean, "",
         "Set the node's condition NetworkUnavailable to False when the network is ready."),
    Flag("healthz-ip", HEALTH, "0.0.0.0", read_text, "IP",
         "Address that /healthz and /readyz listen on; empty: every one."),
    Flag("healthz-port", HEALTH, "0", integer(None, 65535, "must be at most 65535; 0 means off"), "PORT",
         "Their port; 0 means that they are off."),
    Flag("readyz-missing-peers", HEALTH, "10", integer(0, 100, "must be 0 to 100 percent"), "PERCENT",
         "/readyz says no when more of the peers than this are missing in the kernel for 10 seconds."),
    Flag("peer-probes", HEALTH, "true", read_boolean, "",
         "Ask peers by ICMP echo whether they are reached, and name the layer at fault (vxlan, udp)."),
    Flag("v", LOGGING, "0", read_integer, "N",
         "0 logs what an operator wants to know; 1 and more logs every decision."),
    Flag("vmodule", LOGGING, "", read_vmodule, "LIST",
         "Another --v for single source files, as pattern=N,...; the pattern matches the name without .py."),
    Flag("log_backtrace_at", LOGGING, "", read_backtrace_at, "FILE:LINE",
         "Log the call stack whenever this line logs something."),
    Flag("log-format", LOGGING, "text", choice("text", "json"), "FORMAT",
         "text: one line a message. json: one JSON object a line."),
)
# fmt: on

FLAGS = {flag.name: flag for flag in TABLE}
"""All flags by name, in the order of `--help`."""
