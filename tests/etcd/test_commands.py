"""`flannelpy lease` and `flannelpy config` as processes against a real etcd: texts, JSON, codes, refusals."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cli.lease import ERRORS_FOUND, WARNINGS_FOUND
from tests.builders import V4, value
from tests.certificates import Authority
from tests.etcd.conftest import Start
from tests.etcd_process import EtcdProcess, free_port

pytestmark = pytest.mark.etcd

KEY = "10.5.52.0-24"
WIDER = '{"Network":"10.4.0.0/15","Backend":{"Type":"vxlan"}}'


class Result:
    """What a process did; whatever it was, no traceback and nothing that a terminal obeys."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        for line in (*out.split("\n"), *err.split("\n")):
            assert line.isprintable(), line
        assert "Traceback" not in err

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


class Network:
    """A network in an etcd, and the program that looks after it; settings are given by the environment."""

    def __init__(self, etcd: EtcdProcess, prefix: str, **environ: str) -> None:
        self.etcd, self.prefix = etcd, prefix
        self.environ = {
            **{name: text for name, text in os.environ.items() if not name.startswith("FLANNELD_")},
            "FLANNELD_ETCD_ENDPOINTS": etcd.endpoint,
            "FLANNELD_ETCD_PREFIX": prefix,
            # Not of these commands: nobody reads it.
            "FLANNELD_IFACE_REGEX": "(",
            "COLUMNS": "80",
            **environ,
        }

    def run(self, *argv: str, stdin: str = "") -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "flannelpy", *argv],
            input=stdin, capture_output=True, text=True, env=self.environ, timeout=60, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def fails(self, *argv: str, stdin: str = "") -> tuple[int, str]:
        """(code, its one line on stderr)."""
        done = self.run(*argv, stdin=stdin)
        assert done.err.startswith("flannelpy: ")
        assert done.err.count("\n") == 1
        return done.code, done.err

    def put(self, key: str, text: str, *, ttl: int = 86_400) -> None:
        grant = [f"--lease={self.etcd.ctl('lease', 'grant', str(ttl)).split()[1]}"] if ttl else []
        self.etcd.ctl("put", *grant, f"{self.prefix}/{key}", text)

    def get(self, key: str) -> str | None:
        kvs = self.etcd.ctl_json("get", f"{self.prefix}/{key}").get("kvs")
        return self.etcd.ctl("get", "--print-value-only", f"{self.prefix}/{key}")[:-1] if kvs else None

    def grant_of(self, key: str) -> int:
        (kv,) = self.etcd.ctl_json("get", f"{self.prefix}/{key}")["kvs"]
        return int(kv.get("lease", 0))


@pytest.fixture
def net(shared_etcd: EtcdProcess, prefix: str) -> Network:
    network = Network(shared_etcd, prefix)
    network.put("config", V4, ttl=0)
    return network


def at_a_terminal(net: Network, *argv: str, answer: str, meanwhile: Any = None) -> tuple[int, str]:
    """Run with a terminal, do something once the question stands there, answer -> (code, what was seen)."""
    terminal, inner = pty.openpty()
    program = [sys.executable, "-m", "flannelpy", *argv]
    with subprocess.Popen(program, stdin=inner, stdout=inner, stderr=inner, env=net.environ) as process:
        os.close(inner)
        seen = ""
        deadline = time.monotonic() + 30
        answered = False
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                seen += os.read(terminal, 65536).decode()
            except OSError:  # it has ended
                break
            if "[y/N]" in seen and not answered:
                answered = True
                if meanwhile is not None:
                    meanwhile()
                os.write(terminal, answer.encode() + b"\n")
        else:
            process.kill()
        os.close(terminal)
    return process.returncode, seen


# --- lease ---


