"""The CNI plugin, called as a process: variables, configuration, subnet.env, state, errors."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannelpy.cni import plugin
from tests.unit.cni.calls import ENV_V4, OURS, Host

SOURCE = Path(plugin.__file__)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def refused(host: Host, command: str, code: int, words: str, **call: Any) -> None:
    """One JSON object with this code and these words, exit code 1, and nothing on stderr."""
    answer = host.call(command, **call)
    assert (answer.code, answer.json["code"], answer.stderr) == (1, code, ""), answer
    assert words in answer.json["msg"] + answer.json.get("details", "")
    assert "\n" not in answer.json["msg"]
    assert answer.json["cniVersion"] in plugin.SUPPORTED


# --- what the runtime gives ---


@pytest.mark.parametrize("stdin", [b"", b"{}", b'{"cniVersion":"0.3.1"}', b"no JSON"])
def test_version_needs_nothing(host: Host, stdin: bytes) -> None:
    answer = host.call("VERSION", stdin=stdin, variables={"CNI_PATH": "", "CNI_CONTAINERID": ""})
    assert answer.code == 0
    assert answer.json["supportedVersions"] == ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


def test_called_by_hand_it_says_what_it_is(host: Host) -> None:
    answer = host.call("", stdin=b"")
    assert (answer.code, answer.text) == (0, "")
    assert "CNI versions: 0.1.0" in answer.stderr


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command, needed in plugin.NEEDS.items() for name in needed],
)
def test_a_missing_variable_is_named(host: Host, command: str, name: str) -> None:
    refused(host, command, 4, name, variables={name: ""}, conf={**host.conf, "cniVersion": "1.1.0"})
    assert host.calls() == []


def test_all_missing_variables_are_named_at_once(host: Host) -> None:
    nothing = dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), "")
    refused(host, "ADD", 4, "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_PATH", variables=nothing)


def test_an_unknown_command_is_refused(host: Host) -> None:
    refused(host, "EXPLODE", 4, "EXPLODE")


@pytest.mark.parametrize(
    "container", ["../../etc/passwd", "/etc/x", ".", "..", "a/b", "a b", "-x", "a@b", "ä", "x" * 201, "a\nb"]
)
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_a_hostile_container_id_leads_nowhere(host: Host, command: str, container: str) -> None:
    refused(host, command, 4, "CNI_CONTAINERID", variables={"CNI_CONTAINERID": container})
    assert not host.state.exists()


@pytest.mark.parametrize("interface", ["../x", "a/b", ".", "..", "a b", "a:b", "a\tb", "x" * 16, "ä" * 8])
def test_a_hostile_interface_leads_nowhere(host: Host, interface: str) -> None:
    refused(host, "ADD", 4, "CNI_IFNAME", variables={"CNI_IFNAME": interface})
    assert not host.state.exists()


@pytest.mark.parametrize(
    "stdin",
    [b"", b" \n", b"{", b"[]", b"null", b"7", b'{"a":1}x', b'{"a":NaN}', b'{"a":1e999}', b"\xff\xfe",
     b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b" " * (plugin.LARGEST + 1)],
)  # fmt: skip
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_bad_json_is_refused(host: Host, command: str, stdin: bytes) -> None:
    refused(host, command, 6, "", stdin=stdin)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"cniVersion": "9.9.9"}, 1, "9.9.9"),
        ({"cniVersion": 1}, 1, "1"),
        ({"cniVersion": ["1.0.0"]}, 1, "1.0.0"),
        ({"name": None}, 7, "name"),
        ({"name": ""}, 7, "name"),
        ({"name": "../x"}, 7, "name"),
        ({"name": {}}, 7, "name"),
        ({"subnetFile": 5}, 7, "subnetFile"),
        ({"dataDir": ["x"]}, 7, "dataDir"),
        ({"dataDir": "/x\0y"}, 7, "dataDir"),
        ({"delegate": "bridge"}, 7, "delegate"),
        ({"delegate": {"name": "x"}}, 7, "'name'"),
        ({"delegate": {"ipam": {}}}, 7, "'ipam'"),
        ({"delegate": {"type": 5}}, 7, "delegate.type"),
        ({"delegate": {"type": ""}}, 7, "delegate.type"),
        ({"delegate": {"type": "../../bin/sh"}}, 7, "delegate.type"),
        ({"delegate": {"type": "flannel"}}, 7, "call itself"),
        ({"delegate": {"type": "flannelpy-cni"}}, 7, "call itself"),
        ({"delegate": {"type": "nothing"}}, 5, "nothing is not in"),
        ({"ipam": []}, 7, "ipam"),
        ({"ipam": {"routes": {"dst": "x"}}}, 7, "ipam.routes"),
        ({"ipam": {"routes": [{"gw": "10.0.0.1"}]}}, 7, "ipam.routes"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_is_made(
    host: Host, changes: dict[str, Any], code: int, words: str
) -> None:
    refused(host, "ADD", code, words, conf={**host.conf, **changes})
    assert host.calls() == []
    assert not host.state.exists()


def test_an_old_version_has_no_new_commands(host: Host) -> None:
    for command, version in (("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")):
        refused(host, command, 1, command, conf={**host.conf, "cniVersion": version})


# --- what the other plugin gets ---


def test_what_is_given_wins_over_the_defaults(host: Host) -> None:
    host.recorder("macvlan")
    own = {"type": "macvlan", "mtu": 1400, "ipMasq": True, "master": "eth0"}
    conf = {**host.conf, "delegate": own, "runtimeConfig": {"portMappings": [{"hostPort": 80}]}}
    assert host.call("ADD", conf={**conf, "prevResult": {}, "args": {}, "dns": {}}).code == 0
    made = host.recorded("ADD")
    assert {key: made[key] for key in own} == own
    assert made["runtimeConfig"] == {"portMappings": [{"hostPort": 80}]}
    assert not {"isGateway", "prevResult", "args", "dns"} & set(made)


def test_without_a_version_none_is_passed_on(host: Host) -> None:
    del host.conf["cniVersion"]
    assert host.call("ADD").code == 0
    assert "cniVersion" not in host.recorded("ADD")


def test_the_environment_is_passed_on(host: Host) -> None:
    assert host.call("ADD", variables={"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=p"}).code == 0
    seen = (host.folder / "plugins" / "ADD.env").read_text()
    assert "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=p\n" in seen
    assert "CNI_CONTAINERID=c1\nCNI_IFNAME=eth0\n" in seen


def test_the_text_that_goes_out_is_the_text_that_came_in(host: Host) -> None:
    odd = {"a": 'ä"\\\u2028\ud800', "b": [1, 0, True, False, None, 1.5, -3, 2**70], "c": {"": {}}}
    assert host.call("ADD", conf={**host.conf, "delegate": odd}).code == 0
    made = host.recorded("ADD")
    assert {key: made[key] for key in odd} == odd
    assert [type(value) for value in made["b"]] == [int, int, bool, bool, type(None), float, int, int]


def test_the_first_folder_that_has_the_plugin_counts(host: Host) -> None:
    (host.folder / "empty").mkdir()
    (host.folder / "folder" / "bridge").mkdir(parents=True)
    host.path = f"{host.folder}/empty::{host.folder}/folder:{host.path}:/nowhere"
    assert host.call("ADD").code == 0


def test_a_plugin_that_cannot_be_run_is_an_error(host: Host) -> None:
    (host.folder / "plugins" / "bridge").chmod(0o644)
    refused(host, "ADD", 5, "bridge")


def test_the_answer_is_that_of_the_other_plugin(host: Host) -> None:
    assert host.call("ADD").json == {"cniVersion": "1.0.0", "ips": []}
    (host.folder / "plugins" / "fail").touch()
    answer = host.call("ADD")
    assert (answer.code, answer.json["code"], answer.json["msg"]) == (1, 102, "as you wish")


# --- subnet.env ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FLANNEL_MTU\n" + ENV_V4, "line 1: FLANNEL_MTU has no value"),
        (ENV_V4.replace("1450", "x"), "FLANNEL_MTU"),
        (ENV_V4.replace("1450", "-1"), "FLANNEL_MTU"),
        (ENV_V4.replace("1450", "9" * 5000), "FLANNEL_MTU"),
        (ENV_V4.replace("10.5.72.1/24", "10.5.72.1"), "FLANNEL_SUBNET '10.5.72.1'"),
        (ENV_V4.replace("10.5.72.1/24", "10.5.72.1/33"), "FLANNEL_SUBNET"),
        (ENV_V4.replace("10.5.72.1/24", "10.5.72.1/+8"), "FLANNEL_SUBNET"),
        (ENV_V4.replace("10.5.72.1/24", "10.5.72/24"), "FLANNEL_SUBNET"),
        (ENV_V4.replace("10.5.72.1/24", "fd00::/64"), "IPv4 block"),
        (ENV_V4 + "FLANNEL_IPV6_SUBNET=10.5.72.1/24\n", "IPv6 block"),
        (ENV_V4.replace("FLANNEL_IPMASQ=true\n", ""), "missing FLANNEL_IPMASQ"),
        ("", "missing FLANNEL_NETWORK"),
    ],
)
def test_a_bad_subnet_env_is_refused(host: Host, text: str, words: str) -> None:
    host.subnet_file.write_text(text)
    refused(host, "ADD", 6, words)
    assert not host.state.exists()


def test_subnet_env_may_be_anything(host: Host, tmp_path: Path) -> None:
    host.subnet_file.write_bytes(b"\xff\xfe\n")
    refused(host, "ADD", 5, "subnet.env")
    host.subnet_file.write_text("#" * 70_000)
    refused(host, "ADD", 5, "larger than")
    host.subnet_file.unlink()
    host.subnet_file.mkdir()
    refused(host, "ADD", 5, "subnet.env")
    host.subnet_file.rmdir()
    os.mkfifo(host.subnet_file)
    refused(host, "ADD", 5, "not a regular file")


@contextmanager
def daemon(host: Host, reply: bytes) -> Iterator[None]:
    """What answers on the daemon's socket; an empty reply never comes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(host.subnet_file.with_suffix(".sock")))
    listener.listen()
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with one:
                assert one.recv(100) == b'{"do":"status"}\n'
                one.sendall(reply) if reply else done.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    done.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_missing_subnet_env_says_what_the_daemon_waits_for(host: Host) -> None:
    host.subnet_file.unlink()
    refused(host, "ADD", 11, "no flannelpy daemon answers on this node")
    reply = json.dumps({"ok": {"faults": ["starting"], "flaws": ["etcd cannot be reached"]}}).encode() + b"\n"
    with daemon(host, reply):
        refused(host, "ADD", 11, "has no subnet yet: starting; etcd cannot be reached")


