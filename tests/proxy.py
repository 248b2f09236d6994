"""A TCP proxy that can be cut: what a test puts between a node and all who call it.

It runs in a thread with an event loop of its own. `cut` is a cable pulled with the connections lost;
`hold` is a network that delivers nothing and says nothing, until `restore` delivers what was held.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from typing import Any, Final

from blockstore.config import join_address, split_address

_CHUNK: Final = 1 << 16
_START_LIMIT_S: Final = 60.0


class Proxy:
    """Listens at `address` from the start; forwards to what `start` is given."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = join_address(*self._listening.getsockname()[:2])
        self._target = ("", 0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self.address}")
        self._open: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._flowing: asyncio.Event
        self._server: asyncio.Server

    def start(self, target: str) -> None:
        """Forward to HOST:PORT."""
        self._target = split_address(target)
        self._thread.start()
        self._run(self._listen())

    def cut(self) -> None:
        """Reset all connections, and each new one as it comes."""
        self._run(self._set(flowing=True, cut=True))

    def hold(self) -> None:
        """Deliver nothing from here on, in either direction; connections stay, and new ones are accepted."""
        self._run(self._set(flowing=False, cut=False))

    def restore(self) -> None:
        """Deliver what was held, and all that comes."""
        self._run(self._set(flowing=True, cut=False))

    def close(self) -> None:
        """End all connections and the thread."""
        if self._thread.is_alive():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._listening.close()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_LIMIT_S)

    async def _listen(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, sock=self._listening)

    async def _set(self, *, flowing: bool, cut: bool) -> None:
        self._is_cut = cut
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()
        if cut:
            self._reset_all()

    async def _end(self) -> None:
        self._server.close()
        self._reset_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _reset_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._is_cut:
                return
            await self._flowing.wait()
            await self._forward(reader, writer)
        except OSError:
            return  # the target is not there, or the connection is gone: the caller sees its own end reset
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        self._open.add(to_writer)
        pumps = [
            asyncio.ensure_future(self._pump(reader, to_writer)),
            asyncio.ensure_future(self._pump(to_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._open.discard(to_writer)
            to_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # one side is gone: the other is closed as well
            while chunk := await reader.read(_CHUNK):
                await self._flowing.wait()
                writer.write(chunk)
                await writer.drain()


class Cable:
    """All that leads to a node, cut at once: one proxy for calls, one for streams of messages.

    address: where calls go. streams_port: the node has to listen there too, on another host of the loopback.
    """

    def __init__(self) -> None:
        self._calls, self._streams = Proxy(), Proxy()
        self.address = self._calls.address
        self.streams_port = split_address(self._streams.address)[1]

    def start(self, target: str) -> None:
        """target: HOST:PORT of the node's calls."""
        self._calls.start(target)
        self._streams.start(join_address(split_address(target)[0], self.streams_port))

    def cut(self) -> None:
        self._calls.cut()
        self._streams.cut()

    def hold(self) -> None:
        self._calls.hold()
        self._streams.hold()

    def restore(self) -> None:
        self._calls.restore()
        self._streams.restore()

    def close(self) -> None:
        self._calls.close()
        self._streams.close()
