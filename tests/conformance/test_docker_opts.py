"""`flannelpy docker-opts` writes what flannel's script wrote when it was run (dash) with the same input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flannelpy.cli import docker_opts
from flannelpy.docker import DockerOptsError

ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
V6_ENV = (
    "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n"
    "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
)
THREE = (
    'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\nDOCKER_OPT_IPMASQ="--ip-masq=true"\nDOCKER_OPT_MTU="--mtu=1472"\n'
)
ALL = " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"

COMBINED = f'DOCKER_OPTS="{ALL}"\n'
WITHOUT_MASQ = """\
DOCKER_OPT_BIP="--bip=10.1.74.1/24"
DOCKER_OPT_MTU="--mtu=1472"
DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"
"""
WITH_ANOTHER = """\
DOCKER_OPT_LOG="--log-level=warn"
DOCKER_OPT_MTU="--mtu=1472"
DOCKER_OPTS=" --log-level=warn --mtu=1472"
"""
IPV6_ONLY = """\
DOCKER_OPT_IPMASQ="--ip-masq=false"
DOCKER_OPT_MTU="--mtu=1430"
DOCKER_OPTS=" --ip-masq=false --mtu=1430"
"""

# flags, environment, subnet.env -> output
GOLDEN: dict[str, tuple[list[str], dict[str, str], str | None, str]] = {
    "no flags": ([], {}, ENV, THREE + COMBINED),
    "-i": (["-i"], {}, ENV, THREE),
    "-c": (["-c"], {}, ENV, COMBINED),
    "-i -c": (["-ic"], {}, ENV, THREE + COMBINED),
    "-k": (["-k", "CUSTOM_KEY"], {}, ENV, f'{THREE}CUSTOM_KEY="{ALL}"\n'),
    "-m": (["-m"], {}, ENV, WITHOUT_MASQ),
    "-c with a value before": (["-c"], {"DOCKER_OPTS": "--foo"}, ENV, f'DOCKER_OPTS="--foo {ALL}"\n'),
    "an option of the environment": (
        [],
        {"DOCKER_OPT_LOG": "--log-level=warn"},
        "FLANNEL_MTU=1472\n",
        WITH_ANOTHER,
    ),
    "IPv6 only": ([], {}, V6_ENV, IPV6_ONLY),
    "no file": ([], {}, None, 'DOCKER_OPTS=""\n'),
    "blank lines and blanks": (["-c"], {}, "\n" + ENV.replace("\n", "  \n\n"), COMBINED),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("DOCKER_", "FLANNEL_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, environ, env, text = GOLDEN[case]
    if env is not None:
        Path("subnet.env").write_text(env)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # A path without a slash works, where dash would search PATH.
    assert docker_opts.main(["-f", "subnet.env", "-d", "out.env", *flags]) == 0
    assert Path("out.env").read_text() == text


def test_a_shell_reads_the_values_back() -> None:
    Path("subnet.env").write_text(ENV)
    assert docker_opts.main(["-f", "subnet.env", "-d", "out.env"]) == 0
    script = '. ./out.env; printf "%s|" "$DOCKER_OPT_BIP" "$DOCKER_OPTS"'
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"--bip=10.1.74.1/24|{ALL}|"


def run(*argv: str, env: str) -> subprocess.CompletedProcess[str]:
    Path("subnet.env").write_text(env)
    return subprocess.run(
        [sys.executable, "-m", "flannelpy", "docker-opts", "-f", "subnet.env", "-d", "out.env", *argv],
        env=dict(os.environ) | {"PYTHONPATH": str(Path(docker_opts.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("flag", ["-h", "-?", "-x", "--help", "-k"])
def test_usage_is_on_stderr_with_exit_code_1(flag: str) -> None:
    done = run(flag, env=ENV)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == docker_opts.USAGE
    assert not Path("out.env").exists()


@pytest.mark.parametrize(
    ("env", "part"),
    [
        (ENV.replace("false", "maybe"), "FLANNEL_IPMASQ='maybe'"),
        ("DOCKER_OPT_X=`reboot`\n", "DOCKER_OPT_X"),
        ("garbage\n", "line 1"),
    ],
)
def test_a_bad_file_is_one_line_exit_code_1_and_no_output(env: str, part: str) -> None:
    done = run(env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flannelpy: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert not Path("out.env").exists()


def test_a_subnet_of_another_host_fails_after_the_file_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("subnet.env").write_text(ENV)
    network, mask = (
        int.from_bytes(bytes(quad), sys.byteorder) for quad in ([10, 1, 74, 0], [255, 255, 255, 0])
    )
    table = f"Iface ...\neth0 {network:08X} 0100000A 0003 0 0 0 {mask:08X} 0 0 0\n"
    monkeypatch.setattr(docker_opts, "_route_table", lambda: table)
    with pytest.raises(DockerOptsError, match=r"10\.1\.74\.0/24 is routed through a gateway"):
        docker_opts.main(["-f", "subnet.env", "-d", "out.env", "-i"])
    assert Path("out.env").read_text() == THREE
