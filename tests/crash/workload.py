"""Clients that read, write, trim and zero at random while servers die under them.

    with Workload(uri_now, sectors) as load:    # runs in a thread of its own
        load.wait_progress(500)                 # acknowledged requests from here on
        ...kill something...
    load.verify(uri)                            # every sector, once all is quiet

Each client has a share of the sectors for itself and one request in flight on it; together they keep
several in flight. A connection that ends is opened again, at the URI that `uri_now` then gives, until
the block ends. Every read is judged by the client's model; the first wrong one ends the load and is
raised in the test's thread.
"""

import asyncio
import errno
import random
from collections.abc import Callable
from typing import Final

from tests.background_load import BackgroundLoad, think
from tests.crash.model import SECTOR_SIZE, ZERO, Model
from tests.nbd_client import Disconnected, NbdClient, NbdError

_RECONNECT_S: Final = 0.1
_PROGRESS_LIMIT_S: Final = 90.0
_VERIFY_SECTORS: Final = 2048
_MOST_SECTORS: Final = 64
#: Of 20 requests: how many of each kind, ends summed up.
_READS, _TRIMS, _ZEROES = 6, 8, 10


class Workload(BackgroundLoad):
    """clients: how many, each with its share of `sectors`. tolerated: errors (errno) that a request may end with.

    think_s: on average, between two requests of a client.
    """

    def __init__(
        self,
        uri_now: Callable[[], str],
        sectors: range,
        *,
        clients: int = 8,
        seed: int = 1,
        tolerated: frozenset[int] = frozenset(),
        think_s: float = 0.0,
    ) -> None:
        super().__init__("workload")
        share = len(sectors) // clients
        self._models = [Model(sectors[at * share], share) for at in range(clients)]
        self._random = random.Random(seed)
        self._uri_now = uri_now
        self._tolerated = tolerated
        self._think_s = think_s
        self.acknowledged = 0
        self.errors: dict[int, int] = {}

    def wait_progress(self, count: int) -> None:
        """Wait until `count` more requests were acknowledged. Raises what ended the load, and TimeoutError."""
        goal = self.acknowledged + count
        self._wait_for(f"{count} acknowledged requests", lambda: self.acknowledged >= goal, _PROGRESS_LIMIT_S)

    def verify(self, uri: str) -> None:
        """Read every sector and judge it. Raises Wrong."""
        asyncio.run(self._verify(uri))

    def _work(self) -> None:
        asyncio.run(self._run_all())

    async def _run_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for model in self._models:
                group.create_task(self._client(model, random.Random(self._random.random())))

    async def _client(self, model: Model, chance: random.Random) -> None:
        while not self._stopping:
            try:
                client = await NbdClient.connect(self._uri_now())
            except (Disconnected, NbdError):
                await asyncio.sleep(_RECONNECT_S)  # nobody there, or the export not served yet
                continue
            try:
                await self._requests(client, model, chance)
            except Disconnected:
                continue
            finally:
                await client.close()

    async def _requests(self, client: NbdClient, model: Model, chance: random.Random) -> None:
        while not self._stopping:
            try:
                await self._request(client, model, chance)
                self.acknowledged += 1
                await think(chance, self._think_s)
            except NbdError as error:
                number = error.errno or 0
                if number not in self._tolerated:
                    raise AssertionError(f"a request failed: {error}") from error
                self.errors[number] = self.errors.get(number, 0) + 1
                await asyncio.sleep(_RECONNECT_S)

    async def _request(self, client: NbdClient, model: Model, chance: random.Random) -> None:
        count = chance.randint(1, _MOST_SECTORS)
        sector = model.first + chance.randrange(model.count - count)
        offset, length = sector * SECTOR_SIZE, count * SECTOR_SIZE
        kind = chance.randrange(20)
        if kind < _READS:
            model.check(sector, await client.read(offset, length))
            return
        version = model.next_version() if kind >= _ZEROES else ZERO
        try:
            if kind < _TRIMS:
                await client.trim(offset, length)
            elif kind < _ZEROES:
                await client.write_zeroes(offset, length, no_hole=kind % 2 == 0)
            else:
                await client.write(offset, model.content(version, sector, count))
        except (Disconnected, NbdError):
            model.unknown(version, sector, count)
            raise
        if kind < _TRIMS:
            model.trimmed(sector, count)
        else:
            model.acknowledged(version, sector, count)

    async def _verify(self, uri: str) -> None:
        client = await NbdClient.connect(uri)
        for model in self._models:
            for sector in range(model.first, model.first + model.count, _VERIFY_SECTORS):
                count = min(_VERIFY_SECTORS, model.first + model.count - sector)
                model.check(sector, await client.read(sector * SECTOR_SIZE, count * SECTOR_SIZE))
        await client.close()


#: A full disk, told to the guest.
NO_SPACE: Final = frozenset({errno.ENOSPC})