def test_list_show_and_check_of_a_good_network(net: Network) -> None:
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    listed = net.run("lease", "list")
    assert listed.code == 0
    assert listed.out.splitlines()[1].split()[:3] == ["10.5.52.0/24", "192.0.2.52", "vxlan"]
    assert "10.5.0.0/16: 1 of 255 subnets taken (0 %), 254 free" in listed.out
    (record,) = net.run("lease", "list", "--output=json").json["leases"]
    assert 86_000 < record.pop("expires_in") <= 86_400
    assert {name: record[name] for name in ("key", "subnet", "public_ip", "reservation", "findings")} == {
        "key": KEY, "subnet": "10.5.52.0/24", "public_ip": "192.0.2.52", "reservation": False, "findings": [],
    }  # fmt: skip
    for name in (KEY, "10.5.52.0/24", "192.0.2.52", "10.5.52.77"):
        shown = net.run("lease", "show", name, "--output", "json").json["leases"]
        assert [(each["key"], each["value"]) for each in shown] == [(KEY, value("192.0.2.52"))]
    assert f"{net.prefix}/subnets/{KEY}" in net.run("lease", "show", KEY).out
    checked = net.run("lease", "check")
    assert (checked.code, checked.out.splitlines()[0]) == (0, "nothing is wrong")
    assert net.fails("lease", "show", "10.5.53.0-24")[0] == 1


def test_what_is_wrong_is_marked_told_and_counts(net: Network) -> None:
    net.put("subnets/10.5.1.0-24", value("192.0.2.1"))
    net.put("subnets/10.5.3.0-25", value("192.0.2.3"))
    warned = net.run("lease", "check", "--output=json")
    assert (warned.code, warned.json["worst"]) == (WARNINGS_FOUND, "warning")
    net.put("subnets/10.5.2.0-24", value("192.0.2.1"))
    net.put("subnets/evil\x1b]0;x\x07", value(BackendType="\x1b[2J"))
    net.put("subnets/10.5.4.0-24", value("192.0.2.4", BackendType="\x1b[2J\u202e" * 40))
    checked = net.run("lease", "check", "--output=json")
    assert checked.code == ERRORS_FOUND
    found = {(f["severity"], f["kind"], *f["keys"]) for f in checked.json["findings"]}
    assert found >= {
        ("error", "public-ip", "10.5.1.0-24", "10.5.2.0-24"),
        ("error", "unreadable-key", r"evil\x1b]0;x\x07"),
        ("warning", "misfit", "10.5.3.0-25"),
        ("warning", "backend", "10.5.4.0-24"),
    }
    text = net.run("lease", "check").out
    assert all(finding["text"] in text for finding in checked.json["findings"])
    listed = net.run("lease", "list").out
    assert [line[0] for line in listed.splitlines()[1:6]] == ["!"] * 5
    for name in ("10.5.4.0-24", r"evil\x1b]0;x\x07"):
        assert net.run("lease", "show", name).code == 0
    assert net.run("lease", "release", r"evil\x1b]0;x\x07", "--yes").code == 0
    assert len(net.run("lease", "list", "--output=json").json["leases"]) == 4


def test_without_a_config_the_check_says_so(shared_etcd: EtcdProcess, prefix: str) -> None:
    empty = Network(shared_etcd, prefix)
    assert empty.run("lease", "check").code == ERRORS_FOUND
    assert empty.run("lease", "list").code == 0
    code, line = empty.fails("lease", "reserve", "10.5.1.0/24", "--yes")
    assert (code, "there is no network config yet" in line) == (1, True)


def test_release_shows_first_and_needs_a_word(net: Network) -> None:
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    preview = net.run("lease", "release", KEY)
    assert (preview.code, preview.err) == (1, "flannelpy: nothing is changed: confirm with --yes\n")
    assert "- all peers remove their routes to 10.5.52.0/24 at once" in preview.out
    as_json = net.run("lease", "release", KEY, "--output=json")
    assert (as_json.code, as_json.json["done"], as_json.json["lease"]["key"]) == (1, False, KEY)
    assert net.get(f"subnets/{KEY}") is not None
    done = net.run("lease", "release", KEY, "--yes", "--output=json")
    assert (done.code, done.json["done"]) == (0, True)
    assert net.get(f"subnets/{KEY}") is None


def test_at_a_terminal_it_asks(net: Network) -> None:
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    code, seen = at_a_terminal(net, "lease", "release", KEY, answer="")
    assert (code, f"release {KEY}? [y/N]" in seen, "nothing is changed" in seen) == (1, True, True)
    assert net.get(f"subnets/{KEY}") is not None
    code, seen = at_a_terminal(net, "lease", "release", KEY, answer="y")
    assert (code, f"released {KEY}" in seen) == (0, True)
    assert net.get(f"subnets/{KEY}") is None


