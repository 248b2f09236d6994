"""The demo's NBD client and load, against the real NBD server with a volume in memory."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockstore.cli.demo_client import NbdClient
from blockstore.cli.demo_load import CHUNK_BYTES, Load
from blockstore.errors import CairnError
from nbd_server.device import Device
from nbd_server.exports import Export, Exports
from nbd_server.server import NbdServer
from nbd_server.uri import NbdTarget
from tests.memory_nbd import MemoryVolume
from tests.programs import find_program, require_programs

SIZE = 3 * CHUNK_BYTES + 4096
LIMIT_S = 60.0


def served(test: Callable[[NbdTarget, MemoryVolume], Awaitable[None]], socket: Path | None = None) -> None:
    """Run `test` with the exports `disk` and `read-only` of a volume of SIZE bytes."""

    async def run() -> None:
        volume = MemoryVolume(SIZE)
        exports = Exports()
        exports.add(Export("disk", Device(volume)))
        exports.add(Export("read-only", Device(volume), read_only=True))
        server = NbdServer(exports)
        host, port = await server.listen_tcp("127.0.0.1", 0)
        if socket is not None:
            await server.listen_unix(socket)
        try:
            await test(NbdTarget("disk", host, port), volume)
        finally:
            await server.close()

    asyncio.run(run())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        async with await NbdClient.connect(target) as client:
            assert client.size_bytes == SIZE
            await client.write(4096, b"x" * 4096)
            assert await client.read(4000, 200) == bytes(96) + b"x" * 104
        over_socket = NbdTarget("disk", socket_path=str(tmp_path / "nbd.sock"))
        async with await NbdClient.connect(over_socket) as client:
            assert await client.read(4096, 4096) == b"x" * 4096

    served(test, tmp_path / "nbd.sock")


def test_refusals_are_errors() -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        with pytest.raises(ConnectionError, match="refuses the export"):
            await NbdClient.connect(NbdTarget("nothing", target.host, target.port))
        async with await NbdClient.connect(NbdTarget("read-only", target.host, target.port)) as client:
            with pytest.raises(OSError, match="not permitted") as refused:
                await client.write(0, bytes(4096))
            assert refused.value.errno == errno.EPERM
            assert await client.read(0, 1) == b"\0"

    served(test)


async def written(target: NbdTarget) -> Load:
    load = Load(target, SIZE)
    load.start()
    await load.reached(2 * SIZE, LIMIT_S)
    await load.stop()
    return load


def test_a_load_knows_what_it_wrote() -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        load = await written(target)
        assert load.written_bytes >= 2 * SIZE
        assert load.slowest_s > 0
        assert await load.wrong_offsets() == []

    served(test)


def test_a_load_stopped_at_once_has_written_all_once() -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        load = Load(target, SIZE)
        load.start()
        await load.stop()
        assert load.written_bytes == SIZE
        assert await load.wrong_offsets() == []

    served(test)


def test_a_wrong_byte_is_found() -> None:
    require_programs("nbdcopy")

    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        load = await written(target)
        volume.contents[CHUNK_BYTES] ^= 1
        volume.contents[SIZE - 1] ^= 1
        wrong = [CHUNK_BYTES, 3 * CHUNK_BYTES]
        assert await load.wrong_offsets() == wrong
        uri = f"nbd://{target.host}:{target.port}/"
        assert await load.wrong_offsets_of_copy(find_program("nbdcopy") or "", f"{uri}disk") == wrong
        with pytest.raises(CairnError, match="nbdcopy"):
            await load.wrong_offsets_of_copy(find_program("nbdcopy") or "", f"{uri}nothing")

    served(test)


def test_a_write_that_fails_is_told() -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        load = Load(NbdTarget("read-only", target.host, target.port), SIZE)
        load.start()
        with pytest.raises(OSError, match="not permitted"):
            await load.reached(SIZE, LIMIT_S)
        with pytest.raises(OSError, match="not permitted"):
            await load.stop()

    served(test)


def test_what_is_repeated_is_known_and_at_two_places() -> None:
    async def test(target: NbdTarget, volume: MemoryVolume) -> None:
        load = Load(target, SIZE)
        load.start()
        await load.stop()
        assert await load.repeat(CHUNK_BYTES + 5) == CHUNK_BYTES
        async with await NbdClient.connect(target) as client:
            first = await client.read(0, CHUNK_BYTES)
            assert await client.read(2 * CHUNK_BYTES, CHUNK_BYTES) == first
        assert await load.wrong_offsets() == []
        assert await load.repeat(CHUNK_BYTES - 1) == 0

    served(test)