@pytest.mark.parametrize("reply", [b'{"error":"x"}\n', b"{}\n", b"[]\n", b"x" * 70_000, b'{"ok":[]}\n'])
def test_a_daemon_that_talks_nonsense_harms_nobody(host: Host, reply: bytes) -> None:
    with daemon(host, reply):
        assert host.call("STATUS", conf={**host.conf, "cniVersion": "1.1.0"}).code == 0
        host.subnet_file.unlink()
        refused(host, "ADD", 11, "does not say")


# --- the state ---


def test_the_state_is_flannels(host: Host) -> None:
    assert host.call("ADD").code == 0
    assert host.state.stat().st_mode & 0o777 == 0o700
    plain = host.state / "c1"
    assert plain.stat().st_mode & 0o777 == 0o600
    assert plain.read_text() == (
        '{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.5.72.0/24"}]],'
        '"routes":[{"dst":"10.5.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1450,"name":"cbr0",'
        '"type":"bridge"}'
    )
    assert host.call("DEL").code == 0
    assert list(host.state.iterdir()) == []


def test_two_interfaces_of_a_container_do_not_share_a_state(host: Host) -> None:
    other = {**host.conf, "name": "other", "delegate": {"bridge": "cni1"}}
    second = {"CNI_IFNAME": "net1"}
    assert host.call("ADD").code == 0
    assert host.call("ADD", conf=other, variables=second).code == 0
    assert host.call("DEL", conf=other, variables=second).code == 0
    assert host.recorded("DEL")["bridge"] == "cni1"
    assert (host.state / "c1").exists()
    assert host.call("DEL").code == 0
    assert host.recorded("DEL")["name"] == "cbr0"
    assert list(host.state.iterdir()) == []