def test_what_changed_after_the_preview_is_left_alone(net: Network) -> None:
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    (shown,) = net.run("lease", "show", KEY, "--output=json").json["leases"]

    def renew() -> None:
        net.put(f"subnets/{KEY}", value("192.0.2.52"))

    code, seen = at_a_terminal(net, "lease", "release", KEY, answer="y", meanwhile=renew)
    assert (code, "changed by somebody else in the meantime: nothing is done" in seen) == (7, True)
    revision = str(shown["revision"])
    code, line = net.fails("lease", "release", KEY, "--yes", "--revision", revision)
    assert (code, "not as it was shown" in line) == (7, True)
    assert net.get(f"subnets/{KEY}") is not None
    code, seen = at_a_terminal(
        net, "config", "set", WIDER, answer="y", meanwhile=lambda: net.put("config", V4 + " ", ttl=0)
    )
    assert (code, net.get("config")) == (7, V4 + " ")


def test_reserve_and_unreserve(net: Network) -> None:
    assert net.run("lease", "reserve", "10.5.7.0/24", "--public-ip=192.0.2.7", "--yes").code == 0
    assert net.get("subnets/10.5.7.0-24") == '{"PublicIP":"192.0.2.7","PublicIPv6":null}'
    assert net.grant_of("subnets/10.5.7.0-24") == 0
    code, line = net.fails("lease", "reserve", "10.5.7.0/24", "--yes")
    assert (code, "a reservation already, for 192.0.2.7" in line) == (1, True)
    # A lease is kept with its value, and given back.
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    assert net.run("lease", "reserve", "10.5.52.0/24", "--yes").code == 0
    assert (net.grant_of(f"subnets/{KEY}"), net.get(f"subnets/{KEY}")) == (0, value("192.0.2.52"))
    assert net.run("lease", "check").code == 0, "reservations are no fault"
    done = net.run("lease", "unreserve", KEY, "--yes", "--output=json").json
    assert (done["done"], "lease of 24 hours" in done["effects"][0]) == (True, True)
    assert net.grant_of(f"subnets/{KEY}") != 0
    assert net.fails("lease", "unreserve", KEY, "--yes")[0] == 1
    # One that no node has taken goes at once.
    assert net.run("lease", "unreserve", "192.0.2.7", "--yes").code == 0
    assert net.get("subnets/10.5.7.0-24") is None


def test_a_reservation_survives_renewals_of_others_and_yields_to_a_lease(net: Network) -> None:
    def others() -> None:
        for number in (1, 2, 1):
            net.put(f"subnets/10.5.{number}.0-24", value(f"192.0.2.{number}"))

    code, seen = at_a_terminal(net, "lease", "reserve", "10.5.7.0/24", answer="y", meanwhile=others)
    assert (code, "reserved 10.5.7.0-24 for nobody" in seen) == (0, True)

    def taken() -> None:
        net.put("subnets/10.5.8.0-24", value("192.0.2.8"))

    code, seen = at_a_terminal(net, "lease", "reserve", "10.5.8.0/24", answer="y", meanwhile=taken)
    assert code == 7
    assert net.grant_of("subnets/10.5.8.0-24") != 0


# --- config ---


def test_config_get(net: Network) -> None:
    got = net.run("config", "get")
    assert got.code == 0
    assert V4 in got.out
    assert "room for 255 nodes" in got.out
    document = net.run("config", "get", "--output=json").json
    assert (document["text"], document["in_effect"]["SubnetMax"]) == (V4, "10.5.255.0")
    net.put("config", '{"Network":"10.5.0.0/16",\n"X":"\x7f\u202e"}', ttl=0)
    assert net.run("config", "get").code == 0
    assert net.run("config", "get", "--output=json").json["in_effect"]["Backend.Type"] == "udp"
    net.put("config", '{"Network":"\x1b[2J"', ttl=0)
    assert net.run("config", "get").code == 1


