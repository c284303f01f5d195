"""`flannelpy cni`: put the CNI plugin and its configuration onto this host, or take it away."""

import argparse
import sys
from pathlib import Path

from flannelpy.cni import install
from flannelpy.cni.install import InstallError


def main(argv: list[str]) -> int:
    """0: done, and said what. InstallError: a file that cannot be used or written."""
    options = _parser().parse_args(argv)
    try:
        if options.action == "remove":
            gone = install.remove(options.bin_dir)
            print(
                "\n".join(f"removed {path}" for path in gone)
                or f"nothing of flannelpy's is in {options.bin_dir}"
            )
        else:
            _install(options)
    except OSError as error:
        raise InstallError(
            f"{error.filename or options.bin_dir}: {error.strerror}; is it writable?"
        ) from None
    return 0


def _install(options: argparse.Namespace) -> None:
    options.bin_dir.mkdir(parents=True, exist_ok=True)
    python = options.python
    if options.runtime:
        python = install.install_runtime(options.bin_dir, options.runtime)
    install.install_plugin(options.bin_dir, python)
    for name in install.NAMES:
        print(f"installed {options.bin_dir / name}, run by {python}")
    if options.config:
        # Last: a runtime that finds the configuration calls the plugin at once.
        target = options.config_dir / options.config_name
        install.install_config(options.config, target)
        print(f"installed {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flannelpy cni",
        description="The CNI plugin that container runtimes call for every pod. It is one file; installed"
        " by this command it comes compiled, and so costs a pod half the time.",
    )
    parser.add_argument("action", choices=("install", "remove"))
    parser.add_argument(
        "--bin-dir",
        type=Path,
        default=Path("/opt/cni/bin"),
        help="where the runtime looks for plugins, by the same path as on the host (default: %(default)s)",
    )
    parser.add_argument(
        "--python",
        default=_system_python(),
        help="the interpreter that runs it, 3.9 or newer (default: %(default)s)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        help="instead: a folder with an interpreter and its libraries, which is copied beside the plugin;"
        " the container image brings one for hosts without Python",
    )
    parser.add_argument("--config", type=Path, help="also install this network configuration (a conflist)")
    parser.add_argument(
        "--config-dir", type=Path, default=Path("/etc/cni/net.d"), help="(default: %(default)s)"
    )
    parser.add_argument("--config-name", default="10-flannel.conflist", help="(default: %(default)s)")
    return parser


def _system_python() -> str:
    """Not that of a virtual environment: it starts slower, and goes when the environment goes."""
    return "/usr/bin/python3" if Path("/usr/bin/python3").exists() else str(Path(sys.executable).resolve())