def test_a_state_that_flannel_wrote_is_used_and_removed(host: Host) -> None:
    host.state.mkdir()
    (host.state / "c1").write_text('{"name":"cbr0","type":"bridge","from":"flannel"}')
    assert host.call("DEL").code == 0
    assert host.recorded("DEL")["from"] == "flannel"
    assert list(host.state.iterdir()) == []


def test_the_state_stays_until_the_other_plugin_has_succeeded(host: Host) -> None:
    assert host.call("ADD").code == 0
    (host.folder / "plugins" / "fail").touch()
    answer = host.call("DEL")
    assert (answer.code, answer.json["code"]) == (1, 102)
    (host.folder / "plugins" / "fail").rename(host.folder / "plugins" / "die")
    refused(host, "DEL", 999, "killed by signal 9")
    (host.folder / "plugins" / "die").unlink()
    (host.folder / "plugins" / "bridge").rename(host.folder / "bridge")
    refused(host, "DEL", 5, "bridge is not in")
    (host.folder / "bridge").rename(host.folder / "plugins" / "bridge")
    assert host.call("DEL").code == 0
    assert list(host.state.iterdir()) == []


def test_deleting_works_without_the_daemon_and_twice(host: Host) -> None:
    assert host.call("ADD").code == 0
    host.subnet_file.unlink()
    assert host.call("DEL").code == 0
    assert host.call("DEL").code == 0
    assert host.calls() == ["ADD c1 eth0", "DEL c1 eth0"]