def test_config_set_shows_what_a_change_does(net: Network, tmp_path: Path) -> None:
    net.put("subnets/10.5.200.0-24", value("192.0.2.200"))
    new = '{"Network":"10.5.0.0/16","SubnetMax":"10.5.99.0","Backend":{"Type":"vxlan","VNI":7}}\n'
    (tmp_path / "net.json").write_text(new)
    preview = net.run("config", "set", str(tmp_path / "net.json"))
    assert preview.code == 1
    assert ["SubnetMax", "10.5.255.0", "10.5.99.0", "live"] in [
        line.split() for line in preview.out.splitlines()
    ]
    assert ["Backend.VNI", "1", "7", "restart"] in [line.split() for line in preview.out.splitlines()]
    assert "1 of 1 leases do not fit any more: 10.5.200.0-24" in preview.out
    assert net.get("config") == V4
    done = net.run("config", "set", "-", "--yes", "--output=json", stdin=new).json
    assert (done["done"], done["stranded"]) == (True, ["10.5.200.0-24"])
    assert [(change["key"], change["effect"]) for change in done["changes"]] == [
        ("SubnetMax", "live"), ("Backend.VNI", "restart"),
    ]  # fmt: skip
    assert net.get("config") == new.strip()
    again = net.run("config", "set", new, "--yes")
    assert (again.code, again.out) == (0, "the config is so already: nothing to do\n")


def test_the_first_config(shared_etcd: EtcdProcess, prefix: str) -> None:
    empty = Network(shared_etcd, prefix)
    code, line = empty.fails("config", "get")
    assert (code, "flannelpy config set" in line) == (1, True)
    assert empty.fails("config", "set", V4, "--yes", "--revision=5")[0] == 7
    assert empty.run("config", "set", V4, "--yes", "--revision=0").code == 0
    assert empty.get("config") == V4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not usable JSON"),
        ('{"Network":"10.5.0.0/33"}', "Network"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":-1}}', "Backend.VNI is -1"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"\x1b[2J"}}', "control character"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"nonsense"}}', "not in this version"),
        ("/nowhere/net.json", "cannot read /nowhere/net.json: No such file"),
        ("/", "cannot read /: Is a directory"),
    ],
)
def test_an_invalid_config_is_refused_with_and_without_etcd(net: Network, text: str, part: str) -> None:
    for argv in (("config", "set", text, "--yes"), ("config", "validate", text)):
        code, line = net.fails(*argv)
        assert (code, part in line) == (1, True), line
    if text.startswith("{"):
        document = net.run("config", "validate", "-", "--output=json", stdin=text)
        assert (document.code, document.json["valid"]) == (1, False)
    assert net.get("config") == V4


def test_a_backend_that_only_flannel_has_is_set_and_remarked_on(net: Network) -> None:
    new = '{"Network":"10.5.0.0/16","Backend":{"Type":"ipsec","PSK":"x"}}'
    preview = net.run("config", "set", new)
    assert preview.code == 1
    assert "remark: this version of flannelpy has no backend ipsec" in preview.out
    assert net.get("config") == V4
    assert net.run("config", "set", new, "--yes").code == 0
    assert net.get("config") == new


def test_validate_and_explain_need_no_etcd(net: Network) -> None:
    net.environ["FLANNELD_ETCD_ENDPOINTS"] = f"http://127.0.0.1:{free_port()}"
    valid = net.run("config", "validate", "-", stdin=V4.replace("{", '{"Netwok":1,', 1))
    assert (valid.code, valid.out.splitlines()[0]) == (0, "valid")
    assert "remark: Netwok is no key, so it is ignored, did you mean Network?" in valid.out
    assert net.run("config", "validate", V4, "--output=json").json["in_effect"]["SubnetLen"] == "24"
    explained = net.run("config", "explain", "--file", V4, "--output=json")
    assert {key["name"]: key["now"] for key in explained.json}["SubnetMin"] == "10.5.1.0"
    # Without a file it wants etcd: it says what it can, and that the rest is missing.
    code, line = net.fails("config", "explain", "vni")
    assert (code, "connection refused" in line) == (6, True)
    assert "Backend.VNI" in net.run("config", "explain", "vni").out


def test_explain_shows_what_holds(net: Network) -> None:
    out = net.run("config", "explain", "subnetmax").out
    assert out.startswith("SubnetMax\n")
    assert "now 10.5.255.0; default the last of Network" in out
    assert max(map(len, net.run("config", "explain").out.splitlines())) <= 80
    assert net.fails("config", "explain", "nonsense")[0] == 1


