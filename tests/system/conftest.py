"""Two hosts with systemd, Docker and an etcd, on which flannelpy was installed as docs/systemd.md says."""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.system import container, virtual
from tests.system.container import Container
from tests.system.machine import Machine, say
from tests.system.page import ROOT, commands
from tests.system.virtual import VirtualMachine
from tests.system.wire import NETWORK, Wire

ADDRESSES = [str(NETWORK[1]), str(NETWORK[2])]
ETCD = f"http://{ADDRESSES[0]}:2379"
HOME = "/srv/flannelpy"
"""Where the hosts have what the page says to copy to them."""

# The machines have no network but the wire's: pip finds the wheels in a folder, in place of PyPI.
PIP = "[global]\nno-index = true\nfind-links = /srv/wheels\nno-cache-dir = true\n"
START_ETCD = f"""
printf 'ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379\\nETCD_ADVERTISE_CLIENT_URLS={ETCD}\\n' >/etc/default/etcd
systemctl enable --now etcd
"""
# A web server that tells each visitor the address it came from; there is no registry to get an image from.
START_CONTAINER = """
mkdir -p /srv/image/bin /srv/image/www/cgi-bin
cp /bin/busybox /srv/image/bin/
for name in sh true cat kill pidof ping wget httpd; do ln -sf busybox /srv/image/bin/$name; done
printf '#!/bin/sh\\nprintf "\\\\n%%s" "$REMOTE_ADDR"\\n' >/srv/image/www/cgi-bin/who
chmod +x /srv/image/www/cgi-bin/who
tar -C /srv/image -c . | docker import - web
docker run --detach --name web --restart always --stop-timeout 1 --publish 8080:80 web /bin/httpd -f -h /www
"""
_HOSTS = pytest.StashKey[list[Machine]]()


class Hosts(NamedTuple):
    """The first one has the etcd."""

    first: Machine
    second: Machine
    kind: str


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what every machine looked like."""
    report = yield
    if report.failed and call.when != "teardown":
        for machine in item.session.stash.get(_HOSTS, []):
            report.sections.append((machine.name, machine.look()))
    return report


def need(*programs: str) -> None:
    """Skip with what is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it boots machines in namespaces")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (scripts/install.sh names its package)")


def made(what: str) -> Path:
    """What scripts/machine.sh makes, or has made at another time."""
    done = subprocess.run(
        [str(ROOT / "scripts/machine.sh"), what], stdout=subprocess.PIPE, text=True, timeout=400, check=False
    )
    if done.returncode:
        pytest.skip(f"scripts/machine.sh {what} could not make it: is there a Debian mirror?")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page says to copy to the hosts, and the wheels that pip would load from PyPI."""
    folder = tmp_path_factory.mktemp("package")
    home = folder / "flannelpy"
    source = folder / "source"
    for name in ("flannelpy", "backends", "deploy", "requirements"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={home}/dist", str(source)]
    subprocess.run(build, check=True, timeout=120)
    for name in ("deploy", "requirements"):
        shutil.copytree(source / name, home / name)
    machine = os.uname().machine
    platforms = [f"--platform={name}_{machine}" for name in ("manylinux2014", "manylinux_2_28")]
    lock = ROOT / "requirements/run.lock"
    load = [*pip, "download", "--require-hashes", "--requirement", str(lock), "--dest", f"{folder}/wheels"]
    done = subprocess.run(
        [*load, "--python-version=3.11", "--only-binary=:all:", *platforms], timeout=120, check=False
    )
    if done.returncode:
        pytest.skip("pip could not load the wheels of requirements/run.lock: is there a package index?")
    (folder / "pip.conf").write_text(PIP)
    return folder


def install_program(wire: Wire, root: Path, package: Path) -> None:
    """Section 2 of the page, before a machine boots from it: an emulator would take minutes."""
    say("installing the wheel as docs/systemd.md says")
    wire.run(
        """
        cp -r "$2/flannelpy" "$2/wheels" "$1/srv/"
        cp "$2/pip.conf" "$1/etc/"
        mount -t proc proc "$1/proc"
        cd "$1"
        env -i PATH="$PATH" HOME=/root chroot "$1" sh -exc "$3"
        umount "$1/proc"
        """,
        str(root),
        str(package),
        f"cd {HOME}\n{commands('2.')}",
        timeout=120,
    )


def containers(wire: Wire, package: Path) -> Iterator[Machine]:
    """Each as soon as it is switched on."""
    root = made("root")
    program = container.prepare(wire, root)
    install_program(wire, program / "system", package)
    for number, address in enumerate(ADDRESSES, 1):
        yield Container(f"node{number}", address, wire, f"{program / 'upper'}:{root}")


def virtual_machines(wire: Wire, package: Path) -> Iterator[Machine]:
    """Each as soon as it is switched on."""
    root, kernel = made("root"), made("kernel")
    install_program(wire, virtual.prepare_disk(wire, root, kernel), package)
    say("making the disk")
    virtual.make_disk(wire, ADDRESSES)
    for number, address in enumerate(ADDRESSES, 1):
        yield VirtualMachine(f"node{number}", address, number, wire, kernel)


@pytest.fixture(
    scope="session", params=["container", pytest.param("virtual machine", marks=pytest.mark.emulated)]
)
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Installed, with a container on each, on the default bridge of Docker."""
    kind: str = request.param
    need(*(container.PROGRAMS if kind == "container" else virtual.PROGRAMS), "mmdebstrap")
    package: Path = request.getfixturevalue("package")
    say(f"two hosts, each a {kind}")
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "wire").mkdir()
    wire = Wire(folder / "wire")
    machines: list[Machine] = []
    try:
        make = containers if kind == "container" else virtual_machines
        for machine in make(wire, package):
            machines.append(machine)  # noqa: PERF402  # even if the next one fails
        request.session.stash[_HOSTS] = machines
        for machine in machines:
            machine.up(60)
            say(f"{machine.name}: booted")
        first, second = machines
        first.run(START_ETCD)
        with ThreadPoolExecutor() as threads:
            list(threads.map(install, machines))
        yield Hosts(first, second, kind)
    except BaseException:
        for machine in machines:
            say(f"{machine.name}:\n{machine.look()}")
        raise
    finally:
        request.session.stash[_HOSTS] = []
        wire.close()
        for machine in machines:
            machine.close()


def install(machine: Machine) -> None:
    """Sections 3 and 4 of the page, then a container."""
    machine.run(f"set -ex; cd {HOME}\n{commands('3.', ETCD)}", 120)
    say(f"{machine.name}: flannelpy is ready: {status(machine)}")
    machine.run(f"set -ex; cd {HOME}\n{commands('4.', ETCD)}", 120)
    machine.run(START_CONTAINER, 120)
    say(f"{machine.name}: Docker runs a container at {address(machine)}")


def status(machine: Machine) -> str:
    """What the daemon tells systemd."""
    return machine.run("systemctl show flannelpy --property StatusText --value")


def address(machine: Machine) -> str:
    """Of its container, in the overlay."""
    return machine.run("docker inspect --format '{{.NetworkSettings.IPAddress}}' web")


def state(machine: Machine, unit: str) -> str:
    """Such as active or failed."""
    return machine.run(f"systemctl show {unit} --property ActiveState --value")