def test_deleting_what_was_never_added_succeeds(host: Host) -> None:
    assert host.call("DEL", variables={"CNI_NETNS": ""}).code == 0
    assert host.calls() == []


@pytest.mark.parametrize("broken", [b"", b"{", b"\xff", b"[]"])
def test_a_broken_state_does_not_hold_the_pod_back(host: Host, broken: bytes) -> None:
    """A power cut may leave one of flannel's. The pod is deleted as if it were added today."""
    host.state.mkdir()
    (host.state / "c1").write_bytes(broken)
    env = host.subnet_file.rename(host.folder / "away")
    answer = host.call("DEL")
    assert (answer.code, answer.text, host.calls()) == (0, "", [])
    assert "nothing is deleted" in answer.stderr
    env.rename(host.subnet_file)
    assert host.call("DEL").code == 0
    assert host.calls() == ["DEL c1 eth0"]
    assert list(host.state.iterdir()) == []


def test_a_state_that_cannot_be_read_is_an_error(host: Host) -> None:
    (host.state / "c1@eth0").mkdir(parents=True)
    refused(host, "DEL", 5, "c1@eth0")


def test_fifty_pods_at_once(host: Host) -> None:
    with ThreadPoolExecutor(50) as pool:
        for command in ("ADD", "DEL"):
            answers = pool.map(
                lambda number, command=command: host.call(
                    command, variables={"CNI_CONTAINERID": f"c{number}"}
                ),
                range(50),
            )
            assert {answer.code for answer in answers} == {0}
            assert len(list(host.state.iterdir())) == (100 if command == "ADD" else 0)


# --- CHECK, STATUS, GC ---


def test_check_asks_the_other_plugin_about_what_was_added(host: Host) -> None:
    refused(host, "CHECK", 3, "has not been added")
    assert host.call("ADD").code == 0
    conf = {**host.conf, "prevResult": {"cniVersion": "1.0.0", "ips": []}}
    assert host.call("CHECK", conf=conf).code == 0
    assert host.recorded("CHECK") == {**host.recorded("ADD"), "prevResult": conf["prevResult"]}
    (host.folder / "plugins" / "fail").touch()
    assert host.call("CHECK", conf=conf).json["code"] == 102


def test_check_tells_that_the_subnet_has_moved_on(host: Host) -> None:
    assert host.call("ADD").code == 0
    host.subnet_file.write_text(ENV_V4.replace("10.5.72", "10.5.9"))
    refused(host, "CHECK", 999, "10.5.9.0/24")


@pytest.fixture
def new(host: Host) -> Host:
    host.conf["cniVersion"] = "1.1.0"
    return host


def test_status_is_ready_with_subnet_env_and_asks_the_other_plugin(new: Host) -> None:
    assert new.call("STATUS").code == 0
    with daemon(new, b'{"ok":{"state":"degraded","faults":[],"summary":"all well"}}\n'):
        assert new.call("STATUS").code == 0
    new.subnet_file.with_suffix(".sock").unlink()
    (new.folder / "plugins" / "fail").touch()
    assert new.call("STATUS").json["code"] == 102


def test_status_tells_why_no_pod_can_be_added(new: Host) -> None:
    with daemon(new, b'{"ok":{"state":"not ready","faults":["waiting for the first peers"]}}\n'):
        refused(new, "STATUS", 50, "waiting for the first peers")
    path = new.subnet_file.with_suffix(".sock")  # left over: nobody listens
    refused(new, "STATUS", 50, "does not answer")
    path.unlink()
    new.subnet_file.unlink()
    refused(new, "STATUS", 50, "is not there")
    new.subnet_file.write_text(ENV_V4)
    (new.folder / "plugins" / "bridge").unlink()
    refused(new, "STATUS", 50, "bridge is not in")


