"""Calls a CNI plugin as a container runtime does: a process, variables, JSON in and out."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flannelpy.cli.processes import inside
from flannelpy.cni import plugin

OURS = (sys.executable, "-IS", plugin.__file__)
ENV_V4 = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
RECORDER = """#!/bin/sh
# A plugin that only writes down how it was called; it fails while there is a file `fail`.
cd "$(dirname "$0")"
cat >"$CNI_COMMAND.json"
env | grep ^CNI_ | sort >"$CNI_COMMAND.env"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >>calls
if [ -e fail ]; then echo '{"cniVersion":"1.0.0","code":102,"msg":"as you wish"}'; exit 1; fi
if [ -e die ]; then kill -9 $$; fi
if [ "$CNI_COMMAND" = ADD ]; then echo '{"cniVersion":"1.0.0","ips":[]}'; fi
"""


@dataclass(slots=True)
class Answer:
    code: int
    text: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(slots=True)
class Host:
    """A folder with what the plugin reads and keeps, and a way to call it."""

    folder: Path
    command: tuple[str, ...] = OURS
    netns: str = ""
    path: str = ""
    conf: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subnet_file.write_text(ENV_V4)
        usual = {"cniVersion": "1.0.0", "name": "cbr0", "type": "flannel"}
        paths = {"subnetFile": str(self.subnet_file), "dataDir": str(self.state)}
        self.conf = {**usual, **paths, **self.conf}
        self.path = self.path or str(self.recorder())

    @property
    def subnet_file(self) -> Path:
        return self.folder / "subnet.env"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def recorder(self, kind: str = "bridge") -> Path:
        folder = self.folder / "plugins"
        folder.mkdir(exist_ok=True)
        (folder / kind).write_text(RECORDER)
        (folder / kind).chmod(0o755)
        return folder

    def recorded(self, command: str) -> Any:
        return json.loads((self.folder / "plugins" / f"{command}.json").read_text())

    def calls(self) -> list[str]:
        path = self.folder / "plugins" / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def call(
        self,
        command: str,
        *,
        conf: Any = None,
        stdin: bytes | None = None,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """One call; `variables` replace the usual ones, an empty value takes one away."""
        usual = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_NETNS": "/nowhere/netns",
                 "CNI_IFNAME": "eth0", "CNI_PATH": self.path}  # fmt: skip
        given = {key: value for key, value in {**usual, **variables}.items() if value}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("CNI_")}
        text = json.dumps(self.conf if conf is None else conf).encode() if stdin is None else stdin
        line = inside(self.netns, *self.command) if self.netns else list(self.command)
        done = subprocess.run(
            line, input=text, env=clean | given, capture_output=True, timeout=60, check=False
        )
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())
