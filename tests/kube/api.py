"""API servers for tests: the stand-in, and a real kube-apiserver given as KUBE_APISERVER."""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.certificates import Authority
from tests.etcd_process import free_port

ROOT = Path(__file__).parents[2]
KUBE_APISERVER = os.environ.get("KUBE_APISERVER") or shutil.which("kube-apiserver")
TOKEN = "token-of-the-test"  # noqa: S105
PREFIX = "flannel.alpha.coreos.com/"
MERGE = "application/merge-patch+json"


class ApiServer:
    """What both have: HTTPS, a token, and kubectl's view."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.authority = Authority(folder, "ca")
        self.pair = self.authority.issue("server", address=address)
        self.port = 0
        self._context = ssl.create_default_context(cafile=self.authority.file)

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    def kubeconfig(
        self, name: str = "kubeconfig", user: Mapping[str, Any] | None = None, **cluster: Any
    ) -> str:
        path = self.folder / name
        known = {"server": self.url, "certificate-authority": self.authority.file}
        known = {key: text for key, text in {**known, **cluster}.items() if text}
        value = {
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": known}],
            "users": [{"name": "u", "user": {"token": TOKEN} if user is None else user}],
        }
        path.write_text(json.dumps(value))
        return str(path)

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        connection = http.client.HTTPSConnection(self.address, self.port, timeout=10, context=self._context)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        value = json.loads(answer.read())
        connection.close()
        if answer.status >= 300:
            raise AssertionError(f"{method} {path}: {answer.status} {value}")
        return value

    def add_node(
        self, name: str, cidrs: tuple[str, ...] = (), annotations: Mapping[str, str] | None = None
    ) -> Any:
        spec: dict[str, Any] = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
        return self.call("POST", "/api/v1/nodes", {
            "kind": "Node", "apiVersion": "v1",
            "metadata": {"name": name, "annotations": dict(annotations or {})}, "spec": spec,
        })  # fmt: skip

    def node(self, name: str) -> Any:
        return self.call("GET", f"/api/v1/nodes/{name}")

    def annotations(self, name: str) -> dict[str, str]:
        found = self.node(name)["metadata"].get("annotations", {})
        return {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}

    def patch(self, name: str, change: Any, part: str = "") -> Any:
        return self.call("PATCH", f"/api/v1/nodes/{name}{part}", change, MERGE)

    def annotate(self, name: str, **annotations: str | None) -> Any:
        values = {PREFIX + key.replace("_", "-"): value for key, value in annotations.items()}
        return self.patch(name, {"metadata": {"annotations": values}})

    def delete_node(self, name: str) -> None:
        self.call("DELETE", f"/api/v1/nodes/{name}")

    def condition(self, name: str) -> tuple[str, str] | None:
        for one in self.node(name).get("status", {}).get("conditions", []):
            if one["type"] == "NetworkUnavailable":
                return one["status"], one["reason"]
        return None

    def events(self) -> list[Any]:
        found: list[Any] = self.call("GET", "/api/v1/namespaces/default/events")["items"]
        return found

    def stop(self) -> None:
        raise NotImplementedError


class StandIn(ApiServer):
    """tests/kube/server.py as a process."""

    def __init__(
        self,
        folder: Path,
        address: str = "127.0.0.1",
        *,
        command: tuple[str, ...] = (),
        port: int = 0,
        client_ca: bool = False,
    ) -> None:
        super().__init__(folder, address)
        self._command = command
        self._flags = (f"--client-ca={self.authority.file}",) if client_ca else ()
        self.start(port)

    def start(self, port: int = 0) -> None:
        program = [
            *(sys.executable, "-m", "tests.kube.server", f"--address={self.address}", f"--port={port}"),
            *(f"--certificate={self.pair.certificate}", f"--key={self.pair.key}", *self._flags),
        ]
        self.process = subprocess.Popen(
            [*self._command, *program], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def do(self, what: str, value: Any = None) -> Any:
        return self.call("POST", f"/stand-in/{what}", value)

    def requests(self) -> dict[str, int]:
        found: dict[str, int] = self.do("state")["requests"]
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class RealApi(ApiServer):
    """A kube-apiserver on an empty etcd."""

    def __init__(
        self,
        folder: Path,
        etcd: str,
        address: str = "127.0.0.1",
        port: int = 0,
        command: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder, address)
        assert KUBE_APISERVER is not None
        self.port = port or free_port()
        (folder / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        self._command = [
            *command, KUBE_APISERVER, f"--etcd-servers={etcd}", f"--bind-address={address}",
            f"--secure-port={self.port}", f"--advertise-address={address}", "--endpoint-reconciler-type=none",
            f"--tls-cert-file={self.pair.certificate}", f"--tls-private-key-file={self.pair.key}",
            "--service-account-issuer=https://test.example",
            f"--service-account-key-file={self.pair.certificate}",
            f"--service-account-signing-key-file={self.pair.key}", "--authorization-mode=RBAC",
            f"--token-auth-file={folder / 'tokens.csv'}", "--disable-admission-plugins=ServiceAccount",
            "--service-cluster-ip-range=10.99.0.0/24", f"--cert-dir={folder}",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        path = self.folder / "apiserver.log"
        with path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, path.read_text()[-2000:]
            assert time.monotonic() < deadline, path.read_text()[-2000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            self.call("GET", "/api/v1/namespaces/default")
        except (OSError, AssertionError, ValueError):
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
