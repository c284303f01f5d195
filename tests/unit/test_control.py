"""Commands for the running daemon."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from flannelpy import control
from flannelpy.errors import FlannelpyError


def with_server(path: Path, client: Any) -> Any:
    async def main() -> Any:
        async with control.serve(path, {"confirm": lambda: 3}):
            return await asyncio.to_thread(client)

    return asyncio.run(main())


def test_a_command_is_answered(tmp_path: Path) -> None:
    path = control.path_for(str(tmp_path / "run" / "subnet.env"))
    path.parent.mkdir()
    path.write_text("left over")
    modes = []

    def client() -> Any:
        modes.append(path.stat().st_mode & 0o777)
        return control.ask(path, "confirm")

    assert with_server(path, client) == 3
    assert modes == [0o600]
    assert not path.exists()
    assert path.name == "subnet.sock"


@pytest.mark.parametrize(
    "line", [b"\n", b"{\n", b"[]\n", b'{"do":[]}\n', b'{"do":"x"}\n', b"[" * 3000 + b"\n"]
)
def test_anything_else_is_refused(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"

    def client() -> bytes:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(path))
            one.sendall(line)
            return one.recv(1000)

    assert b"not one of the commands confirm" in with_server(path, client)


def test_no_daemon_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FlannelpyError, match="no flannelpy daemon answers"):
        control.ask(tmp_path / "none.sock", "confirm")


def test_a_folder_that_cannot_be_made_is_no_reason_not_to_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main() -> None:
        async with control.serve(tmp_path / "file" / "s.sock", {}):
            pass

    asyncio.run(main())
