"""Flags and variables -> Settings: every flag in every form, every error as one line."""

import os
import subprocess
import sys

import pytest

from flannelpy.errors import FlannelpyError, SettingsError
from flannelpy.flags import FLAGS
from flannelpy.model.address import parse_address
from flannelpy.settings import Settings, ShowHelp, ShowVersion, describe, help_text, parse

# flag -> (a text that is not the default, its value)
SAMPLES: dict[str, tuple[str, object]] = {
    "etcd-endpoints": (" https://a.example:2379/, b:1 ", ("https://a.example:2379", "http://b:1")),
    "etcd-prefix": ("//a//b/", "/a/b"),
    "etcd-keyfile": ("/k", "/k"),
    "etcd-certfile": ("/c", "/c"),
    "etcd-cafile": ("/ca", "/ca"),
    "etcd-username": ("u", "u"),
    "etcd-password": ("p=w", "p=w"),
    "etcd-password-file": ("/pw", "/pw"),
    "iface": ("eth1,eth2", ("eth1,eth2",)),
    "iface-regex": (r"^eth\d$", (r"^eth\d$",)),
    "iface-can-reach": ("192.0.2.1", parse_address("192.0.2.1")),
    "public-ip": ("192.0.2.1", parse_address("192.0.2.1")),
    "public-ipv6": ("2001:db8::1", parse_address("2001:db8::1")),
    "subnet-file": ("s.env", "s.env"),
    "state-dir": ("/s", "/s"),
    "subnet-lease-renew-margin": ("0x10", 16),
    "ip-masq": ("false", False),
    "ip-masq-fully-random-disable": ("T", True),
    "iptables-forward-rules": ("F", False),
    "iptables-resync": ("1_0", 10),
    "ip-blackhole-route": ("0", False),
    "peer-filter": ("enforce", "enforce"),
    "kube-subnet-mgr": ("FALSE", False),
    "kube-api-url": ("https://k", "https://k"),
    "kube-annotation-prefix": ("x.example", "x.example"),
    "kubeconfig-file": ("/kc", "/kc"),
    "net-config-path": ("/n.json", "/n.json"),
    "set-node-network-unavailable": ("False", False),
    "healthz-ip": ("127.0.0.1", "127.0.0.1"),
    "healthz-port": ("-1", -1),
    "readyz-missing-peers": ("25", 25),
    "peer-probes": ("false", False),
    "v": ("10", 10),
    "vmodule": ("etcd*=2,,plan=0", (("etcd*", 2), ("plan", 0))),
    "log_backtrace_at": ("plan.py:12", ("plan.py", 12)),
    "log-format": ("json", "json"),
}
PARTNERS = {
    "etcd-keyfile": ["--etcd-certfile=/c"],
    "etcd-certfile": ["--etcd-keyfile=/k"],
    "etcd-username": ["--etcd-password=w"],
    "etcd-password": ["--etcd-username=u"],
    "etcd-password-file": ["--etcd-username=u"],
}


def settings(*argv: str, **environ: str) -> Settings:
    parsed = parse(argv, environ)
    assert isinstance(parsed, Settings)
    return parsed


