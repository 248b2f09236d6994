"""The server over real sockets, with a volume that completes when the test says so.

Each test runs on both event loops: uvloop, which the daemon has, and asyncio's own.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from blockstore.errors import AlreadyExists, CairnError, Fenced, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, KIB, MIB
from nbd_server import wire
from nbd_server.device import Device
from nbd_server.exports import Export, Exports
from nbd_server.server import NbdServer
from nbd_server.wire import Command, Option
from tests.memory_nbd import MemoryVolume
from tests.nbd_client import Disconnected, NbdError
from tests.nbd_serving import LIMIT_S, SIZE, serving, settled, until

RunLoop = Callable[[Any], Any]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> RunLoop:
    return uvloop.run if request.param == "uvloop" else asyncio.run


# What it is for.


def test_every_command_over_two_connections(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            first, second = await served.client(), await served.client("other")
            assert (first.size_bytes, first.flags) == (SIZE, 0xD6D)
            await first.write(1000, b"x" * 10_000, fua=True)
            assert await second.read(999, 10_002) == b"\0" + b"x" * 10_000 + b"\0"
            await second.write_zeroes(2000, 100, no_hole=True)
            await second.trim(4096, 4096)
            await second.flush()
            expected = bytearray(b"\0" * 1000 + b"x" * 10_000)
            expected[2000:2100] = bytes(100)
            expected[4096:8192] = bytes(4096)
            assert await first.read(0, 11_000) == expected
            await first.close()
            await second.close()

    run(main())


def test_answers_come_in_the_order_of_their_end(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            served.volume.holding = True
            raw = await served.raw()
            for cookie in range(3):
                raw.request(Command.READ, cookie * BLOCK_SIZE, BLOCK_SIZE, cookie)
            raw.request(Command.FLUSH, 0, 0, 77)
            assert await raw.reply() == (0, 77)
            await until(lambda: len(served.volume.held) == 3)
            for index, cookie in ((2, 2), (0, 0), (0, 1)):
                served.volume.release(index)
                assert await raw.reply(BLOCK_SIZE) == (0, cookie)
            raw.writer.close()

    run(main())


def test_a_large_write_arrives_whole(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.client()
            payload = bytes(range(256)) * (32 * MIB // 256)
            await client.write(SIZE - len(payload), payload)
            assert await client.read(SIZE - len(payload), len(payload)) == payload
            with pytest.raises(NbdError) as caught:
                await client.read(0, 32 * MIB + 1)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(NbdError) as caught:
                await client.write(0, payload + b"x")
            assert caught.value.errno == errno.EINVAL
            await client.write(0, b"still here")
            await client.close()

    run(main())


def test_a_unix_socket_is_replaced_and_serves(run: RunLoop, tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path / "s"))  # a unix socket's path has to be short

    async def main() -> None:
        async with serving() as served:
            stale = socket.socket(socket.AF_UNIX)
            stale.bind(str(path))
            stale.close()
            await served.server.listen_unix(path)
            reader, writer = await asyncio.open_unix_connection(str(path))
            assert await reader.readexactly(18) == wire.serialize_greeting()
            writer.close()
            with pytest.raises(OSError, match="another process listens"):
                await NbdServer(Exports()).listen_unix(path)
            with pytest.raises(OSError, match="in use"):
                await NbdServer(Exports()).listen_tcp("127.0.0.1", served.port)

    run(main())
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (QuorumUnavailable("x"), errno.EIO),
        (Fenced("x"), errno.ESHUTDOWN),
        (CairnError("x"), errno.EIO),
        (RuntimeError("a defect of the volume's"), errno.EIO),
    ],
)
def test_an_error_of_the_volume_is_its_requests_alone(run: RunLoop, error: Exception, number: int) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.client()
            served.volume.error = error
            for offset in (0, 100):
                with pytest.raises(NbdError) as caught:
                    await client.write(offset, bytes(BLOCK_SIZE))
                assert caught.value.errno == number
            served.volume.error = None
            await client.write(0, bytes(BLOCK_SIZE))
            await client.close()

    run(main())


def test_a_read_only_export_refuses_changes(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.client("fixed")
            assert client.flags & wire.TransmissionFlag.READ_ONLY
            for change in (client.write(0, b"x"), client.trim(0, 4096), client.write_zeroes(0, 4096)):
                with pytest.raises(NbdError) as caught:
                    await change
                assert caught.value.errno == errno.EPERM
            await client.flush()
            await client.close()

    run(main())


# Ends.


def test_disconnect_answers_what_is_in_flight(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            served.volume.holding = True
            raw = await served.raw()
            raw.request(Command.READ, 0, BLOCK_SIZE, 1)
            raw.request(Command.DISC, 0, 0)
            await until(lambda: len(served.volume.held) == 1)
            served.volume.release()
            assert len(await raw.ended()) == 16 + BLOCK_SIZE

    run(main())


def test_an_end_without_disconnect_does_the_same(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            served.volume.holding = True
            raw = await served.raw()
            raw.send(wire.serialize_request(Command.WRITE, 0, 1, 0, BLOCK_SIZE) + bytes(BLOCK_SIZE))
            raw.writer.write_eof()
            await until(lambda: len(served.volume.held) == 1)
            served.volume.release()
            assert len(await raw.ended()) == 16

    run(main())


def test_closing_answers_what_is_in_flight_and_refuses_more(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            served.volume.holding = True
            raw = await served.raw()
            raw.request(Command.READ, 0, BLOCK_SIZE, 1)
            await until(lambda: len(served.volume.held) == 1)
            closing = asyncio.ensure_future(served.server.close())
            await asyncio.sleep(0)
            raw.request(Command.READ, 0, BLOCK_SIZE, 2)
            assert await settled(lambda: len(served.volume.held)) == 1
            served.volume.release()
            assert await raw.reply() == (errno.ESHUTDOWN, 2)
            assert await raw.reply(BLOCK_SIZE) == (0, 1)
            assert await raw.ended() == b""
            await closing
            with pytest.raises(Disconnected):
                await served.client()

    run(main())


def test_an_export_that_is_removed_ends_its_connections_alone(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            disk, other = await served.client(), await served.client("other")
            assert (await served.server.remove_export("disk")).name == "disk"
            with pytest.raises(Disconnected):
                await disk.read(0, 512)
            with pytest.raises(NbdError):
                await served.client("disk")
            await other.write(0, b"goes on")
            await other.close()
            with pytest.raises(NotFound):
                await served.server.remove_export("disk")

    run(main())


def test_an_export_that_is_removed_before_its_client_has_read_the_answer_is_not_served(run: RunLoop) -> None:
    """The list before the answer is longer than the server sends unread, so the client is still held back."""

    async def main() -> None:
        async with serving(unsent_bytes=1024) as served:
            for number in range(3000):
                served.add_export(f"export-{number:05}" + "x" * 3000)
            raw = await served.raw(None)
            choice = wire.serialize_option(Option.EXPORT_NAME, b"disk")
            raw.send(wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.LIST) + choice)
            await until(lambda: served.unsent_bytes > 1024)
            await served.server.remove_export("disk")
            raw.request(Command.READ, 0, 512, 1)
            assert wire.SIMPLE_REPLY_MAGIC.to_bytes(4, "big") not in await raw.ended()

    run(main())


def test_what_is_in_flight_of_a_client_that_is_gone_ends_and_is_counted_until_then(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            served.volume.holding = True
            raw = await served.raw()
            raw.send(wire.serialize_request(Command.WRITE, 0, 1, 0, BLOCK_SIZE) + b"w" * BLOCK_SIZE)
            await until(lambda: len(served.volume.held) == 1)
            raw.reset()
            assert await settled(lambda: served.server.connection_count) == 1
            assert (served.server.in_flight_requests, served.server.in_flight_bytes) == (1, BLOCK_SIZE)
            served.volume.release_all()
            await until(lambda: served.server.connection_count == 0)
            assert served.server.in_flight_bytes == 0

    run(main())


# Names.


def test_names_are_taken_once_and_limited() -> None:
    async def main() -> None:
        device = Device(MemoryVolume(MIB))
        exports = Exports()
        exports.add(Export("a", device))
        assert exports.find("") is exports.find("a")
        with pytest.raises(AlreadyExists):
            exports.add(Export("a", device))
        exports.add(Export("b", device))
        assert exports.find("") is None
        assert [export.name for export in exports] == ["a", "b"]
        for name in ("x" * 4097, "a\0b"):
            with pytest.raises(InvalidRequest):
                Export(name, device)

    asyncio.run(main())


# Back-pressure.


def test_no_more_requests_are_begun_than_the_limit(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(in_flight_requests=4) as served:
            served.volume.holding = True
            raw = await served.raw()
            for cookie in range(100):
                raw.request(Command.READ, 0, 512, cookie)
            await until(lambda: len(served.volume.held) == 4)
            assert await settled(lambda: len(served.volume.held)) == 4
            served.volume.release()
            await raw.reply(512)
            await until(lambda: len(served.volume.held) == 4)
            served.volume.release_all()
            for _ in range(99):
                assert (await raw.reply(512))[0] == 0
            raw.writer.close()

    run(main())


def test_one_client_holds_no_more_bytes_than_the_limit(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(in_flight_bytes=4 * MIB) as served:
            served.volume.holding = True
            client = await served.client()
            writes = [asyncio.ensure_future(client.write(number * MIB, bytes(MIB))) for number in range(20)]
            await until(lambda: len(served.volume.held) == 4)
            assert await settled(lambda: len(served.volume.held)) == 4
            assert served.server.in_flight_bytes == 4 * MIB
            served.volume.release_all()
            await asyncio.gather(*writes)
            await until(lambda: served.server.in_flight_bytes == 0)
            await client.close()

    run(main())


def test_all_clients_together_hold_no_more_than_the_total_and_small_requests_go_on(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(total_bytes=32 * MIB) as served:
            clients = [await served.client() for _ in range(12)]
            served.volume.holding = True
            reads = [asyncio.ensure_future(client.read(0, 4 * MIB)) for client in clients]
            writes = [asyncio.ensure_future(client.write(8 * MIB, bytes(4 * MIB))) for client in clients]
            await until(lambda: len(served.volume.held) == 8)
            assert await settled(lambda: len(served.volume.held)) == 8
            assert served.server.in_flight_bytes == 32 * MIB
            small = await served.client()
            request = asyncio.ensure_future(small.read(0, 64 * KIB))
            await until(lambda: len(served.volume.held) == 9)
            served.volume.release(8)
            assert len(await request) == 64 * KIB
            served.volume.release_all()
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*reads, *writes)
            for client in (*clients, small):
                await client.close()

    run(main())


def test_a_payload_as_long_as_all_that_one_client_may_hold_is_received(run: RunLoop) -> None:
    """It counts itself from its first byte on, and must not wait for itself."""

    async def main() -> None:
        async with serving(in_flight_bytes=MIB, total_bytes=32 * MIB) as served:
            client = await served.client()
            async with asyncio.timeout(LIMIT_S):
                await client.write(0, b"w" * 32 * MIB)
                await asyncio.gather(*(client.write(number * MIB, b"v" * MIB) for number in range(8)))
            await client.close()

    run(main())
