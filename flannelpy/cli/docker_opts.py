"""`flannelpy docker-opts`: subnet.env -> a file of options for dockerd; flannel's mk-docker-opts.sh."""

import getopt
import os
import sys
from pathlib import Path
from typing import NamedTuple

from flannelpy import subnet_env
from flannelpy.docker import DockerOptsError, is_routed, output, subnet

USAGE = """\
usage: flannelpy docker-opts [-f FILE] [-d FILE] [-i] [-c] [-m] [-k NAME]

Reads subnet.env and writes options for dockerd, for systemd's EnvironmentFile= or a shell.

  -f FILE   the file that flannelpy writes (default /run/flannel/subnet.env)
  -d FILE   the file to write (default /run/docker_opts.env)
  -i        write a line for each option: DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU
  -c        write one line with all options; without -i and -c both are written
  -k NAME   the name of that one line (default DOCKER_OPTS)
  -m        leave out the option about masquerading

Options that the environment holds in DOCKER_OPT_* and in DOCKER_OPTS (or NAME) are kept.
"""


class _Options(NamedTuple):
    source: str = "/run/flannel/subnet.env"
    target: str = "/run/docker_opts.env"
    individual: bool = False
    combined: bool = False
    key: str = "DOCKER_OPTS"
    ip_masq: bool = True


def main(argv: list[str]) -> int:
    """0: the file is written. 1: wrong options. DockerOptsError: neither, or another host has the subnet."""
    options = _options(argv)
    if options is None:
        sys.stderr.write(USAGE)
        return 1
    both = not (options.individual or options.combined)
    variables = {**os.environ, **_subnet_env(options.source)}
    text = output(
        variables,
        individual=options.individual or both,
        combined=options.combined or both,
        key=options.key,
        ip_masq=options.ip_masq,
    )
    own = subnet(variables)
    try:
        subnet_env.write(options.target, text)
    except (OSError, ValueError) as error:
        raise DockerOptsError(f"{options.target} cannot be written: {error}") from None
    if own is not None and is_routed(own, _route_table()):
        raise DockerOptsError(
            f"{own.network()} is routed through a gateway: another host has this subnet, "
            f"or {options.source} is out of date; restart flannelpy before Docker"
        )
    return 0


def _options(argv: list[str]) -> _Options | None:
    """None: show the usage. Words after the options are ignored."""
    try:
        pairs, _ = getopt.getopt(argv, "f:d:ick:mh?")
    except getopt.GetoptError:
        return None
    options = _Options()
    for letter, value in pairs:
        match letter:
            case "-f":
                options = options._replace(source=value)
            case "-d":
                options = options._replace(target=value)
            case "-i":
                options = options._replace(individual=True)
            case "-c":
                options = options._replace(combined=True)
            case "-k":
                options = options._replace(key=value)
            case "-m":
                options = options._replace(ip_masq=False)
            case _:
                return None
    return options


def _subnet_env(path: str) -> dict[str, str]:
    """The variables of the file; none if there is no file."""
    try:
        return {key: value for key, (value, _) in subnet_env.variables(subnet_env.content(path)).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DockerOptsError(f"{path} cannot be read: {error}") from None


def _route_table() -> str:
    try:
        return Path("/proc/net/route").read_text(encoding="ascii")
    except OSError:
        # A kernel without IPv4 has no routes either.
        return ""