def error(*argv: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(argv, environ)
    text = str(caught.value)
    assert len(text) < 400
    assert text.isprintable(), "one line"
    return text


def test_the_table_the_fields_and_the_samples_are_the_same_flags() -> None:
    fields = list(Settings._fields)
    assert fields == [flag.field for flag in FLAGS.values()] + ["ignored_words", "sources"]
    assert list(SAMPLES) == list(FLAGS)


def test_defaults() -> None:
    parsed = settings()
    assert parsed.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert (parsed.etcd_prefix, parsed.subnet_file) == ("/coreos.com/network", "/run/flannel/subnet.env")
    assert (parsed.subnet_lease_renew_margin, parsed.iptables_resync, parsed.healthz_port) == (60, 5, 0)
    assert (parsed.public_ip, parsed.iface, parsed.iptables_forward_rules) == (None, (), True)
    assert parsed.kube_annotation_prefix == "flannel.alpha.coreos.com"
    assert set(parsed.sources.values()) == {"default"}
    assert describe(parsed) == "all defaults"


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_in_every_form(name: str) -> None:
    flag, (text, value) = FLAGS[name], SAMPLES[name]
    partners = PARTNERS.get(name, [])
    forms = [[f"--{name}={text}"], [f"-{name}={text}"]]
    if not flag.is_boolean:
        forms += [[f"--{name}", text], [f"-{name}", text]]
    for form in forms:
        parsed = settings(*partners, *form, **{flag.env: "never read"})
        assert getattr(parsed, flag.field) == value
        assert parsed.sources[name] == "command line"
    parsed = settings(*partners, **{flag.env: text})
    assert getattr(parsed, flag.field) == value
    assert parsed.sources[name] == flag.env
    parsed = settings(**{flag.env: ""})
    assert parsed.sources[name] == "default"


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_boolean_true(text: str) -> None:
    assert settings(f"--ip-masq-fully-random-disable={text}").ip_masq_fully_random_disable is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_boolean_false(text: str) -> None:
    assert settings(f"--set-node-network-unavailable={text}").set_node_network_unavailable is False


def test_boolean_alone_is_true() -> None:
    assert settings("--ip-masq-fully-random-disable").ip_masq_fully_random_disable is True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-0", 0), ("+7", 7), ("-12", -12), ("0x1F", 31), ("0X_1f", 31), ("0b101", 5), ("0o17", 15),
        ("017", 15), ("0_17", 15), ("1_000", 1000), ("9223372036854775807", (1 << 63) - 1),
    ],
)  # fmt: skip
def test_go_integers(text: str, value: int) -> None:
    assert settings(f"--v={text}").v == value


@pytest.mark.parametrize(
    "text",
    ["", " 1", "1 ", "1__0", "_1", "1_", "08", "0x", "1.5", "1e3", "٣", "9223372036854775808", "9" * 5000],
)
def test_not_go_integers(text: str) -> None:
    assert error(f"--v={text}").startswith("--v=")


def test_repeatable_flags_accumulate_and_others_are_last_wins() -> None:
    parsed = settings("--iface=a", "-iface", "b", "--iface=", "--v=1", "--v=2", FLANNELD_IFACE="c")
    assert (parsed.iface, parsed.v) == (("a", "b"), 2)


def test_a_value_may_begin_with_a_dash() -> None:
    assert settings("--etcd-prefix", "-x").etcd_prefix == "-x"


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["word", "more"], ("word", "more")), (["--v=1", "--", "x"], ("x",)), (["-"], ("-",)), ([""], ("",))],
)
def test_ignored_words(argv: list[str], words: tuple[str, ...]) -> None:
    assert settings(*argv).ignored_words == words


@pytest.mark.parametrize("argv", [["-h"], ["--h"], ["-help"], ["--help"], ["--v=1", "--help=x", "--bogus"]])
def test_help(argv: list[str]) -> None:
    assert parse(argv, {}) == ShowHelp()


def test_version() -> None:
    assert parse(["--version"], {"FLANNELD_V": "bad"}) == ShowVersion()
    assert parse(["-version=1"], {}) == ShowVersion()
    assert (
        settings("--version=false", FLANNELD_VERSION="true", FLANNELD_HELP="true", FLANNELD_OTHER="?").v == 0
    )


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("/", ""),
        ("//", ""),
        ("a", "a"),
        ("a/", "a"),
        ("/a/../b", "/b"),
        ("//a/./b//", "/a/b"),
        ("/a b", "/a b"),
    ],
)
def test_prefix(text: str, prefix: str) -> None:
    assert settings(f"--etcd-prefix={text}").etcd_prefix == prefix


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("HTTP://Host", "http://Host"), ("10.0.0.1:2379", "http://10.0.0.1:2379"),
        ("[::1]:2379", "http://[::1]:2379"), ("https://[fd00::1]", "https://[fd00::1]"),
        ("unix:///run/etcd.sock", "unix:///run/etcd.sock"), ("http://u:p%40@h:1", "http://u:p%40@h:1"),
    ],
)  # fmt: skip
def test_endpoint(text: str, endpoint: str) -> None:
    assert settings(FLANNELD_ETCD_ENDPOINTS=text).etcd_endpoints == (endpoint,)


