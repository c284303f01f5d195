"""Who may import what: the rules that keep decisions apart from the machine and the store."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Rule = Callable[[str, ast.AST], Iterator[str]]


def imported(tree: ast.AST) -> Iterator[str]:
    """The full dotted name of everything imported: `from a.b import c` is a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names)


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def model_is_pure(module: str, tree: ast.AST) -> Iterator[str]:
    """model/ imports the standard library and itself."""
    if below(module, "flannelpy.model"):
        for name in imported(tree):
            if not below(name, "flannelpy.model") and name.partition(".")[0] not in sys.stdlib_module_names:
                yield name


def only_the_kernel_speaks_netlink(module: str, tree: ast.AST) -> Iterator[str]:
    if below(module, "flannelpy.kernel"):
        return
    for name in imported(tree):
        if below(name, "pyroute2", "socket.AF_NETLINK"):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "AF_NETLINK":
            yield f"{ast.unparse(node)} in line {node.lineno}"


def only_the_etcd_store_imports_grpc(module: str, tree: ast.AST) -> Iterator[str]:
    if not module.startswith("flannelpy.store.etcd"):
        yield from (name for name in imported(tree) if name.partition(".")[0].startswith("grpc"))


def a_backend_imports_model_and_backend(module: str, tree: ast.AST) -> Iterator[str]:
    """Of ours, that is; and its own modules."""
    if not below(module, "flannelpy.backends") or module == "flannelpy.backends":
        return
    own = ".".join(module.split(".")[:3])
    for name in imported(tree):
        ours = below(name, "flannelpy", "backends") or name.startswith(".")
        if ours and not below(name, "flannelpy.model", "flannelpy.backend", "flannelpy.__version__", own):
            yield name


def only_the_roots_construct(module: str, tree: ast.AST) -> Iterator[str]:
    """These are the daemon's root, and that of the commands which look at a host.

    Elsewhere nothing is imported from the modules below store/ and kernel/, so nothing can be made. What the
    package `flannelpy.store` itself says, the protocol, is for everyone.
    """
    if module in ("flannelpy.daemon", "flannelpy.inspection") or below(
        module, "flannelpy.store", "flannelpy.kernel"
    ):
        return
    for name in imported(tree):
        for package in ("store", "kernel"):
            modules = {path.stem for path in (ROOT / "flannelpy" / package).glob("*.py")} - {"__init__"}
            if below(name, *(f"flannelpy.{package}.{module}" for module in modules)):
                yield name


RULES: list[Rule] = [
    model_is_pure,
    only_the_kernel_speaks_netlink,
    only_the_etcd_store_imports_grpc,
    a_backend_imports_model_and_backend,
    only_the_roots_construct,
]


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its import path; the link flannelpy/backends is not followed twice."""
    for folder, prefix in ((ROOT / "flannelpy", ""), (ROOT / "backends", "flannelpy.")):
        for path in sorted(folder.rglob("*.py")):
            if not path.is_relative_to(ROOT / "flannelpy/backends"):
                dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield prefix + dotted.removesuffix(".__init__"), path


def test_the_sources_are_found() -> None:
    found = [module for module, _ in sources()]
    assert len(found) == len(set(found))
    assert {"flannelpy", "flannelpy.daemon", "flannelpy.model.plan", "flannelpy.backends.vxlan"} <= set(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {what}"
        for module, path in sources()
        for what in rule(module, ast.parse(path.read_text()))
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (model_is_pure, "flannelpy.model.lease", "from flannelpy.errors import FlannelpyError"),
        (model_is_pure, "flannelpy.model.lease", "from flannelpy import store"),
        (model_is_pure, "flannelpy.model", "def f():\n    import google.protobuf"),
        (only_the_kernel_speaks_netlink, "flannelpy.cli.lab", "import pyroute2.iproute"),
        (only_the_kernel_speaks_netlink, "flannelpy.daemon", "from pyroute2 import IPRoute"),
        (only_the_kernel_speaks_netlink, "flannelpy.daemon", "import socket as s\ns.socket(s.AF_NETLINK)"),
        (only_the_kernel_speaks_netlink, "flannelpy.daemon", "from socket import AF_NETLINK as family"),
        (only_the_etcd_store_imports_grpc, "flannelpy.store.memory", "import grpc.aio"),
        (only_the_etcd_store_imports_grpc, "flannelpy.daemon", "from grpc_tools import protoc"),
        (a_backend_imports_model_and_backend, "flannelpy.backends.vxlan", "import flannelpy.kernel.linux"),
        (
            a_backend_imports_model_and_backend,
            "flannelpy.backends.vxlan.desired",
            "from flannelpy import store",
        ),
        (
            a_backend_imports_model_and_backend,
            "flannelpy.backends.udp",
            "from flannelpy.backends.vxlan import x",
        ),
        (
            a_backend_imports_model_and_backend,
            "flannelpy.backends.udp",
            "from flannelpy.backends import vxlan",
        ),
        (a_backend_imports_model_and_backend, "flannelpy.backends.udp.config", "from ..vxlan import config"),
        (only_the_roots_construct, "flannelpy.reconcile", "from flannelpy.kernel.linux import LinuxKernel"),
        (only_the_roots_construct, "flannelpy.cli.lease", "from flannelpy.store import etcd"),
    ],
)
def test_rule_catches(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flannelpy.model.plan", "import ipaddress\nfrom flannelpy.model import kernel"),
        ("flannelpy.kernel.netlink", "import socket\nsocket.AF_NETLINK\nimport pyroute2"),
        ("flannelpy.store.etcd_client", "import grpc.aio\nfrom flannelpy.store import etcd_pb2"),
        (
            "flannelpy.backends.udp.config",
            "from flannelpy.backends.udp import desired\nimport flannelpy.backend",
        ),
        ("flannelpy.claim", "from flannelpy.store import Store"),
        ("flannelpy.daemon", "from flannelpy.store.etcd import EtcdStore"),
    ],
)
def test_rules_allow(module: str, source: str) -> None:
    assert [what for rule in RULES for what in rule(module, ast.parse(source))] == []
