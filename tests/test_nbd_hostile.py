"""Hostile clients: whatever they do, they harm themselves alone, and what they take comes back."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from blockstore.units import BLOCK_SIZE, MIB
from nbd_server import wire
from nbd_server.wire import Command, Option
from tests.nbd_by_hand import session
from tests.nbd_client import NbdClient
from tests.nbd_serving import LIMIT_S, Raw, Served, most_while_connected, serving, until

RunLoop = Callable[[Any], Any]
OPEN_FILES = "/proc/self/fd"


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> RunLoop:
    return uvloop.run if request.param == "uvloop" else asyncio.run


async def check_unharmed(client: NbdClient) -> None:
    """A client with manners is served as ever."""
    await client.write(5 * BLOCK_SIZE + 7, b"unharmed")
    assert await client.read(5 * BLOCK_SIZE + 7, 8) == b"unharmed"


async def dropped(served: Served, raw: Raw, besides: int) -> None:
    """The server ends that connection, and has nothing left of it; `besides`: the connections that stay."""
    await raw.ended()
    await until(lambda: served.server.connection_count == besides)
    await until(lambda: served.server.in_flight_bytes == 0)


# In the handshake.


def test_a_handshake_that_takes_too_long_is_dropped(run: RunLoop) -> None:
    """Wherever it stops."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        async with serving(handshake_s=1.0) as served:
            client = await NbdClient.connect_soon(f"nbd://127.0.0.1:{served.port}/disk", LIMIT_S)
            begun = b"\0\0\0\3" + wire.serialize_option(7, b"x" * 99)

            async def time_until_dropped(sent: bytes) -> float:
                began, raw = clock(), await served.raw(None)
                raw.send(sent)
                await raw.ended()
                return clock() - began

            slow = (b"", begun[:2], begun[:10], begun[:-1])
            assert min(await asyncio.gather(*map(time_until_dropped, slow))) > 0.9, "each has its time"
            await check_unharmed(client)
            await client.close()

    run(main())


def test_a_client_that_only_lists_is_held_back_and_dropped(run: RunLoop) -> None:
    """It never reads: what the server holds for it stays small, though it asked for 100 MiB."""

    async def main() -> None:
        async with serving(handshake_s=1.0, unsent_bytes=64 << 10) as served:
            for number in range(500):
                served.add_export(f"export-{number:05}" + "x" * 200)
            client, unsent = await NbdClient.connect_soon(f"nbd://127.0.0.1:{served.port}/disk", LIMIT_S), 0
            while not unsent:  # a machine that stands still drops it before it is looked at
                lister = await served.raw(None)
                lister.send(wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.LIST) * 1000)
                unsent = await most_while_connected(served, 1, lambda: served.unsent_bytes)
                lister.writer.close()
            assert unsent < 400_000
            await check_unharmed(client)
            await client.close()

    run(main())


def test_a_thousand_connections(run: RunLoop) -> None:
    """Those that never speak give way to those that do; nothing is left open."""

    async def main() -> None:
        async with serving(connections=40) as served:
            client = await served.client()
            before = len(os.listdir(OPEN_FILES))
            silent = [await served.raw(None) for _ in range(1000)]
            assert served.server.connection_count <= 41
            newcomer = await served.client("other")
            await check_unharmed(client)
            await check_unharmed(newcomer)
            for raw in silent:
                raw.writer.close()
            await newcomer.close()
            await until(lambda: served.server.connection_count == 1)
            await until(lambda: len(os.listdir(OPEN_FILES)) <= before)
            await client.close()

    run(main())


