"""What is deployed to Kubernetes: the manifests, and the chart where HELM or PATH has a helm 3."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from flannelpy import backend
from flannelpy.cni import install
from flannelpy.flags import FLAGS
from flannelpy.model.config import parse_config
from flannelpy.usage import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
CHART = FOLDER / "chart" / "flannelpy"
HELM = os.environ.get("HELM") or shutil.which("helm") or ""
needs_helm = pytest.mark.skipif(not HELM, reason="neither HELM nor PATH has a helm 3")

BACKENDS = {point.name for point in entry_points(group="flannelpy.backends")}
Objects = dict[str, Any]


def objects(text: str) -> Objects:
    """Kind -> object; the chart has one of each."""
    found = [one for one in yaml.safe_load_all(text) if one]
    kinds = {one["kind"]: one for one in found}
    assert len(kinds) == len(found)
    return kinds


def helm(*argv: str, values: Any = None) -> subprocess.CompletedProcess[str]:
    line = [HELM, *argv, *(["--values", "-"] if values is not None else [])]
    text = None if values is None else json.dumps(values)
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=60, check=False)


def rendered(values: Any) -> Objects:
    done = helm("template", "x", str(CHART), "--namespace", "kube-flannel", values=values)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def pod(kinds: Objects) -> Any:
    return kinds["DaemonSet"]["spec"]["template"]["spec"]


def daemon(kinds: Objects) -> Any:
    return pod(kinds)["containers"][0]


def net_conf(kinds: Objects) -> Any:
    return json.loads(kinds["ConfigMap"]["data"]["net-conf.json"])


def check(kinds: Objects, tmp_path: Path) -> None:
    """What must be so whatever was asked for."""
    spec = pod(kinds)
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts: dict[str, set[str]] = {}
    for container in (*spec["initContainers"], *spec["containers"]):
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert names <= volumes, container["name"]
        mounts[container["name"]] = names
    assert set.union(*mounts.values()) == volumes
    (init,) = spec["initContainers"]
    assert init["command"][1] in COMMANDS
    known = {option for action in install_options() for option in action}
    assert {flag.partition("=")[0] for flag in init["args"]} <= known
    flags = {flag.partition("=")[0].removeprefix("--") for flag in daemon(kinds)["args"]}
    assert flags <= set(FLAGS)
    if "ConfigMap" in kinds:
        config = parse_config(kinds["ConfigMap"]["data"]["net-conf.json"])
        if config.backend_type in BACKENDS:
            backend.load(config)
        (tmp_path / "cni-conf.json").write_text(kinds["ConfigMap"]["data"]["cni-conf.json"])
        install.install_config(tmp_path / "cni-conf.json", tmp_path / "10-flannel.conflist")
    labels = kinds["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    validate(kinds)


def install_options() -> list[Sequence[str]]:
    from flannelpy.cli.cni import _parser

    return [action.option_strings for action in _parser()._actions]


def validate(kinds: Objects) -> None:
    """Against Kubernetes' schemas, where there is kubernetes-validate: 70 MB that the lock leaves out."""
    try:
        import kubernetes_validate  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return
    for one in kinds.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


# --- the manifests ---


@pytest.fixture
def manifest() -> Objects:
    return objects((FOLDER / "flannelpy.yml").read_text())


@pytest.mark.parametrize("name", ["flannelpy.yml", "migration.yml"])
def test_the_manifest_is_sound(name: str, tmp_path: Path) -> None:
    check(objects((FOLDER / name).read_text()), tmp_path)


def test_the_names_are_flannels(manifest: Objects) -> None:
    """So that `kubectl apply` over a running flannel replaces it in place, node by node."""
    names = {kind: one["metadata"]["name"] for kind, one in manifest.items()}
    assert names == {
        "Namespace": "kube-flannel",
        "ServiceAccount": "flannel",
        "ClusterRole": "flannel",
        "ClusterRoleBinding": "flannel",
        "ConfigMap": "kube-flannel-cfg",
        "DaemonSet": "kube-flannel-ds",
    }
    assert manifest["DaemonSet"]["spec"]["selector"] == {"matchLabels": {"app": "flannel"}}
    assert net_conf(manifest) == {
        "Network": "10.244.0.0/16",
        "EnableNFTables": False,
        "Backend": {"Type": "vxlan"},
    }


def test_the_configuration_for_hosts_is_that_of_the_manifest(manifest: Objects) -> None:
    text = (ROOT / "deploy" / "cni" / "10-flannel.conflist").read_text()
    assert text == manifest["ConfigMap"]["data"]["cni-conf.json"]


