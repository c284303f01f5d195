"""The container image: built upon a Debian made here; what it installs runs where there is nothing else."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.page import ROOT

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes images"),
    *(
        pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")
        for program in ("buildah", "mmdebstrap")
    ),
]

# As Debian's slim images leave out.
SLIM = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
LARGEST = 260 << 20
"""Bytes of all files in the image: 216 MiB when this was written."""


class Buildah:
    """With a store of its own, and without a daemon, user namespaces or a network of containers."""

    def __init__(self, folder: Path) -> None:
        self.options = [f"--root={folder}/storage", f"--runroot={folder}/run", "--storage-driver=vfs"]
        self.env = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *argv: str | Path, check: bool = True) -> str:
        line = ["buildah", *self.options, *map(str, argv)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=self.env, cwd=ROOT)
        assert done.returncode == 0 or not check, done.stderr[-3000:]
        return (done.stdout if check else done.stdout + done.stderr).strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    folder = tmp_path_factory.mktemp("buildah")
    yield Buildah(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A container of the image, and where its files are."""
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    mirror = "http://deb.debian.org/debian"
    base = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates", *SLIM]
    done = subprocess.run(
        [*base, "bookworm", str(archive), mirror], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no Debian from {mirror}: {done.stderr[-500:]}")
    container = buildah("from", "scratch")
    buildah("add", container, archive, "/")
    archive.unlink()
    # Behind a proxy with a certificate of its own this machine knows it, and a new Debian does not.
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    if Path(certificates).exists():
        buildah("copy", container, certificates, certificates)
    buildah("commit", "--rm", container, "localhost/debian-base")
    env = {**buildah.env, "BASE": "localhost/debian-base", "BUILDER": "buildah"}
    wrapper = tmp_path_factory.mktemp("bin") / "buildah"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("buildah")} {" ".join(buildah.options)} "$@"\n')
    wrapper.chmod(0o755)
    line = [str(ROOT / "deploy" / "image" / "build.sh"), "localhost/flannelpy:test"]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env={**env, "BUILDER": str(wrapper)}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    container = buildah("from", "localhost/flannelpy:test")
    yield container, Path(buildah("mount", container))
    buildah("rm", container)


def test_the_daemon_runs_in_it(buildah: Buildah, image: tuple[str, Path]) -> None:
    container, _ = image
    assert buildah("run", container, "--", "flannelpy", "--version").startswith("flannelpy ")
    assert buildah("run", container, "--", "/opt/bin/flanneld", "--version").startswith("flannelpy ")
    assert "bad-flag" in buildah("run", container, "--", "flannelpy", "--bad-flag", check=False)
    assert "(nf_tables)" in buildah("run", container, "--", "iptables", "--version")
    for backend in ("vxlan", "udp", "host-gw"):
        load = f"e(group='flannelpy.backends')['{backend}'].load()"
        line = f"from importlib.metadata import entry_points as e; {load}"
        buildah("run", container, "--", "/opt/flannelpy/venv/bin/python", "-c", line)


def test_it_is_small(image: tuple[str, Path]) -> None:
    _, root = image
    files = [path.lstat() for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(file.st_blocks * 512 for file in {file.st_ino: file for file in files}.values())
    print(f"image: {size / 2**20:.0f} MiB")
    assert size < LARGEST


def test_what_flannels_manifests_call_is_there(buildah: Buildah, image: tuple[str, Path]) -> None:
    container, root = image
    buildah("run", container, "--", "cp", "-f", "/flannel", "/tmp/flannel")
    assert "CNI versions" in buildah("run", container, "--", "/tmp/flannel", check=False)
    (root / "tmp" / "conf").write_text('{"plugins":[{"type":"flannel"}]}')
    buildah("run", container, "--", "/opt/bin/install-conf", "/tmp/conf", "/tmp/10-flannel.conflist")
    assert (root / "tmp/10-flannel.conflist").read_text() == '{"plugins":[{"type":"flannel"}]}'
    (root / "tmp" / "env").write_text("FLANNEL_SUBNET=10.5.9.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n")
    buildah("run", container, "--", "/opt/bin/mk-docker-opts.sh", "-f", "/tmp/env", "-d", "/tmp/docker", "-c")
    assert "--bip=10.5.9.1/24" in (root / "tmp/docker").read_text()


def test_a_host_without_anything_runs_the_plugin(
    buildah: Buildah, image: tuple[str, Path], tmp_path: Path
) -> None:
    """What the init container of the manifests does; then a root with /proc and what was installed."""
    container, root = image
    shutil.rmtree(root / "opt/cni", ignore_errors=True)
    conf = json.dumps({"cniVersion": "1.0.0", "plugins": [{"type": "flannel"}]})
    (root / "tmp/cni-conf.json").write_text(conf)
    flags = ("--runtime=/opt/flannelpy/host-python", "--config=/tmp/cni-conf.json", "--config-dir=/tmp")
    buildah("run", container, "--", "flannelpy", "cni", "install", "--bin-dir=/opt/cni/bin", *flags)
    host = tmp_path / "host"
    (host / "proc").mkdir(parents=True)
    shutil.copytree(root / "opt/cni", host / "opt/cni")
    script = 'mount -t proc none "$1/proc"; exec chroot "$1" /opt/cni/bin/flannel'
    line = ["unshare", "--mount", "sh", "-ec", script, "sh", str(host)]

    def call(command: str, stdin: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "CNI_COMMAND": command, "CNI_CONTAINERID": "c1",
               "CNI_NETNS": "/x", "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}  # fmt: skip
        return subprocess.run(line, input=stdin, env=env, capture_output=True, text=True, check=False)

    assert json.loads(call("VERSION", "{}").stdout)["cniVersion"] == "1.1.0"
    refused = call("ADD", '{"cniVersion":"1.0.0","name":"x"}')
    assert (json.loads(refused.stdout)["code"], refused.stderr) == (11, "")
    assert json.loads(call("ADD", "{").stdout)["code"] == 6
    assert call("DEL", '{"cniVersion":"1.0.0","name":"x"}').returncode == 0
