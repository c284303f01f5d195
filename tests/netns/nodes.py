"""What the tests of whole daemons share: start some nodes, look at their leases, routes and logs."""

import json
import sys
from typing import Any

from flannelpy.cli.lab import ETCD_PREFIX, Lab, Node
from flannelpy.cli.processes import Process, wait_ready, wait_until

PROGRAM = (sys.executable, "-m", "flannelpy")
V4 = {
    "Network": "10.5.0.0/16",
    "SubnetMin": "10.5.100.0",
    "SubnetMax": "10.5.190.0",
    "Backend": {"Type": "vxlan"},
}
V6 = {"IPv6Network": "fd00:5::/48", "EnableIPv6": True}
DUAL = {**V4, **V6}
V6_ONLY = {**V6, "EnableIPv4": False, "Backend": {"Type": "vxlan"}}


def log_of(process: Process) -> str:
    return process.log.read_text(errors="replace")


def wait_for_log(process: Process, words: str, timeout: float = 10) -> None:
    try:
        wait_until(lambda: words in log_of(process) or process.popen.poll() is not None, words, timeout)
    finally:
        assert words in log_of(process)


def exit_code(process: Process, timeout: float = 10) -> int:
    return process.popen.wait(timeout)


def cluster(lab: Lab, config: dict[str, Any], nodes: int = 2) -> list[Node]:
    """Nodes whose daemons are ready, a pod on each."""
    lab.put_config(config)
    for _number in range(nodes):
        lab.add_node()
    wait_ready([lab.start_daemon(node) for node in lab.nodes])
    for node in lab.nodes:
        lab.add_pod(node)
    # Ready means: all peers that were there are programmed. The ones that came later follow at once.
    for node in lab.nodes:
        wait_until(lambda node=node: routes(lab, node) >= nodes - 1, f"{nodes - 1} routes on {node.name}")  # type: ignore[misc]
    return lab.nodes


def reach(lab: Lab, source: Node, address: str, size: int = 84) -> None:
    """A pod's packet gets there; its first IPv6 packets may wait for neighbour discovery on its bridge."""
    pod = source.pods[0]
    wait_until(
        lambda: lab.ping(pod.netns, address, size=size, count=1).received, f"{pod.netns} to reach {address}"
    )


def routes(lab: Lab, node: Node, family: str = "") -> int:
    found = lab.ip_json(node.netns, "route show proto 70") + lab.ip_json(node.netns, "-6 route show proto 70")
    return len({route["dst"] for route in found})


def leases(lab: Lab) -> dict[str, Any]:
    lines = lab.etcdctl("get", "--prefix", f"{ETCD_PREFIX}/subnets/").splitlines()
    return {
        key.rpartition("/")[2]: json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)
    }


def put_lease(lab: Lab, key: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    words = ("put", f"{ETCD_PREFIX}/subnets/{key}")
    lab.etcdctl(*words, stdin=text) if text else lab.etcdctl(*words, "")


def peer(number: int, **changes: Any) -> dict[str, Any]:
    mac = f"02:00:00:00:01:{number:02x}"
    lease = {"PublicIP": f"192.168.77.{number}", "PublicIPv6": None, "BackendType": "vxlan",
             "BackendData": {"VNI": 1, "VtepMAC": mac}}  # fmt: skip
    return {**lease, **changes}


def assert_fails(daemon: Process, code: int, words: str) -> None:
    """One clear last line, a non-zero exit code, no traceback."""
    assert exit_code(daemon) == code
    last = log_of(daemon).splitlines()[-1]
    assert "ERROR" in last
    assert words in last
    assert "Traceback" not in log_of(daemon)


def links(lab: Lab, node: Node) -> set[str]:
    return {link["ifname"] for link in lab.ip_json(node.netns, "link show")}