def test_the_rights_are_few(manifest: Objects) -> None:
    rights = {
        (resource, verb)
        for rule in manifest["ClusterRole"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert rights == {
        *(("nodes", verb) for verb in ("get", "list", "watch")),
        ("nodes/status", "patch"),
        *(("events", verb) for verb in ("create", "patch")),
    }


def test_the_pod_asks_for_little(manifest: Objects) -> None:
    spec = pod(manifest)
    assert spec["hostNetwork"] is True
    assert spec["priorityClassName"] == "system-node-critical"
    assert not {"hostPID", "hostIPC"} & set(spec)
    security = daemon(manifest)["securityContext"]
    assert security == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
    }
    (init,) = spec["initContainers"]
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["DAC_OVERRIDE"]}
    probes = daemon(manifest)
    assert probes["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {one["effect"] for one in spec["tolerations"]} == {"NoExecute", "NoSchedule"}


def test_migrating_leaves_flannel_what_it_needs() -> None:
    kinds = objects((FOLDER / "migration.yml").read_text())
    assert "ConfigMap" not in kinds
    assert kinds["DaemonSet"]["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]} in kinds["ClusterRole"]["rules"]


# --- the chart ---


@needs_helm
def test_the_manifests_are_what_the_chart_makes(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "scripts" / "manifests.sh", tmp_path], env={**os.environ, "HELM": HELM}, check=True
    )
    for name in ("flannelpy.yml", "migration.yml"):
        assert objects((tmp_path / name).read_text()) == objects((FOLDER / name).read_text())


@needs_helm
def test_the_chart_has_no_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


EVERYTHING = {
    "backendPort": 9999, "backendPortv6": 9998, "vni": 77, "mtu": 1400, "GBP": True, "learning": True,
    "directRouting": True, "macPrefix": "0e:2a", "psk": 'a"b', "tunnelMode": "auto", "keepaliveInterval": 25,
}  # fmt: skip
FAMILIES = (("10.42.0.0/16", ""), ("", "fd00:42::/56"), ("10.42.0.0/16", "fd00:42::/56"))


@needs_helm
@pytest.mark.parametrize("kind", ["vxlan", "host-gw", "udp", "wireguard", "ipip", "alloc"])
def test_every_combination_is_valid(kind: str, tmp_path: Path) -> None:
    for (v4, v6), options, switch in itertools.product(FAMILIES, ({}, EVERYTHING), (False, True)):
        flannel = {
            "backend": kind,
            "enableNFTables": switch,
            "skipCNIConfigInstallation": switch,
            "healthz": {"port": 0 if switch else 9000},
            "nodeSelector": {"a": "b"} if switch else {},
            "tolerations": [] if switch else None,
            "cniBinDir": "/var/lib/cni/bin" if switch else "/opt/cni/bin",
            **options,
        }
        kinds = rendered({"podCidr": v4, "podCidrv6": v6, "netpol": {"enabled": switch}, "flannel": flannel})
        check(kinds, tmp_path)
        conf = net_conf(kinds)
        assert conf["Backend"]["Type"] == kind
        assert (conf.get("Network", ""), conf.get("IPv6Network", "")) == (v4, v6)
        assert (conf.get("EnableIPv4", True), conf.get("EnableIPv6", False)) == (bool(v4), bool(v6))
        assert ("livenessProbe" in daemon(kinds)) is not switch
        assert ("--healthz-port=9000" in daemon(kinds)["args"]) is not switch
        assert daemon(kinds)["securityContext"]["privileged"] is (kind == "udp")
        (init,) = pod(kinds)["initContainers"]
        assert f"--bin-dir={flannel['cniBinDir']}" in init["args"]
        assert any(flag.startswith("--config=") for flag in init["args"]) is not switch


@needs_helm
def test_options_go_to_the_backend_that_has_them() -> None:
    made = {
        kind: net_conf(rendered({"flannel": {"backend": kind, **EVERYTHING}}))["Backend"]
        for kind in ("vxlan", "udp", "host-gw", "wireguard")
    }
    assert made["vxlan"] == {
        "Type": "vxlan", "Port": 9999, "VNI": 77, "MTU": 1400, "GBP": True, "Learning": True,
        "DirectRouting": True, "MacPrefix": "0e:2a",
    }  # fmt: skip
    assert made["udp"] == {"Type": "udp", "Port": 9999}
    assert made["host-gw"] == {"Type": "host-gw"}
    assert made["wireguard"] == {
        "Type": "wireguard", "ListenPort": 9999, "ListenPortV6": 9998, "PSK": 'a"b', "MTU": 1400,
        "Mode": "auto", "PersistentKeepaliveInterval": 25,
    }  # fmt: skip


@needs_helm
def test_the_values_of_flannels_chart_are_taken() -> None:
    """As somebody has them who changed much; only the images must go."""
    values = {
        "global": {"imagePullSecrets": [{"name": "pull"}]},
        "flannel": {
            "image": {"repository": "registry.example/flannelpy", "tag": 1.5},
            "flannel_cni": {"image": {"repository": "ghcr.io/flannel-io/flannel-cni-plugin", "tag": "v1"}},
            "args": ["--ip-masq", "--kube-subnet-mgr", "--iface=eth1"],
            "resources": {"limits": {"memory": "100Mi"}},
        },
        "netpol": {"enabled": True, "args": ["--v=4"]},
    }
    kinds = rendered(values)
    assert pod(kinds)["imagePullSecrets"] == [{"name": "pull"}]
    assert daemon(kinds)["image"] == "registry.example/flannelpy:1.5"
    assert "--iface=eth1" in daemon(kinds)["args"]
    assert len(pod(kinds)["containers"]) == 2
    assert any("networkpolicies" in rule["resources"] for rule in kinds["ClusterRole"]["rules"])


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"podCidr": ""}, "podCidr"),
        ({"podCidr": "10.244.0.0"}, "podCidr"),
        ({"podCidrv6": "10.0.0.0/8"}, "podCidrv6"),
        ({"flannel": {"backend": "vxlna"}}, "backend"),
        ({"flannel": {"backnd": "vxlan"}}, "backnd"),
        ({"flannel": {"vni": 1 << 24}}, "vni"),
        ({"flannel": {"backendPort": "x"}}, "backendPort"),
        ({"flannel": {"tunnelMode": '","x":"'}}, "tunnelMode"),
        ({"flannel": {"cniBinDir": "opt/cni"}}, "cniBinDir"),
        ({"flannel": {"args": "--ip-masq"}}, "args"),
        ({"flannel": {"healthz": {"port": 70000}}}, "port"),
        ({"flannel": {"image": {"repository": "ghcr.io/flannel-io/flannel"}}}, "flannel's own image"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_value_is_named(values: Any, words: str) -> None:
    done = helm("template", "x", str(CHART), values=values)
    assert done.returncode != 0
    assert words in done.stderr
