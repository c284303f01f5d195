"""A lab whose nodes are Kubernetes nodes: the stand-in for an API server instead of etcd, over HTTPS."""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flannelpy.cli.lab import GATEWAY, Lab, Node
from flannelpy.cli.processes import Process, inside
from tests.kube.api import TOKEN, ApiServer, RealApi, StandIn

NETWORK = "10.244.0.0/16"
OURS = (sys.executable, "-m", "flannelpy")


class Inside(ApiServer):
    """In the underlay's namespace: each call is made by a thread that has entered it."""

    netns = ""

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        def there() -> Any:
            descriptor = os.open(self.netns, os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(descriptor)
            return super(Inside, self).call(method, path, body, kind)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(there).result()


class KubeApi(Inside, StandIn):
    """The stand-in."""

    def __init__(self, lab: Lab) -> None:
        self.netns = f"/run/netns/{lab.underlay}"
        super().__init__(lab.folder / "api", str(GATEWAY), command=tuple(inside(lab.underlay)), port=6443)


class RealKubeApi(Inside, RealApi):
    """A real kube-apiserver, on the lab's etcd."""

    def __init__(self, lab: Lab) -> None:
        self.netns = f"/run/netns/{lab.underlay}"
        lab.start_etcd()
        command = tuple(inside(lab.underlay))
        RealApi.__init__(self, lab.folder / "api", lab.etcd_url, str(GATEWAY), 6443, command)


class Cluster:
    """A lab, its API server, and what a kubelet and a controller manager do to nodes."""

    def __init__(self, lab: Lab, config: dict[str, Any], api: ApiServer) -> None:
        self.lab = lab
        self.api = api
        self.config = Path(lab.folder, "net-conf.json")
        self.config.write_text(json.dumps(config))
        self.kubeconfig = self.api.kubeconfig()

    def add_node(self, *, cidr: bool = True) -> Node:
        node = self.lab.add_node()
        # As the controller manager's: a flannel needs that there is any annotation.
        cidrs = (f"10.244.{node.number}.0/24",) if cidr else ()
        self.api.add_node(node.name, cidrs, {"node.alpha.kubernetes.io/ttl": "0"})
        return node

    def start(self, node: Node, command: Sequence[str] = OURS, flags: Sequence[str] = ()) -> Process:
        access = f"--kubeconfig-file={self.kubeconfig}"
        ours = ["--kube-subnet-mgr", f"--net-config-path={self.config}", *(flags or [access])]
        return self.lab.start_daemon(node, ["env", f"NODE_NAME={node.name}", *command], flags=ours)

    def start_in_pod(self, node: Node) -> Process:
        """As a pod finds it: the API server by two variables, a service account in a folder of its own."""
        folder = "/run/secrets/kubernetes.io/serviceaccount"
        ours = f"""
            mount -t tmpfs none /run
            mkdir -p {folder}
            cp {self.api.authority.file} {folder}/ca.crt
            cp {self.token} {folder}/token
            exec "$@"
        """
        where = (f"KUBERNETES_SERVICE_HOST={GATEWAY}", f"KUBERNETES_SERVICE_PORT={self.api.port}")
        command = [*where, "unshare", "--mount", "sh", "-ec", ours, "sh", *OURS]
        return self.start(node, command, ["--kubeconfig-file="])

    def rotate_token(self, daemon: Process, token: str) -> None:
        """What kubelet does to the file in a running pod."""
        root = f"/proc/{daemon.popen.pid}/root"
        Path(f"{root}/run/secrets/kubernetes.io/serviceaccount/token").write_text(token)

    @property
    def token(self) -> Path:
        """A file with the token that a service account starts with."""
        path = self.lab.folder / "token"
        path.write_text(TOKEN)
        return path
