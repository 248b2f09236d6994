"""Clients that read and write a few hot blocks over several connections, and remember when they did.

    history = History(first_block=0, blocks=16)
    with RegisterLoad(history, uri_now) as load:     # runs in a thread of its own
        load.wait_progress(500)                      # answered requests from here on
        ...a fault...
    history.check(uri)                               # every block is linearizable, to the last read

Many requests are under way on each block at once, from connections that know nothing of each other. A connection that
ends is opened again, at the URI that `uri_now` then gives; what was in flight on it has an unknown outcome, as has a
write that was answered with an error. Connections have different roles, so that a front-end that was cut off and its
successor both have clients.
"""

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import Final

from blockstore.units import BLOCK_SIZE
from tests.background_load import BackgroundLoad, think
from tests.faults.linearizable import INITIAL, UNKNOWN, NotLinearizable, Request, check_register
from tests.nbd_client import Disconnected, NbdClient, NbdError

_STAMP: Final = struct.Struct("<QQ")
_RECONNECT_S: Final = 0.05
_PROGRESS_LIMIT_S: Final = 90.0
_CHECK_LIMIT_S: Final = 60.0
_MOST_BLOCKS: Final = 3
_WRITES_SHARE: Final = 0.5


class Role(Enum):
    """What a connection does where an answer does not come."""

    PATIENT = "waits"
    IMPATIENT = "goes where the volume is served now"
    FAITHFUL = "only reads, and reads something else: it stays where it is, and may be shown what is old"


_PATIENCE_S: Final = {Role.IMPATIENT: 1.0, Role.FAITHFUL: 0.2}


