"""What the CNI plugin costs a pod beyond the plugin that does the work: ours, and others, in turns.

    sudo python bench/cni_plugin.py --flannel /path/to/flannel's/plugin

Each call is a process that makes (ADD) and removes (DEL) a pod with the real bridge and host-local, or with a
program that only answers (`nothing`). The last column is what the median is above calling bridge itself.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOST, POD = f"fpb{os.getpid()}-host", f"fpb{os.getpid()}-pod"
ENV = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
ANSWER = '#!/bin/sh\necho \'{"cniVersion":"1.0.0"}\'\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flannel", help="flannel's CNI plugin, to compare with")
    parser.add_argument("--plugins", default="/usr/lib/cni", help="where bridge and host-local are")
    parser.add_argument("--python", default="/usr/bin/python3", help="runs ours (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fpb") as name:
        folder = Path(name)
        for netns in (HOST, POD):
            subprocess.run(["ip", "netns", "add", netns], check=True)
        try:
            measure(folder, options)
        finally:
            for netns in (HOST, POD):
                subprocess.run(["ip", "netns", "del", netns], check=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    (folder / "subnet.env").write_text(ENV)
    nothing = folder / "nothing"
    nothing.mkdir()
    (nothing / "bridge").write_text(ANSWER)
    (nothing / "bridge").chmod(0o755)
    install = [sys.executable, "-m", "flannelpy", "cni", "install"]
    subprocess.run(
        [*install, f"--bin-dir={folder}/bin", f"--python={options.python}"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.copy(ROOT / "flannelpy/cni/plugin.py", folder / "plugin.py")
    commands = {
        "ours, installed": [f"{folder}/bin/flannel"],
        "ours, the bare file": [options.python, "-IS", f"{folder}/plugin.py"],
        **({"flannel's": [options.flannel]} if options.flannel else {}),
    }
    print(f"{'plugin':20} {'behind it':10} {'command':8} {'p50 ms':>7} {'p90 ms':>7} {'own ms':>7}")
    for behind, path in (("nothing", str(nothing)), ("bridge", options.plugins)):
        direct = [f"{path}/bridge"]
        rows = {"none": direct, **commands}
        times: dict[tuple[str, str], list[float]] = {}
        for number in range(options.rounds + 1):
            for row, command in rows.items():
                for verb in ("ADD", "DEL"):
                    took = call(folder, command, verb, path, delegate=row == "none")
                    if number:  # the first round only fills the caches
                        times.setdefault((row, verb), []).append(took)
        for (row, verb), values in times.items():
            middle = statistics.median(values)
            own = middle - statistics.median(times["none", verb])
            tenth = statistics.quantiles(values, n=10)[8]
            print(f"{row:20} {behind:10} {verb:8} {middle:7.1f} {tenth:7.1f} {own:7.1f}")


def call(folder: Path, command: list[str], verb: str, path: str, *, delegate: bool) -> float:
    """Milliseconds from before the start of the process to its end."""
    ipam = {"type": "host-local", "dataDir": f"{folder}/ipam"}
    conf = {"cniVersion": "1.0.0", "name": "cbr0", "type": "flannel"}
    if delegate:
        ranges = {"ranges": [[{"subnet": "10.5.72.0/24"}]], "routes": [{"dst": "10.5.0.0/16"}]}
        conf |= {"type": "bridge", "isGateway": True, "mtu": 1450, "ipam": {**ipam, **ranges}}  # type: ignore[dict-item]
    else:
        paths = {"subnetFile": f"{folder}/subnet.env", "dataDir": f"{folder}/state"}
        conf |= {**paths, "ipam": {"dataDir": f"{folder}/ipam"}}  # type: ignore[dict-item]
    variables = {"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_NETNS": f"/run/netns/{POD}",
                 "CNI_IFNAME": "eth0", "CNI_PATH": path, "PATH": os.environ["PATH"]}  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{HOST}", "--", *command],
        input=json.dumps(conf).encode(), env=variables, capture_output=True, check=False,
    )  # fmt: skip
    took = (time.perf_counter() - begin) * 1000
    if done.returncode:
        sys.exit(f"{command[0]} {verb}: {done.stdout.decode()} {done.stderr.decode()}")
    return took


if __name__ == "__main__":
    main()