# --- the way to etcd ---


@pytest.mark.parametrize("argv", [["lease", "list"], ["lease", "check"], ["config", "get"]])
def test_an_etcd_that_is_away(net: Network, argv: list[str]) -> None:
    code, line = net.fails(*argv, f"--etcd-endpoints=http://127.0.0.1:{free_port()}")
    assert (code, "connection refused" in line) == (6, True)


def test_passwords_and_flags_work_as_for_the_daemon(start_etcd: Start) -> None:
    etcd = start_etcd()
    for command in (
        "user add root:root",
        "role add nodes",
        "role grant-permission nodes readwrite --prefix=true /net/",
        "user add node:secret",
        "role add readers",
        "role grant-permission readers read /net/config",
        "role grant-permission readers read --prefix=true /net/subnets/",
        "user add reader:secret",
        "user grant-role reader readers",
        "user grant-role root root",
        "user grant-role node nodes",
        "auth enable",
    ):
        etcd.ctl(*command.split())
    etcd.ctl_flags = ("--user=root:root",)
    net = Network(etcd, "/net", FLANNELD_ETCD_USERNAME="node", FLANNELD_ETCD_PASSWORD="secret")  # noqa: S106
    assert net.run("config", "set", V4, "--yes").code == 0
    assert net.run("lease", "reserve", "10.5.7.0/24", "--yes").code == 0
    net.put(f"subnets/{KEY}", value("192.0.2.52"))
    listed = {
        each["key"]: each["expires_in"] for each in net.run("lease", "list", "--output=json").json["leases"]
    }
    assert listed["10.5.7.0-24"] is None
    assert 86_000 < listed[KEY] <= 86_400
    for action in ("reserve", "unreserve", "release"):
        assert net.run("lease", action, "10.5.52.0/24", "--yes").code == 0, action
    code, line = net.fails("lease", "list", "--etcd-password=incorrect")
    assert (code, "wrong user name or password for 'node'" in line, "incorrect" in line) == (6, True, False)
    code, line = net.fails("lease", "list", "-etcd-prefix", "/other")
    assert (code, "permission denied for user 'node'" in line) == (6, True)
    net.environ["FLANNELD_ETCD_USERNAME"] = "reader"
    for argv in (["lease", "list"], ["lease", "check"], ["lease", "show", "10.5.7.0/24"], ["config", "get"]):
        assert net.run(*argv).code == 0, argv
    code, line = net.fails("lease", "release", "10.5.7.0-24", "--yes", "--output=json")
    assert (code, "permission denied for user 'reader'" in line) == (6, True)
    assert net.get("subnets/10.5.7.0-24") is not None
    del net.environ["FLANNELD_ETCD_PASSWORD"]
    code, line = net.fails("lease", "list")
    assert (code, "--etcd-password" in line) == (2, True)


def test_tls(start_etcd: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    server, client = authority.issue("server"), authority.issue("client")
    files = [f"--cert-file={server.certificate}", f"--key-file={server.key}", "--client-cert-auth"]
    etcd = start_etcd(flags=[*files, f"--trusted-ca-file={authority.file}"], scheme="https")
    net = Network(etcd, "/net", FLANNELD_ETCD_CAFILE=authority.file)
    assert net.fails("config", "get")[0] == 6
    pair = [f"--etcd-certfile={client.certificate}", f"--etcd-keyfile={client.key}"]
    assert net.run("config", "set", V4, "--yes", *pair).code == 0
    assert net.run("lease", "list", *pair).code == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["lease"],
        ["lease", "hunter2"],
        ["lease", "--etcd-password=", "hunter2"],
        ["lease", "list", "--etcd-password=", "hunter2"],
        ["lease", "list", "--hunter2"],
        ["lease", "list", "--output=hunter2"],
        ["lease", "release", KEY, "--revision=hunter2"],
        ["lease", "list", "--etcd-endpoints=http://u:hunter2@a:1"],
        ["config", "validate"],
    ],
)
def test_a_wrong_command_line_is_one_line_without_its_words(net: Network, argv: list[str]) -> None:
    code, line = net.fails(*argv)
    assert (code, "hunter2" in line) == (2, False), line