# --- errors: what is shown, and what the line must say ---

BAD_VALUES = [
    ("subnet-lease-renew-margin", "0", "1 to 1439"),
    ("subnet-lease-renew-margin", "1440", "1 to 1439"),
    ("healthz-port", "65536", "65535"),
    ("readyz-missing-peers", "101", "0 to 100"),
    ("iptables-resync", "0", "at least 1"),
    ("ip-masq", "yes", "true or false"),
    ("v", "x", "whole number"),
    ("public-ip", "2001:db8::1", "IPv4"),
    ("public-ip", "10.0.0.1/24", "IPv4"),
    ("public-ip", "224.0.0.1", "multicast"),
    ("public-ip", "127.0.0.1", "loopback"),
    ("public-ipv6", "10.0.0.1", "IPv6"),
    ("public-ipv6", "ff02::1", "multicast"),
    ("iface-can-reach", "host", "IP address"),
    ("iface-regex", "(", "regular expression"),
    ("iface-regex", "[[:alpa:]]", "set"),
    ("etcd-endpoints", " , ", "at least one"),
    ("etcd-endpoints", "http://a:1,ftp://b", "http://host:port"),
    ("etcd-endpoints", "host", "host:port"),
    ("etcd-endpoints", "http://a:1/path", "http://host:port"),
    ("etcd-endpoints", "http://a:70000", "65535"),
    ("etcd-endpoints", "http://a\n:1", "http://host:port"),
    ("etcd-prefix", ".", "/coreos.com/network"),
    ("vmodule", "plan", "pattern=N"),
    ("vmodule", "plan=-1", "pattern=N"),
    ("log_backtrace_at", "plan.py", "file:line"),
    ("log_backtrace_at", "plan.py:0", "file:line"),
    ("log-format", "xml", "text or json"),
    ("peer-filter", "drop", "count or enforce or off"),
]


@pytest.mark.parametrize(("name", "text", "rule"), BAD_VALUES)
def test_a_bad_value_names_its_origin_and_the_rule(name: str, text: str, rule: str) -> None:
    line = error(f"--{name}={text}")
    assert line.startswith(f'--{name}="')
    assert rule in line
    env = FLAGS[name].env
    line = error(**{env: text})
    assert line.startswith(f'{env}="')
    assert rule in line


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--etcd-endpoint=x"], ["unknown flag --etcd-endpoint,", "did you mean --etcd-endpoints?"]),
        (["--ip_masq"], ["--ip_masq", "did you mean --ip-masq?"]),
        (["--qqqqqqqq"], ["unknown flag --qqqqqqqq; --help"]),
        (["--iface"], ["--iface needs a value", "--iface=NAME|IP"]),
        (["---v=1"], ['"---v" is not a flag']),
        (["--=1"], ["is not a flag"]),
        (["--subnet-file="], ["--subnet-file=", "not empty"]),
        (["--etcd-prefix="], ["--etcd-prefix=", "/coreos.com/network"]),
        (["--ip-masq", "false", "--v=1"], ["--v stands after word 2", "--ip-masq=false"]),
        (["--", "--v=1"], ["--v stands after word 1"]),
        (["--etcd-keyfile=k"], ["--etcd-keyfile", "--etcd-certfile", "FLANNELD_ETCD_CERTFILE"]),
        (["--etcd-certfile=k"], ["--etcd-keyfile", "--etcd-certfile"]),
        (["--etcd-username=u"], ["--etcd-username", "--etcd-password"]),
        (["--etcd-password=hunter2"], ["--etcd-username", "--etcd-password"]),
        (["--etcd-password-file=/pw"], ["--etcd-username", "--etcd-password-file"]),
        (
            ["--etcd-username=u", "--etcd-password=hunter2", "--etcd-password-file=/pw"],
            ["--etcd-password", "--etcd-password-file", "both"],
        ),
    ],
)
def test_errors_of_the_command_line(argv: list[str], parts: list[str]) -> None:
    line = error(*argv)
    assert [part for part in parts if part not in line] == []
    assert "hunter2" not in line


