"""subnet.env: flannel's bytes, an atomic write, and a reader that nothing can upset."""

import os
import stat
from pathlib import Path

import pytest

from flannelpy import subnet_env
from flannelpy.model.address import Prefix, parse_prefix
from flannelpy.model.config import NetworkConfig
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import Previous

ATTRS = LeaseAttrs(None, None, "vxlan")
V4 = ("10.5.0.0/16", "10.5.72.0/24")
V6 = ("2001:cafe:42::/56", "2001:cafe:42::/64")
V4_LINES = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\n"
V6_LINES = "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n"


def config(v4: tuple[str, str] | None, v6: tuple[str, str] | None) -> tuple[NetworkConfig, Lease]:
    network = parse_prefix(v4[0]) if v4 else None
    network6 = parse_prefix(v6[0]) if v6 else None
    made = NetworkConfig(
        network=network,
        network6=network6,
        enable_ipv4=v4 is not None,
        enable_ipv6=v6 is not None,
        enable_nftables=False,
        subnet_len=24,
        subnet_min=None,
        subnet_max=None,
        subnet6_len=64,
        subnet6_min=None,
        subnet6_max=None,
        backend_type="vxlan",
        backend={},
    )
    return made, Lease("key", parse_prefix(v4[1]) if v4 else None, parse_prefix(v6[1]) if v6 else None, ATTRS)


@pytest.mark.parametrize(
    ("v4", "v6", "text"),
    [
        (V4, None, V4_LINES + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"),
        (None, V6, V6_LINES + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"),
        (V4, V6, V4_LINES + V6_LINES + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"),
    ],
)
def test_render_and_read_back(
    tmp_path: Path, v4: tuple[str, str] | None, v6: tuple[str, str] | None, text: str
) -> None:
    made, lease = config(v4, v6)
    assert subnet_env.render(made, lease, 1450, True) == text
    subnet_env.write(tmp_path / "subnet.env", text)
    previous, warning = subnet_env.read(tmp_path / "subnet.env")
    assert previous == Previous(made.network, lease.subnet, made.network6, lease.subnet6)
    assert warning is None


def test_render_without_masquerade() -> None:
    assert subnet_env.render(*config(V4, None), 1450, False).endswith("FLANNEL_IPMASQ=false\n")


def test_render_refuses_a_lease_without_an_enabled_family() -> None:
    made, _ = config(V4, V6)
    _, lease = config(V4, None)
    with pytest.raises(ValueError, match="FLANNEL_IPV6_SUBNET"):
        subnet_env.render(made, lease, 1450, False)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_write_sets_the_modes_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "flannel" / "subnet.env"
    before = os.umask(umask)
    try:
        subnet_env.write(path, "A=1\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_write_replaces_in_one_step_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("old")
    with path.open() as reader:
        subnet_env.write(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        subnet_env.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "flannel"
    folder.mkdir()
    (folder / "subnet.env").symlink_to(victim)
    (folder / f".subnet.env.{os.getpid()}").symlink_to(victim)
    subnet_env.write(folder / "subnet.env", "new")
    assert victim.read_text() == "mine"
    assert (folder / "subnet.env").read_text() == "new"


def test_write_does_not_replace_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        subnet_env.write(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def read(tmp_path: Path, content: bytes) -> tuple[Previous, str | None]:
    path = tmp_path / "subnet.env"
    path.write_bytes(content)
    return subnet_env.read(path)


SUBNET = parse_prefix("10.5.72.0/24")


@pytest.mark.parametrize(
    "content",
    [
        b"FLANNEL_SUBNET=10.5.72.1/24\n",
        b'\xef\xbb\xbf# by hand\r\n\r\nexport FLANNEL_SUBNET="10.5.72.1/24"  # ours\r\n',
        b"  FLANNEL_SUBNET = '10.5.72.9/24'\t\n",
        b"FLANNEL_SUBNET=10.9.9.1/24\nFLANNEL_SUBNET=10.5.72.1/24 # the last one\n",
        b"FLANNEL_SUBNET=bogus,10.5.72.1/24,fd00::/64,0.0.0.0/0\n",
        b"FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_IPMASQ=true",
        "# größe\nFLANNEL_SUBNET=10.5.72.1/24\n".encode(),
    ],
)
def test_read_is_tolerant(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == (Previous(subnet=SUBNET), None)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("10.5.72.1/24,10.5.73.1/24", "exactly one IPv4 block"),
        ("10.5.72.1", "exactly one"),
        ("fd00::1/64", "exactly one"),
        ("0.0.0.0/0", "exactly one"),
        ("$SUBNET", "exactly one"),
    ],
)
def test_a_bad_value_says_nothing_but_hides_no_other(tmp_path: Path, value: str, part: str) -> None:
    previous, warning = read(
        tmp_path, f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={value}\nFLANNEL_MTU=1\n".encode()
    )
    assert previous == Previous(network=Prefix(bytes([10, 5, 0, 0]), 16))
    assert warning is not None
    assert f"{tmp_path}/subnet.env: line 2: FLANNEL_SUBNET" in warning
    assert part in warning


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/2", "line 2 is cut off"),
        (b"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUB", "line 2 is not KEY=value"),
        (b'FLANNEL_NETWORK="10.5.0.0/16\n', "line 1 has a quote"),
        (b"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=\x00\n", "line 2 is not text"),
        (b"FLANNEL_NETWORK=10.5.0.0/16\n\xff\xfe\n", "line 2 is not text"),
        (b"\x1b[2J=1\n", "line 1 is not text"),
        (b"A=1\n" * 20_000, "larger than 65536"),
    ],
)
def test_a_file_that_is_not_whole_says_nothing(tmp_path: Path, content: bytes, part: str) -> None:
    previous, warning = read(tmp_path, content)
    assert previous == Previous()
    assert warning is not None
    assert warning.startswith(f"{tmp_path}/subnet.env: {part}")
    assert warning.isprintable()


def test_no_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    assert subnet_env.read(tmp_path / "missing") == (Previous(), None)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        previous, warning = subnet_env.read(path)
        assert previous == Previous()
        assert warning is not None
        assert "not a regular file" in warning
    assert "Not a directory" in (subnet_env.read("/dev/null/x")[1] or "")