def test_status_has_patience_with_a_daemon_that_starts(new: Host) -> None:
    new.subnet_file.unlink()
    timer = threading.Timer(0.5, lambda: new.subnet_file.write_text(ENV_V4))
    timer.start()
    assert new.call("STATUS").code == 0
    timer.join()


def test_garbage_is_what_the_runtime_does_not_know_in_this_network(new: Host) -> None:
    for container, interface in (("c1", "eth0"), ("c1", "net1"), ("c2", "eth0")):
        assert new.call("ADD", variables={"CNI_CONTAINERID": container, "CNI_IFNAME": interface}).code == 0
    other = {**new.conf, "name": "other"}
    assert new.call("ADD", conf=other, variables={"CNI_CONTAINERID": "c3"}).code == 0
    (new.state / "old").write_text('{"name":"cbr0","type":"bridge"}')
    (new.state / "kept").write_text('{"name":"cbr0","type":"bridge"}')
    (new.state / "broken").write_text("{")
    (new.folder / "plugins" / "calls").unlink()
    valid = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "kept", "ifname": "eth0"}]
    conf = {**new.conf, "cni.dev/valid-attachments": valid}
    nobody = {"CNI_CONTAINERID": "", "CNI_IFNAME": "", "CNI_NETNS": ""}
    assert new.call("GC", conf=conf, variables=nobody).code == 0
    assert new.calls() == ["DEL c1 net1", "DEL c2 eth0", "DEL old eth0", "GC  "]
    assert new.recorded("GC")["cni.dev/valid-attachments"] == valid
    left = {path.name for path in new.state.iterdir()}
    assert left == {"c1", "c1@eth0", "c3", "c3@eth0", "kept", "broken"}


def test_garbage_that_cannot_be_deleted_stays_and_is_named(new: Host) -> None:
    assert new.call("ADD").code == 0
    conf = {**new.conf, "cni.dev/valid-attachments": []}
    (new.folder / "plugins" / "fail").touch()
    answer = new.call("GC", conf=conf)
    assert (answer.code, answer.json["code"]) == (1, 999)
    assert "c1@eth0" in answer.json["msg"]
    (new.folder / "plugins" / "fail").unlink()
    new.subnet_file.unlink()
    assert new.call("GC", conf=conf).code == 0
    assert list(new.state.iterdir()) == []


@pytest.mark.parametrize("valid", [None, {}, [1], "x"])
def test_garbage_needs_a_list_of_what_is_none(new: Host, valid: Any) -> None:
    assert new.call("ADD").code == 0
    refused(new, "GC", 7, "valid-attachments", conf={**new.conf, "cni.dev/valid-attachments": valid})
    assert (new.state / "c1").exists()


# --- old interpreters ---


def test_the_source_is_python_3_9() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"_signal", "_socket", "errno", "json", "posix", "stat"}
    for node in ast.walk(tree):
        # `int | None` in an annotation is evaluated there, and fails before 3.10, unless it is a string.
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        assert annotation is None or "|" not in ast.unparse(annotation)


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13", "3.14"])
def test_other_interpreters_run_it(host: Host, version: str) -> None:
    python = shutil.which(f"python{version}", path=f"{os.environ.get('PYTHONS', '')}:{os.environ['PATH']}")
    works = python and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    if not python or not works:
        pytest.skip(f"no python{version} in PATH or PYTHONS, a list of folders")
    host.command = (python, "-IS", str(SOURCE))
    for command in ("ADD", "CHECK", "DEL", "DEL"):
        assert host.call(command).code == 0
    assert host.calls() == ["ADD c1 eth0", "CHECK c1 eth0", "DEL c1 eth0"]
    refused(host, "ADD", 6, "", stdin=b"{")


def test_it_is_quick_to_import() -> None:
    """What would cost a pod milliseconds must not come back."""
    done = subprocess.run(
        [sys.executable, "-IS", "-X", "importtime", str(SOURCE)],
        env={"CNI_COMMAND": "VERSION"}, input=b"{}", capture_output=True, check=True,
    )  # fmt: skip
    loaded = {line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines()}
    assert not loaded & {"json", "re", "os", "socket", "signal", "typing", "subprocess", "pathlib", "enum"}
    assert OURS[1] == "-IS"
