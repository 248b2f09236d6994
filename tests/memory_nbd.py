"""Volumes in memory, and the real NBD server around them as a program: for interop tests and benches.

    python -m tests.memory_nbd --size 256M --export disk --tcp 127.0.0.1:0 --unix /tmp/disk.sock

prints the URI of each listener on a line of its own once clients can connect, serves until SIGTERM
or SIGINT, and answers what is in flight before it ends. Nothing is kept.
"""

import argparse
import asyncio
import mmap
import signal
import sys
from pathlib import Path
from typing import Any

import structlog
import uvloop

from blockstore.daemon import keep_freed_memory
from blockstore.errors import NotFound
from blockstore.units import BLOCK_SIZE, Generation, parse_size
from blockstore.volume.block_status import Changed, Shown
from nbd_server.device import Device
from nbd_server.exports import Export, Exports
from nbd_server.holes import pieces
from nbd_server.server import NbdServer
from nbd_server.volume import Buffer

#: That one answer tells of: 32 MiB.
_SHOWN_BLOCKS = 8192


class MemoryVolume:
    """A volume that completes each call at once. Memory is taken as it is written, and given back by trim."""

    def __init__(self, size_bytes: int) -> None:
        assert size_bytes % BLOCK_SIZE == 0
        self.contents = mmap.mmap(-1, size_bytes)
        self._loop = asyncio.get_running_loop()

    @property
    def size_bytes(self) -> int:
        return len(self.contents)

    def read(self, start: int, count: int) -> asyncio.Future[Any]:
        return self._done(self.contents[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE])

    def write(self, start: int, data: Buffer) -> asyncio.Future[None]:
        self.contents[start * BLOCK_SIZE : start * BLOCK_SIZE + len(data)] = data
        return self._done(None)

    def trim(self, start: int, count: int) -> asyncio.Future[None]:
        # Of a shared mapping, as this one is; DONTNEED would bring the old bytes back.
        self.contents.madvise(mmap.MADV_REMOVE, start * BLOCK_SIZE, count * BLOCK_SIZE)
        return self._done(None)

    def zero(self, start: int, count: int, *, allocate: bool) -> asyncio.Future[None]:
        return self.trim(start, count)

    @property
    def zero_is_fast(self) -> bool:
        return True

    def cache(self, start: int, count: int) -> asyncio.Future[None]:
        return self._done(None)

    def shown(self, start: int, count: int) -> asyncio.Future[list[Shown]]:
        """By its content: a block of zeroes is one that nobody has."""
        content = self.contents[start * BLOCK_SIZE : (start + min(count, _SHOWN_BLOCKS)) * BLOCK_SIZE]
        runs = [
            Shown((piece.end - piece.start) // BLOCK_SIZE, not piece.hole, int(not piece.hole), True)
            for piece in pieces(content, 0)
        ]
        return self._done(runs)

    def changed(self, start: int, count: int, snapshot: str) -> asyncio.Future[list[Changed]]:
        raise NotFound(f"there is no snapshot {snapshot} of a volume in memory")

    async def snapshots(self) -> dict[str, Generation]:
        return {}

    def flush(self) -> asyncio.Future[None]:
        return self._done(None)

    def _done(self, value: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_result(value)
        return future


async def serve(arguments: argparse.Namespace) -> None:
    """Serve a volume for each name asked for, until a signal ends it."""
    exports = Exports()
    for name in arguments.export or ["disk"]:
        device = Device(MemoryVolume(parse_size(arguments.size)))
        exports.add(Export(name, device, description="in memory", read_only=arguments.read_only))
    server = NbdServer(exports)
    if arguments.tcp:
        host, _, port = arguments.tcp.rpartition(":")
        bound_host, bound_port = await server.listen_tcp(host, int(port))
        print(f"nbd://{bound_host}:{bound_port}", flush=True)
    if arguments.unix:
        await server.listen_unix(arguments.unix)
        print(f"nbd+unix:///?socket={arguments.unix}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.close()


def main() -> None:
    """Parse the command line, and serve."""
    parser = argparse.ArgumentParser(description="Serve volumes in memory over NBD.")
    parser.add_argument("--size", default="256M", help="of each volume; default 256M")
    parser.add_argument("--export", action="append", help="a volume's name; may be repeated; default disk")
    parser.add_argument("--tcp", metavar="HOST:PORT", help="port 0: a free one")
    parser.add_argument("--unix", metavar="PATH", type=Path)
    parser.add_argument("--read-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tcp and not arguments.unix:
        parser.error("give --tcp, --unix or both")
    keep_freed_memory()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    uvloop.run(serve(arguments))


if __name__ == "__main__":
    main()
