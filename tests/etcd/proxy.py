"""A TCP proxy in front of etcd that can be cut, and that can lose what it carries."""

import asyncio
from types import TracebackType
from typing import Self


class Proxy:
    """Listens on a loopback port of its own as long as the context lasts."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0
        self._mute_up = self._mute_down = 0
        """Connections made before this generation lose what goes up to etcd, down to the client."""
        self._swallow = False
        self.port = 0
        self.delay = 0.0
        """Seconds between accepting a connection and carrying its first byte."""
        self.latency = 0.0
        """Seconds by which everything comes late, in each direction."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # until the connections that were given up are gone

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.hang_up()

    async def heal(self) -> None:
        """Accept and carry again."""
        self._swallow = False
        if self._server is None:
            await self.__aenter__()

    def lose_answers(self) -> None:
        """The connections that stand now carry requests, but no answers any more."""
        self._generation += 1
        self._mute_down = self._generation

    def lose_everything(self) -> None:
        """The connections that stand now carry nothing any more."""
        self.lose_answers()
        self._mute_up = self._generation

    def lose_answers_for_good(self) -> None:
        """The same for new connections, until healed."""
        self.lose_answers()
        self._swallow = True

    def black_hole(self) -> None:
        """Nothing is carried any more, neither now nor by new connections, until healed."""
        self.lose_everything()
        self._swallow = True

    def hang_up(self) -> None:
        """Close the connections that stand; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        generation = self._generation
        self._writers.append(writer)
        try:
            await asyncio.sleep(self.delay)
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.append(up_writer)
            await asyncio.gather(
                self._carry(reader, up_writer, generation, up=True),
                self._carry(up_reader, writer, generation, up=False),
            )
        finally:
            writer.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int, *, up: bool
    ) -> None:
        try:
            while data := await reader.read(65_536):
                muted = generation < (self._mute_up if up else self._mute_down)
                if not muted and (up or not self._swallow):
                    await asyncio.sleep(self.latency)
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()
