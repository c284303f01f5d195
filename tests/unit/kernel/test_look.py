"""What udev would do to a device, read out of its files."""

from pathlib import Path

import pytest

from flannelpy.kernel.look import mac_policy

DEFAULT = "[Match]\nOriginalName=*\n\n[Link]\nMACAddressPolicy=persistent\n"
OURS = "[Match]\nOriginalName=docker* flannel*\n[Link]\nMACAddressPolicy=none\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"usr/lib/systemd/network/99-default.link": DEFAULT}, ("persistent", "99-default.link")),
        (
            {"usr/lib/systemd/network/99-default.link": DEFAULT, "etc/systemd/network/10-f.link": OURS},
            ("none", "10-f.link"),
        ),
        # The same name in an earlier folder replaces it, and an empty file switches it off.
        (
            {
                "usr/lib/systemd/network/99-default.link": DEFAULT,
                "etc/systemd/network/99-default.link": "",
            },
            None,
        ),
        # A drop-in changes a file, and a file for other hardware is not about us.
        (
            {
                "usr/lib/systemd/network/99-default.link": DEFAULT,
                "etc/systemd/network/99-default.link.d/x.conf": "[Link]\nMACAddressPolicy=none\n",
                "etc/systemd/network/50-usb.link": "[Match]\nDriver=usb\n[Link]\nMACAddressPolicy=random\n",
            },
            ("none", "99-default.link"),
        ),
        # The first file that matches counts, although it says nothing.
        (
            {
                "usr/lib/systemd/network/99-default.link": DEFAULT,
                "etc/systemd/network/20-f.link": "# mine\n[Match]\nOriginalName=flannel.1\n[Link]\nAlias=x\n",
            },
            None,
        ),
        ({"usr/lib/systemd/network/99-default.link": "no section\n"}, None),
    ],
)
def test_the_policy_for_a_mac(tmp_path: Path, files: dict[str, str], found: tuple[str, str] | None) -> None:
    (tmp_path / "run/udev").mkdir(parents=True)
    (tmp_path / "run/udev/control").touch()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    policy = mac_policy("flannel.1", tmp_path)
    assert (policy and (policy.policy, Path(policy.file).name)) == found


def test_without_udev_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/systemd/network"
    folder.mkdir(parents=True)
    (folder / "99-default.link").write_text(DEFAULT)
    assert mac_policy("flannel.1", tmp_path) is None