def test_foreign_text_in_an_error_is_escaped_and_cut() -> None:
    assert "\\x1b" in error("--\x1b[31mx")
    assert len(error("--log-format=" + "x" * 100_000)) < 400


# --- what is printed ---


def test_secrets_are_never_shown() -> None:
    password = {"FLANNELD_ETCD_PASSWORD": "hunter2"}
    parsed = settings("--etcd-username=u", "--etcd-endpoints=http://u:hunter2@a:1,b:2", **password)
    assert "hunter2" not in repr(parsed)
    assert describe(parsed) == (
        "etcd-endpoints=http://***@a:1,http://b:2 etcd-username=u "
        "etcd-password=*** (from FLANNELD_ETCD_PASSWORD)"
    )
    assert "hunter2" not in error("--etcd-endpoints=http://u:hunter2@a:x")
    assert "hunter2" not in error("--etcd-endpoints=http://u:hun,ter2@a:1")
    assert "hunter2" not in error("---etcd-password=hunter2")
    assert "hunter2" not in error("--etcd-passwort=hunter2")
    assert "hunter2" not in error("--v=1", "x", "--etcd-password=hunter2")


@pytest.mark.parametrize(
    ("argv", "what", "position"),
    [
        (["--etcd-password=", "hunter2", "--v=1"], "--v", 2),
        (["--v=1", "--etcd-username", "u", "--etcd-password=", "hunter2", "--v=2"], "--v", 5),
        (["--etcd-password=", "x", "-hunter2"], "a flag", 2),
        (["--", "hunter2", "--iface=eth1"], "--iface", 1),
    ],
)
def test_a_word_that_hides_flags_is_told_by_its_position_only(
    argv: list[str], what: str, position: int
) -> None:
    line = error(*argv)
    assert line.startswith(f"{what} stands after word {position} of the command line")
    assert "join it to its flag with =" in line
    assert "hunter2" not in line


def test_describe_is_one_line_of_what_differs() -> None:
    parsed = settings("--public-ip=192.0.2.1", "--iface=a b\n", "--vmodule=x=1", "--v=0")
    assert describe(parsed) == r"iface='a b\n' public-ip=192.0.2.1 vmodule=x=1"


def test_help_teaches_every_flag_and_code() -> None:
    text = help_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for flag in FLAGS.values():
        assert f"  --{flag.name}" in text
        assert flag.env in text
        assert flag.default in text
    for kind in FlannelpyError.__subclasses__():
        assert not kind.__module__.endswith("errors") or f"\n  {kind.exit_code}  " in text
    assert "docker-opts" in text
    assert "demo" in text


# --- the real process ---


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
    return subprocess.run(
        [sys.executable, "-m", "flannelpy", *argv],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("argv", "environ", "part"),
    [
        (["--bogus"], {}, "unknown flag --bogus"),
        (["--ip-masq", "true", "--v=1"], {}, "flags are not read any more"),
        (["--v=1"], {"FLANNELD_PUBLIC_IP": "1.2.3"}, 'FLANNELD_PUBLIC_IP="1.2.3"'),
        (["--kube-annotation-prefix=org"], {}, "two or more labels"),
        (["doker-opts"], {}, "did you mean docker-opts?"),
        (["qqq\n"], {}, "commands are bench, capture, cleanup, cni, config, demo, docker-opts"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(argv: list[str], environ: dict[str, str], part: str) -> None:
    done = run(*argv, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flannelpy: ")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_and_version_of_the_process() -> None:
    done = run("--help", FLANNELD_V="bad")
    assert (done.returncode, done.stdout, done.stderr) == (0, help_text(), "")
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("flannelpy ")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "flannelpy", "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flannelpy.settings import parse; parse(['--v=1'], {}); "
        "print(sorted({'argparse', 'difflib', 'textwrap', 'asyncio', 'logging', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\n"
