"""Fuzzed bytes at the port, for a bounded time: no crash, no leak, bounded memory, others unharmed.

The server is a process of its own, so that its memory and files can be looked at from outside.
What is sent is whole conversations with parts of them changed, cut, doubled and shuffled, so that it
gets deep into the handshake and the transmission phase, and plain noise. In CI it begins with the same
conversations each time, elsewhere with others; a failure prints the command that begins with these again.
"""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from blockstore.units import BLOCK_SIZE, KIB, MIB
from nbd_server import wire
from nbd_server.wire import Command, ContextQuery, InfoQuery, Option
from tests.nbd_client import NbdClient

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"
SEED = int(os.environ.get("NBD_FUZZ_SEED") or (1 if IN_CI else time.time_ns() % 1_000_000))
FUZZ_S = float(os.environ.get("NBD_FUZZ_S", "6"))
FUZZERS = 8
#: The volumes are 64 MiB each; one request at most 32 MiB, and each fuzzer has one connection.
MEMORY_BOUND_BYTES = 2 * 64 * MIB + FUZZERS * 32 * MIB
LIMIT_S = 60.0


# What is sent.


def conversation(chance: random.Random) -> bytes:
    """Bytes of one connection, well-formed to a degree that varies."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(2000))
    parts = [wire.HANDSHAKE_FLAGS.to_bytes(4, "big")]
    parts += [option(chance) for _ in range(chance.randrange(4))]
    agreed = agreement(chance) if chance.random() < 0.5 else b""
    extended = agreed[8:12] == Option.EXTENDED_HEADERS.to_bytes(4, "big")
    parts += [agreed, go() if extended else entry(chance)]
    parts += [request(chance, extended=extended) for _ in range(chance.randrange(30))]
    if chance.random() < 0.2:
        chance.shuffle(parts)
    return spoil(chance, b"".join(parts)) if chance.random() < 0.7 else b"".join(parts)


def option(chance: random.Random) -> bytes:
    number = chance.choice([*Option, 4, 5, 8, 9, 10, 11, 12, 1 << 31])
    noise = chance.randbytes(chance.randrange(100))
    data = chance.choice([b"", info_query(chance), context_query(chance), noise, bytes(10_000)])
    return wire.serialize_option(number, data)


def info_query(chance: random.Random) -> bytes:
    name = chance.choice(["disk", "", "nobody", "x" * 4096])
    return wire.serialize_info_query(InfoQuery(name, tuple(chance.randrange(6) for _ in range(chance.randrange(9)))))


def context_query(chance: random.Random) -> bytes:
    queries = ["base:allocation", "base:", "qemu:allocation-depth", "cairn:dirty:snap-1", "cairn:", "x:y", "bad", ""]
    chosen = tuple(chance.choices(queries, k=chance.randrange(6)))
    return wire.serialize_context_query(ContextQuery(chance.choice(["disk", "nobody"]), chosen))


def agreement(chance: random.Random) -> bytes:
    """Chunks, or extended headers, and contexts: what the longest ways lead through."""
    style = chance.choice([Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
    contexts = wire.serialize_context_query(ContextQuery("disk", ("base:allocation", "cairn:hydrated")))
    return wire.serialize_option(style) + wire.serialize_option(Option.SET_META_CONTEXT, contexts)


def entry(chance: random.Random) -> bytes:
    """What leads to the transmission phase."""
    if chance.random() < 0.5:
        return wire.serialize_option(Option.EXPORT_NAME, b"disk")
    return go()


def go() -> bytes:
    return wire.serialize_option(Option.GO, wire.serialize_info_query(InfoQuery("disk", (3,))))


def request(chance: random.Random, *, extended: bool = False) -> bytes:
    """Anything, at odd places; seldom a DISC."""
    command = chance.choice([*([0, 1, 3, 4, 5, 6, 7] * 5), Command.DISC, 8, 999])
    edge = chance.choice([0, MIB, 63 * MIB, 64 * MIB, 1 << 63, (1 << 64) - 1])
    offset = max(0, min(edge + chance.randrange(-5000, 5000), (1 << 64) - 1))
    length = chance.choice([0, 1, 511, 4096, 5000, 70_000, MIB, 32 * MIB, 32 * MIB + 1, (1 << 32) - 1])
    payload = b""
    if command == Command.WRITE:
        payload = bytes(min(length, 70_000))  # of a longer one the rest is missing: what follows becomes payload
    flags = chance.choice([0, 0, 1, 2, 3, 4, 8, 16, 32, 33, 65535])
    if not extended:
        return wire.serialize_request(command, flags, 5, offset, length) + payload
    if command == Command.BLOCK_STATUS and chance.random() < 0.5:
        flags = 32
        filtered = length.to_bytes(8, "big") + bytes(3) + bytes([chance.randrange(4)])
        payload = chance.choice([filtered, chance.randbytes(chance.randrange(20))])
    if command == Command.WRITE:
        flags |= 32
    return wire.serialize_extended_request(command, flags, 5, offset, len(payload) or length) + payload


def spoil(chance: random.Random, data: bytes) -> bytes:
    """Change a little: cut it, put noise in, take something out, change a byte."""
    spoiled = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(spoiled)) if spoiled else 0
        match chance.randrange(4):
            case 0:
                spoiled = spoiled[:at]
            case 1:
                spoiled[at:at] = chance.randbytes(chance.randrange(1, 60))
            case 2:
                del spoiled[at : at + chance.randrange(1, 60)]
            case 3:
                spoiled[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(spoiled)


# Who sends it.


async def fuzz(port: int, seed: int, until_s: float) -> int:
    """Conversations one after the other, read from or not, ended in one way or another; how many."""
    chance, count = random.Random(seed), 0
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        count += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(conversation(chance))
            if chance.random() < 0.7:
                await asyncio.wait_for(reader.read(chance.choice([1, 100_000])), 0.05)
        except (TimeoutError, ConnectionError):
            pass  # the server says nothing to much of this, and ends the rest
        finally:
            if chance.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()
    return count


async def work(port: int, until_s: float) -> tuple[int, float]:
    """A client with manners: what it writes it reads back. How many times, and the longest that one took."""
    client = await NbdClient.connect(f"nbd://127.0.0.1:{port}/other")
    loop, chance, count, longest_s = asyncio.get_running_loop(), random.Random(0), 0, 0.0
    while not count or loop.time() < until_s:
        began_s = loop.time()
        offset, data = chance.randrange(MIB - 64 * KIB), chance.randbytes(chance.choice([1, BLOCK_SIZE, 40_000]))
        await client.write(offset, data)
        assert await client.read(offset, len(data)) == data
        count, longest_s = count + 1, max(longest_s, loop.time() - began_s)
    await client.close()
    return count, longest_s


async def watch(server: psutil.Process, until_s: float) -> int:
    """The most memory that the server has had, in bytes."""
    most = 0
    while asyncio.get_running_loop().time() < until_s:
        most = max(most, server.memory_info().rss)
        await asyncio.sleep(0.05)
    return most


@contextmanager
def serving(log: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and port; it must still be there in the end, and end by itself with status 0."""
    command = [sys.executable, "-m", "tests.memory_nbd", "--size", "64M", "--tcp", "127.0.0.1:0"]
    command += ["--export", "disk", "--export", "other"]
    with log.open("w") as errors:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert server.stdout is not None
    try:
        yield server, int(server.stdout.readline().rpartition(":")[2])
        server.terminate()
        assert server.wait(LIMIT_S) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


