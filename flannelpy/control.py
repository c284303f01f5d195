"""How commands on this host talk to the running daemon: a UNIX socket beside subnet.env.

One line of JSON each way: `{"do": "held"}` -> `{"ok": [...]}` or `{"error": "..."}`. Only root and the
daemon's own user may connect: the socket has mode 0600.
"""

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from flannelpy.errors import FlannelpyError

log = logging.getLogger(__name__)

_LONGEST_QUESTION = 4096
_LONGEST_ANSWER = 64 << 20
"""10,000 peers take 3 MiB."""
_SECONDS = 5.0
_CREDENTIALS = struct.Struct("=iII")

Commands = Mapping[str, Callable[[], Any]]
"""Name -> what is done; the answer must be JSON."""


def path_for(subnet_file: str) -> Path:
    """Where the socket of the daemon that writes this subnet.env is: `/run/flannel/subnet.sock`."""
    return Path(subnet_file).with_suffix(".sock")


@asynccontextmanager
async def serve(path: Path, commands: Commands) -> AsyncIterator[None]:
    """Answer commands until the end of the block. A socket that cannot be made is no reason not to run."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_SECONDS):
                line = await reader.readline()
                writer.write(json.dumps(_done(commands, line)).encode() + b"\n")
                await writer.drain()
        writer.close()

    listener = _listen(path)
    server = listener and await asyncio.start_unix_server(answer, sock=listener, limit=_LONGEST_QUESTION)
    try:
        yield
    finally:
        if server is not None:
            server.close()
            _remove(path)


def _listen(path: Path) -> socket.socket | None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o022)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.umask(0o177)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        log.warning("no commands for this daemon: cannot make %s: %s", path, error)
        return None
    finally:
        os.umask(before)
    return listener


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _done(commands: Commands, line: bytes) -> dict[str, Any]:
    try:
        name = json.loads(line)["do"]
        command = commands[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": f"not one of the commands {', '.join(commands)}"}
    return {"ok": command()}


def holder(path: Path) -> int | None:
    """The process that listens on the socket, answering or not; None if nobody does, or if we may not ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, suppress(OSError):
        client.settimeout(_SECONDS)
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(credentials)[0]
        return pid
    return None


def ask(path: Path, command: str, seconds: float = _SECONDS) -> Any:
    """The daemon's answer. Raises FlannelpyError: no daemon, no permission, no such command."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(seconds)
            client.connect(str(path))
            client.sendall(json.dumps({"do": command}).encode() + b"\n")
            with client.makefile("rb") as file:
                reply = json.loads(file.readline(_LONGEST_ANSWER))
    except (FileNotFoundError, ConnectionRefusedError):
        raise FlannelpyError(
            f"no flannelpy daemon answers at {path}: is it running? (--subnet-file names it)"
        ) from None
    except PermissionError:
        raise FlannelpyError(f"{path}: permission denied; run this as root or as the daemon's user") from None
    except (OSError, ValueError) as error:
        raise FlannelpyError(f"the daemon at {path} gave no proper answer: {error}") from None
    if "error" in reply:
        raise FlannelpyError(f"the daemon at {path}: {reply['error']}")
    return reply["ok"]