def test_clients_at_work_keep_newcomers_out_beyond_the_limit(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(connections=3) as served:
            clients = [await served.client() for _ in range(3)]
            late = Raw(*await asyncio.open_connection("127.0.0.1", served.port))
            await late.ended()
            for client in clients:
                await check_unharmed(client)
            await clients.pop().close()
            await until(lambda: served.server.connection_count == 2)
            clients.append(await served.client())
            for client in clients:
                await client.close()

    run(main())


# In the transmission phase.


def test_one_that_breaks_the_protocol_is_dropped(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.client()
            for sent in (
                b"GET / HTTP/1.0\r\n\r\n" + bytes(28),
                wire.serialize_request(Command.WRITE, 0, 1, 0, 1 << 31),
            ):
                broken = await served.raw()
                broken.send(sent)
                await dropped(served, broken, besides=1)
            await check_unharmed(client)
            await client.close()

    run(main())


def test_one_that_never_reads_its_replies_is_held_back_and_dropped(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(in_flight_bytes=4 * MIB, stalled_s=0.4) as served:
            client, held = await served.client(), 0
            while not held:  # a machine that stands still drops it before it is looked at
                greedy = await served.raw()
                for cookie in range(2000):
                    greedy.request(Command.READ, 0, MIB, cookie)
                looking = asyncio.ensure_future(most_while_connected(served, 1, lambda: served.server.in_flight_bytes))
                await check_unharmed(client)
                held = await looking
                greedy.writer.close()
            assert held <= 5 * MIB
            assert served.server.in_flight_bytes == 0
            await client.close()

    run(main())


def test_one_that_asks_what_blocks_are_and_never_reads_it_is_held_back(run: RunLoop) -> None:
    """A request of 28 bytes has an answer of 32 KiB for each context, and many may be in flight."""

    async def main() -> None:
        async with serving(in_flight_bytes=4 * MIB, stalled_s=0.4) as served:
            for block in range(0, 8192, 2):
                served.volume.contents[block * BLOCK_SIZE] = 1
            client, held = await served.client(), 0
            while not held:  # a machine that stands still drops it before it is looked at
                greedy = await session(
                    served, "structured", "base:allocation", "qemu:allocation-depth", "cairn:hydrated"
                )
                for _ in range(500):
                    greedy.send(Command.BLOCK_STATUS, 0, 0, 8192 * BLOCK_SIZE)
                looking = [
                    asyncio.ensure_future(most_while_connected(served, 1, value))
                    for value in (lambda: served.server.in_flight_bytes, lambda: served.unsent_bytes)
                ]
                await check_unharmed(client)
                held, unsent = await asyncio.gather(*looking)
                greedy.raw.writer.close()
            assert held <= 6 * MIB
            assert unsent <= MIB
            assert served.server.in_flight_bytes == 0
            await client.close()

    run(main())


def test_one_that_stops_within_a_payload_is_dropped(run: RunLoop) -> None:
    async def main() -> None:
        async with serving(stalled_s=0.3) as served:
            client, held = await served.client(), 0
            while not held:  # a machine that stands still drops it before it is looked at
                stuck = await served.raw()
                stuck.send(wire.serialize_request(Command.WRITE, 0, 1, 0, 8 * MIB) + bytes(3 * MIB))
                held = await most_while_connected(served, 1, lambda: served.server.in_flight_bytes)
                await dropped(served, stuck, besides=1)
            assert held == 8 * MIB
            assert served.volume.writes == 0
            await check_unharmed(client)
            await client.close()

    run(main())


def test_clients_that_hoard_all_memory_stop_nobody_for_long(run: RunLoop) -> None:
    """Eight hold the whole total in payloads that they never finish; a large request waits until they are dropped."""

    async def main() -> None:
        async with serving(total_bytes=32 * MIB, stalled_s=1.5) as served:
            hoarders: list[Raw] = []
            while served.server.in_flight_bytes < 32 * MIB:  # or the first were dropped before the last had come
                await until(lambda: served.server.connection_count == 0)
                hoarders = [await served.raw() for _ in range(8)]
                for raw in hoarders:
                    raw.send(wire.serialize_request(Command.WRITE, 0, 1, 0, 4 * MIB) + bytes(MIB))
                await until(lambda: served.server.in_flight_bytes == 32 * MIB or served.server.connection_count < 8)
            client = await served.client()
            await check_unharmed(client)
            await client.write(0, bytes(8 * MIB))
            for raw in hoarders:
                await raw.ended()
            await client.close()

    run(main())


@pytest.mark.parametrize("leaves", ["its replies unread", "altogether"])
def test_one_that_waits_for_memory_and_then_can_not_go_on_lets_the_others_pass(run: RunLoop, leaves: str) -> None:
    async def main() -> None:
        async with serving(total_bytes=48 * MIB) as served:
            served.volume.holding = True
            first, second, greedy = await served.client(), await served.client(), await served.raw()
            large = asyncio.ensure_future(first.read(0, 32 * MIB))
            await until(lambda: served.volume.held_lengths == [32 * MIB])
            greedy.request(Command.READ, 0, 10 * MIB, 1)
            greedy.request(Command.READ, 0, 8 * MIB, 2)
            await until(lambda: served.waiting_count == 1)
            request = asyncio.ensure_future(second.read(0, 2 * MIB))
            await until(lambda: served.waiting_count == 2)
            assert served.volume.held_lengths == [32 * MIB, 10 * MIB]
            if leaves == "altogether":
                greedy.reset()  # which shows only when its turn has come: nobody reads from it
                served.volume.release(0)
            else:
                served.volume.release(1)
            await until(lambda: 2 * MIB in served.volume.held_lengths)
            served.volume.release_all()
            assert (len(await large), len(await request)) == (32 * MIB, 2 * MIB)
            await first.close()
            await second.close()
            if leaves != "altogether":
                greedy.reset()

    run(main())


def test_one_that_is_idle_or_slow_through_no_fault_of_its_own_stays(run: RunLoop) -> None:
    """Idle between requests, and waiting for a volume that takes its time, with a payload half received behind it."""

    async def main() -> None:
        async with serving(stalled_s=0.5, in_flight_requests=1) as served:
            idle, waiting = await served.client(), await served.raw()
            served.volume.holding = True
            waiting.request(Command.READ, 0, 512, 1)
            waiting.send(wire.serialize_request(Command.WRITE, 0, 2, 0, MIB) + bytes(MIB // 2))
            await until(lambda: len(served.volume.held) == 1)
            for _ in range(2):
                stalling = await served.raw()
                stalling.send(wire.serialize_request(Command.WRITE, 0, 1, 0, MIB) + bytes(MIB // 2))
                await stalling.ended()  # by then all were looked at just as often
            served.volume.release_all()
            waiting.send(bytes(MIB // 2))
            assert await waiting.reply(512) == (0, 1)
            assert await waiting.reply() == (0, 2)
            await check_unharmed(idle)
            await idle.close()
            waiting.writer.close()

    run(main())


@pytest.mark.parametrize("sent", [10, 28, 28 + 5000, 28 + MIB - 1])
def test_one_that_disconnects_within_a_write_has_written_nothing(run: RunLoop, sent: int) -> None:
    async def main() -> None:
        async with serving() as served:
            client, gone = await served.client(), await served.raw()
            gone.send((wire.serialize_request(Command.WRITE, 0, 1, 0, MIB) + b"x" * MIB)[:sent])
            await gone.writer.drain()
            gone.reset()
            await until(lambda: served.server.connection_count == 1)
            assert served.server.in_flight_bytes == 0
            assert served.volume.writes == 0
            assert await client.read(0, MIB) == bytes(MIB)
            await client.close()

    run(main())


def test_many_that_come_and_go_in_the_middle_of_everything_leave_nothing(run: RunLoop) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.client()
            before = len(os.listdir(OPEN_FILES))
            for count in range(200):
                gone = await served.raw()
                gone.request(Command.READ, 0, MIB, 1)
                gone.send(
                    wire.serialize_request(Command.WRITE, 0, 2, MIB * count % (60 * MIB), 4 * BLOCK_SIZE) + b"y" * count
                )
                gone.reset()
            await until(lambda: served.server.connection_count == 1)
            await until(lambda: len(os.listdir(OPEN_FILES)) <= before)
            assert served.server.in_flight_bytes == 0
            await check_unharmed(client)
            await client.close()

    run(main())