def content_of(value: int, block: int) -> bytes:
    """One block: its value and its own number, over and over; zeroes for the value of the beginning."""
    return bytes(BLOCK_SIZE) if value == INITIAL else _STAMP.pack(value, block) * (BLOCK_SIZE // _STAMP.size)


def value_of(data: bytes, block: int) -> int:
    """Raises NotLinearizable where it is not one whole write to this block."""
    value, _ = _STAMP.unpack_from(data)
    if data != content_of(value, block):
        raise NotLinearizable(f"block {block} shows no write as a whole, but {data[:16].hex()}...")
    return int(value)


class History:
    """What is known of the blocks from `first_block` on. checked: requests that were judged."""

    def __init__(self, first_block: int, blocks: int) -> None:
        self.blocks = range(first_block, first_block + blocks)
        self.checked = 0
        self.unknown = 0
        self._initial = dict.fromkeys(self.blocks, INITIAL)
        self._requests: dict[int, list[Request]] = {block: [] for block in self.blocks}
        self._last_value = INITIAL

    def next_value(self) -> int:
        self._last_value += 1
        return self._last_value

    def add(self, request: Request, block: int) -> None:
        self._requests[block].append(request)

    def check(self, uri: str) -> None:
        """Read all blocks, once all is quiet, and judge each. Raises NotLinearizable, with the block.

        What was read last is where the next requests begin; a write of unknown outcome may still come.
        """
        now = asyncio.run(asyncio.wait_for(self._read_all(uri), _CHECK_LIMIT_S))
        for block, requests in self._requests.items():
            try:
                check_register(requests, self._initial[block])
            except NotLinearizable as error:
                raise NotLinearizable(f"block {block}: {error}") from error
            self.checked += len(requests)
            pending = [each for each in requests if each.answered == UNKNOWN and each.value != now[block]]
            self._requests[block] = pending
        self._initial = now

    async def _read_all(self, uri: str) -> dict[int, int]:
        client = await NbdClient.connect(uri)
        shown = {}
        for block in self.blocks:
            sent = time.monotonic_ns()
            shown[block] = value_of(await client.read(block * BLOCK_SIZE, BLOCK_SIZE), block)
            self.add(Request(False, shown[block], sent, time.monotonic_ns()), block)
        await client.close()
        return shown


class Service:
    """How long guests were kept waiting. longest_gap_s: without any answer; slowest_s: the slowest answered request."""

    def __init__(self) -> None:
        self.longest_gap_s = self.slowest_s = 0.0
        self._last = time.monotonic()

    def answered(self, sent_s: float) -> None:
        """A request was answered just now."""
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self.slowest_s = max(self.slowest_s, now - sent_s)
        self._last = now


class RegisterLoad(BackgroundLoad):
    """connections, depth: how many, and how many requests each has under way. think_s: on average, between two of them.

    service: of the time since `watch` was called last. errors: answers that were errors, by errno.
    """

    def __init__(
        self,
        history: History,
        uri_now: Callable[[], str],
        *,
        connections: int = 5,
        depth: int = 2,
        seed: int = 1,
        think_s: float = 0.0,
    ) -> None:
        super().__init__("registers")
        self._history = history
        self._uri_now = uri_now
        self._connections, self._depth = connections, depth
        self._think_s = think_s
        self._random = random.Random(seed)
        self.answered = 0
        self.errors: Counter[int] = Counter()
        self.service = Service()

    def watch(self) -> Service:
        """Measure service anew from here on."""
        self.service = Service()
        return self.service

    def wait_progress(self, count: int, limit_s: float = _PROGRESS_LIMIT_S) -> None:
        """Wait until `count` more requests were answered. Raises what ended the load, and TimeoutError."""
        goal = self.answered + count
        self._wait_for(f"{count} answered requests", lambda: self.answered >= goal, limit_s)

    def _work(self) -> None:
        asyncio.run(self._run_all())

    async def _run_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._connections):
                role = list(Role)[number % len(Role)]
                group.create_task(self._connection(random.Random(self._random.random()), role))

    async def _connection(self, chance: random.Random, role: Role) -> None:
        while not self._stopping:
            try:
                client = await NbdClient.connect(self._uri_now())
            except (Disconnected, NbdError):
                await asyncio.sleep(_RECONNECT_S)  # nobody there, or the export not served yet
                continue
            await asyncio.gather(*(self._requests(client, chance, role) for _ in range(self._depth)))
            await client.close()

    async def _requests(self, client: NbdClient, chance: random.Random, role: Role) -> None:
        """Until the connection ends, answers with an error, or takes too long."""
        while not self._stopping:
            try:
                async with asyncio.timeout(_PATIENCE_S.get(role)):
                    await self._request(client, chance, 0.0 if role is Role.FAITHFUL else _WRITES_SHARE)
                await think(chance, self._think_s)
            except Disconnected:
                return
            except TimeoutError:
                if role is not Role.FAITHFUL:
                    return
            except NbdError as error:
                self.errors[error.errno or 0] += 1
                await asyncio.sleep(_RECONNECT_S)
                return

    async def _request(self, client: NbdClient, chance: random.Random, writes_share: float) -> None:
        count = chance.randint(1, _MOST_BLOCKS)
        first = chance.choice(self._history.blocks[: len(self._history.blocks) - count + 1])
        blocks = range(first, first + count)
        sent = time.monotonic_ns()
        if chance.random() < writes_share:
            await self._write(client, blocks, sent)
        else:
            data = await client.read(first * BLOCK_SIZE, count * BLOCK_SIZE)
            answered = time.monotonic_ns()
            for at, block in enumerate(blocks):
                value = value_of(data[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE], block)
                self._history.add(Request(False, value, sent, answered), block)
        self.answered += 1
        self.service.answered(sent / 1e9)

    async def _write(self, client: NbdClient, blocks: range, sent: int) -> None:
        value = self._history.next_value()
        answered: float = UNKNOWN
        try:
            await client.write(blocks[0] * BLOCK_SIZE, b"".join(content_of(value, block) for block in blocks))
            answered = time.monotonic_ns()
        finally:
            self._history.unknown += answered == UNKNOWN
            for block in blocks:
                self._history.add(Request(True, value, sent, answered), block)