async def fuzz_side_by_side(port: int, process: psutil.Process) -> None:
    """All of it at once, again where a machine is too slow; raises where anything is not as it should be."""
    before_bytes, before_files = process.memory_info().rss, process.num_fds()
    conversations = rounds = 0
    while conversations <= 50 or rounds <= 5:
        until_s = asyncio.get_running_loop().time() + FUZZ_S
        async with asyncio.TaskGroup() as group:
            seeds = range(SEED + conversations, SEED + conversations + FUZZERS)
            fuzzers = [group.create_task(fuzz(port, seed, until_s)) for seed in seeds]
            worker = group.create_task(work(port, until_s))
            watcher = group.create_task(watch(process, until_s))
        (worked, longest_s), more_bytes = worker.result(), watcher.result() - before_bytes
        conversations, rounds = conversations + sum(each.result() for each in fuzzers), rounds + worked
        print(f"{conversations} conversations, {rounds} rounds, longest {longest_s:.3f} s, +{more_bytes >> 20} MiB")
        assert longest_s < LIMIT_S / 2
        assert more_bytes < MEMORY_BOUND_BYTES
    async with asyncio.timeout(LIMIT_S):
        while process.num_fds() > before_files:  # noqa: ASYNC110 - of another process, which tells nobody
            await asyncio.sleep(0.05)
    assert (await work(port, 0.0))[0] == 1


def test_fuzzed_bytes_harm_nobody(tmp_path: Path) -> None:
    print(f"again with: NBD_FUZZ_SEED={SEED} NBD_FUZZ_S={FUZZ_S:g} pytest {Path(__file__).relative_to(ROOT)}")
    with serving(tmp_path / "log") as (server, port):
        asyncio.run(fuzz_side_by_side(port, psutil.Process(server.pid)))
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log[-3000:]
    assert "Error" not in log, log[-3000:]


def test_the_fuzzer_gets_everywhere() -> None:
    """Conversations that stay outside would prove little: most reach the transmission phase."""
    chance = random.Random(1)
    magics = [magic.to_bytes(4, "big") for magic in (wire.REQUEST_MAGIC, wire.EXTENDED_REQUEST_MAGIC)]
    reached = [any(magic in sent for magic in magics) for sent in (conversation(chance) for _ in range(300))]
    assert sum(reached) > 200
