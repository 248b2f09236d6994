"""The load of `cairn demo`: random bytes through NBD, chunk after chunk and round after round, and their digests.

One chunk is under way at a time, so that after the last answer each digest is that of what must be there.
"""

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from blockstore.cli.client import wait_until
from blockstore.cli.demo_client import Connect, NbdClient
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.units import KIB
from nbd_server.uri import NbdTarget

CHUNK_BYTES: Final = 256 * KIB


class Load:
    """Writes all of one export, at least once. written_bytes and slowest_s tell of what was acknowledged."""

    def __init__(self, target: NbdTarget, size_bytes: int, connect: Connect = NbdClient.connect) -> None:
        self.connect = connect
        self.size_bytes = size_bytes
        self.written_bytes = 0
        self.slowest_s = 0.0
        self._target = target
        self._digests: dict[int, bytes] = {}
        """Of each chunk, by offset, as it was written last."""
        self._writing: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Write until `stop`."""
        self._writing = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Finish the first round, or the chunk under way. Raises what a write ended with."""
        self._stopping = True
        if self._writing is not None:
            await self._writing

    async def reached(self, written_bytes: int, limit_s: float) -> None:
        """Wait until so much is written. Raises what a write ended with, QuorumUnavailable after `limit_s` seconds."""

        async def check() -> bool | None:
            if self._writing is not None and self._writing.done():
                self._writing.result()
            return self.written_bytes >= written_bytes or None

        await wait_until(
            check,
            limit_s,
            lambda: QuorumUnavailable(f"only {self.written_bytes:,} bytes were written after {limit_s:.0f} s"),
        )

    async def repeat(self, size_bytes: int) -> int:
        """After `stop`: write the first chunks again over the last ones, size_bytes at most; how many bytes."""
        starts = [offset for offset, length in self._chunks() if length == CHUNK_BYTES]
        count = size_bytes // CHUNK_BYTES
        async with await self.connect(self._target) as client:
            for source, place in zip(starts[:count], starts[len(starts) - count :], strict=True):
                await self._write_chunk(client, place, await client.read(source, CHUNK_BYTES))
        return count * CHUNK_BYTES

    async def wrong_offsets(self, target: NbdTarget | None = None) -> list[int]:
        """The offsets of chunks that read otherwise than they were written last; target: of another export."""
        async with await self.connect(target or self._target) as client:
            return await self._compare(client.read)

    async def wrong_offsets_of_copy(self, nbdcopy: str, uri: str) -> list[int]:
        """The same for what the program nbdcopy reads. Raises CairnError where it fails."""
        process = await asyncio.create_subprocess_exec(nbdcopy, uri, "-", stdout=asyncio.subprocess.PIPE)
        output = process.stdout
        assert output is not None
        try:
            return await self._compare(lambda _, length: output.readexactly(length))
        except asyncio.IncompleteReadError as error:
            raise CairnError(f"nbdcopy {uri} ended early, with exit code {await process.wait()}") from error
        finally:
            if process.returncode is None:
                await process.wait()

    async def _compare(self, read: Callable[[int, int], Awaitable[bytes]]) -> list[int]:
        """`read` gets an offset and a length, in the order of the offsets."""
        wrong = []
        for offset, length in self._chunks():
            if _digest(await read(offset, length)) != self._digests[offset]:
                wrong.append(offset)
        return wrong

    async def _write(self) -> None:
        async with await self.connect(self._target) as client:
            for offset, length in itertools.cycle(self._chunks()):
                if self._stopping and offset in self._digests:
                    return
                await self._write_chunk(client, offset, os.urandom(length))

    async def _write_chunk(self, client: NbdClient, offset: int, data: bytes) -> None:
        began = time.monotonic()
        await client.write(offset, data)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self._digests[offset] = _digest(data)
        self.written_bytes += len(data)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each."""
        for offset in range(0, self.size_bytes, CHUNK_BYTES):
            yield offset, min(CHUNK_BYTES, self.size_bytes - offset)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
