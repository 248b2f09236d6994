"""Streams of messages: whole and in order however the network cuts them, bounded, held back, ended with a reason."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from blockstore.config import split_address
from blockstore.errors import CairnError, Conflict, Fenced, InvalidRequest, QuorumUnavailable
from blockstore.message_stream import MAX_MESSAGE_BYTES, Message, MessageServer, MessageStream, OnMessage, connect
from blockstore.units import KIB, MIB
from tests.loopback import free_address
from tests.stack import until

LIMIT_S = 60.0


class Server:
    """Takes streams whose greeting is `hello`; what it does with a message is `take`."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.streams: list[MessageStream] = []
        self.take: OnMessage = lambda message: self.received.append(bytes(message))
        self.server = MessageServer(self._accept)

    def _accept(self, stream: MessageStream, greeting: bytes) -> OnMessage:
        if greeting != b"hello":
            raise InvalidRequest(f"not {greeting!r}")
        self.streams.append(stream)
        return self.take


class Client:
    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.ended: asyncio.Future[CairnError] = asyncio.get_running_loop().create_future()

    async def connect(self, port: int, greeting: bytes = b"hello") -> MessageStream:
        return await connect(
            "127.0.0.1", port, greeting, lambda message: self.received.append(bytes(message)), self.ended.set_result
        )


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    await server.server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        server.server.stop()


