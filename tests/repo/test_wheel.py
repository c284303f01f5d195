"""What is shipped: the wheel, built from the source archive as a distributor does, and opened."""

import configparser
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "flannelpy", "backends")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    # In a copy, for a build leaves traces beside the sources; without isolation it needs no network.
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.o")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert len(list(out.glob("flannelpy-*.tar.gz"))) == 1
    (path,) = out.glob("flannelpy-*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return ZipFile(path)


def metadata(wheel: ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_every_module_is_in_it_and_nothing_else(wheel: ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if name.endswith((".py", ".pyi", ".proto", "py.typed"))}
    files = [
        path
        for path in (ROOT / "flannelpy").rglob("*")
        if not path.is_relative_to(ROOT / "flannelpy/backends")
    ]
    expected = {
        str(path.relative_to(ROOT)) for path in files if path.suffix in {".py", ".pyi", ".proto", ".typed"}
    }
    expected |= {f"flannelpy/{path.relative_to(ROOT)}" for path in (ROOT / "backends").rglob("*.py")}
    assert shipped == expected
    assert "flannelpy/py.typed" in shipped
    assert "flannelpy/backends/vxlan/__init__.py" in shipped


def test_the_programs_for_the_kernel_are_in_it(wheel: ZipFile) -> None:
    assert shutil.which("clang"), "make install brings clang"
    names = wheel.namelist()
    assert {"flannelpy/backends/udp/fast.bpf.c", "flannelpy/backends/udp/fast.o"} <= set(names)


def test_only_one_name_is_taken_in_site_packages(wheel: ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"flannelpy"}


def test_the_entry_points_name_what_is_there(wheel: ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == PYPROJECT["project"]["scripts"]
    assert dict(parser["flannelpy.backends"]) == PYPROJECT["project"]["entry-points"]["flannelpy.backends"]
    for point in (*parser["console_scripts"].values(), *parser["flannelpy.backends"].values()):
        path = point.partition(":")[0].replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & set(wheel.namelist()), point


def test_the_metadata_says_what_it_needs_and_under_which_licence(wheel: ZipFile) -> None:
    said = message_from_string(metadata(wheel, "METADATA"))
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
    needed = [Requirement(text) for text in said.get_all("Requires-Dist", []) if "extra" not in text]
    assert needed == [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
