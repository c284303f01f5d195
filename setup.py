"""What pyproject.toml cannot say: the udp backend's programs for the kernel are compiled if there is a clang.

Without it the package is pure Python all the same; the backend is slower then, and says why.
"""

import logging
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "flannelpy" / "backends" / "udp"
SOURCE, OBJECT = FOLDER / "fast.bpf.c", FOLDER / "fast.o"


def compile_programs() -> None:
    """Make the object beside its source: an editable installation finds it there, a wheel takes it along."""
    clang = shutil.which("clang")
    if clang is None:
        log.warning("no clang: the udp backend is built without its fast path")
        return
    # Debian keeps asm/types.h in the machine's own folder, which a compiler for bpf does not know of.
    headers = f"-I/usr/include/{platform.machine()}-linux-gnu"
    words = [clang, "-O2", "-g0", "-Wall", "-Werror", "-target", "bpf", headers, "-c", SOURCE, "-o", OBJECT]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        OBJECT.unlink(missing_ok=True)
        log.warning("the udp backend is built without its fast path: %s", error)


class BuildPy(build_py):
    """The usual step, after the compiler's."""

    def run(self) -> None:
        """Compile, then copy."""
        compile_programs()
        # The list of data files was made before there was the object.
        self.__dict__.pop("data_files", None)
        super().run()


setup(cmdclass={"build_py": BuildPy})