def run(scenario: Callable[[Server], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S), serving() as server:
            await scenario(server)

    asyncio.run(limited())


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


SIZES = [0, 1, 3, 4, 5, 4096, 64 * KIB - 4, 64 * KIB, 64 * KIB + 1, 128 * KIB - 4, 128 * KIB, MIB, MAX_MESSAGE_BYTES]


@pytest.mark.parametrize("seed", range(6))
def test_messages_arrive_whole_and_in_order_however_they_are_cut(seed: int) -> None:
    """Also where a length is cut in the middle, and where several sizes share a packet."""
    chance = random.Random(seed)
    messages = [chance.randbytes(chance.choice(SIZES[:-2] * 3 + SIZES)) for _ in range(60)]
    sent = framed(b"hello") + b"".join(map(framed, messages))

    async def scenario(server: Server) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        at = 0
        while at < len(sent):
            step = chance.choice((1, 2, 3, 5, 100, 4096, 131_071, 131_072, 300_000, len(sent)))
            writer.write(sent[at : at + step])
            await writer.drain()
            if step < 10:
                await asyncio.sleep(0)
            at += step
        await until(lambda: len(server.received) == len(messages), "it has arrived")
        assert server.received == messages
        writer.close()

    run(scenario)


def test_both_sides_send_in_parts() -> None:
    async def scenario(server: Server) -> None:
        server.take = lambda message: server.streams[0].send(b"re: ", memoryview(message))
        client = Client()
        stream = await client.connect(server.server.port)
        stream.send(b"a", b"", memoryview(b"bc"))
        stream.send(b"d" * MIB, b"e" * MIB)
        await until(lambda: len(client.received) == 2, "it has arrived")
        assert client.received == [b"re: abc", b"re: " + b"d" * MIB + b"e" * MIB]
        stream.close()
        assert isinstance(await client.ended, QuorumUnavailable)

    run(scenario)


def test_nothing_is_taken_while_a_message_is_waited_for() -> None:
    async def scenario(server: Server) -> None:
        room = asyncio.Event()

        def take(message: Message) -> Awaitable[Any] | None:
            server.received.append(bytes(message))
            return room.wait() if message == b"wait" else None

        server.take = take
        stream = await Client().connect(server.server.port)
        for message in (b"before", b"wait", b"behind", b"x" * MIB, b"last"):
            stream.send(message)
        await until(lambda: len(server.received) == 2, "it has arrived")
        # What the sender cannot get rid of it knows: the receiver's buffers are bounded.
        while stream.writable:
            stream.send(bytes(MIB))
            await asyncio.sleep(0)
        assert server.received == [b"before", b"wait"]
        room.set()
        await stream.drained()
        await until(lambda: len(server.received) > 5, "it has arrived")
        assert server.received[2:5] == [b"behind", b"x" * MIB, b"last"]
        stream.close()

    run(scenario)


def test_an_error_is_told_to_the_other_side_as_its_class() -> None:
    async def scenario(server: Server) -> None:
        def take(message: Message) -> None:
            raise Fenced("epoch 7 was sealed")

        server.take = take
        client = Client()
        stream = await client.connect(server.server.port)
        stream.send(b"something")
        error = await client.ended
        assert isinstance(error, Fenced)
        assert str(error) == "epoch 7 was sealed"
        stream.send(b"goes nowhere")

    run(scenario)


def test_an_error_of_what_was_waited_for_is_told_as_well() -> None:
    async def fail() -> None:
        raise Conflict("no room, ever")

    async def scenario(server: Server) -> None:
        server.take = lambda message: fail()
        client = Client()
        (await client.connect(server.server.port)).send(b"something")
        assert isinstance(await client.ended, Conflict)

    run(scenario)


def test_what_nobody_foresaw_is_an_error_and_no_silence() -> None:
    def take(message: Message) -> None:
        raise ZeroDivisionError("oops")

    async def scenario(server: Server) -> None:
        server.take = take
        client = Client()
        (await client.connect(server.server.port)).send(b"something")
        assert "ZeroDivisionError" in str(await client.ended)

    run(scenario)


@pytest.mark.parametrize(
    "sent",
    [
        framed(b"GET / HTTP/1.1"),
        b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n",
        framed(b"hello") + struct.pack("<I", MAX_MESSAGE_BYTES + 1),
        struct.pack("<I", (1 << 31) - 1),
        struct.pack("<I", 1 << 31),
        struct.pack("<I", (1 << 31) + 2) + b"xy",
        struct.pack("<I", (1 << 31) + 6) + b"\xff\xff\xff\xff\xff\xfe",
    ],
)
def test_garbage_ends_the_stream_and_takes_no_memory(sent: bytes) -> None:
    async def scenario(server: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(sent)
        with suppress(ConnectionError):
            await reader.read()
        assert not server.received
        stream = await Client().connect(server.server.port)
        stream.send(b"others go on")
        await until(lambda: bool(server.received), "it has arrived")
        stream.close()
        writer.close()

    run(scenario)


def test_random_bytes_never_do_anything_else() -> None:
    async def scenario(server: Server) -> None:
        for seed in range(100):
            chance = random.Random(seed)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
            writer.write(framed(b"hello") * (seed % 2) + chance.randbytes(chance.randrange(1, 400)))
            writer.write_eof()
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
        assert server.server.port

    run(scenario)


def test_a_peer_that_vanishes_ends_the_stream() -> None:
    async def scenario(server: Server) -> None:
        client = Client()
        await client.connect(server.server.port)
        await until(lambda: bool(server.streams), "it has arrived")
        connection = server.streams[0]._transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5_000
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        server.streams[0]._transport.abort()  # type: ignore[union-attr]
        assert isinstance(await client.ended, QuorumUnavailable)

    run(scenario)


def test_where_nobody_listens_is_said() -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(Conflict, match="choose another port"):
            await MessageServer(server._accept).start("127.0.0.1", server.server.port)
        host, port = split_address(free_address())
        with pytest.raises(QuorumUnavailable, match=str(port)):
            await connect(host, port, b"hello", lambda _: None, lambda _: None)

    run(scenario)


def test_who_takes_no_greeting_is_no_way() -> None:
    """As a proxy does whose other side is not there, or a server of something else."""

    async def connect_to(answer: Callable[[asyncio.StreamWriter], None], limit_s: float = LIMIT_S) -> CairnError | None:
        client, writers = Client(), []

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            answer(writer)

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            async with asyncio.timeout(limit_s):
                await client.connect(listener.sockets[0].getsockname()[1])
        except CairnError as error:
            return error
        except TimeoutError:
            return None
        finally:
            listener.close()
            for writer in writers:
                writer.close()
        raise AssertionError("it was taken")

    async def scenario(server: Server) -> None:
        assert await connect_to(lambda _: None, 0.5) is None
        assert isinstance(await connect_to(lambda writer: writer.close()), QuorumUnavailable)
        assert isinstance(await connect_to(lambda writer: writer.write(framed(b"NBD?"))), InvalidRequest)
        with pytest.raises(InvalidRequest, match="not b'hi'"):
            await Client().connect(server.server.port, b"hi")

    run(scenario)
