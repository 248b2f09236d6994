"""A range of etcd's keys, held in memory as it was at one revision, and followed from there by a watch.

Invariants: `items` is exactly what the range held at `revision`; every change after that is told to `changed_to`
once, in order, whole transactions at a time, however often the connection breaks. Where etcd has compacted what
came next, the range is read anew, and `began_anew` is told instead: what changed between is not known.

A mirror may lag. Who needs what stands now asks etcd for a revision first, and waits for the mirror to reach it.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Final

import structlog

from blockstore.control.metastore.etcd_client import LIMIT_S, EtcdClient
from blockstore.control.metastore.interface import Compacted
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.rpc import etcd_pb2 as pb

_log = structlog.get_logger(__name__)

#: After which silence of a watch that should have told something another one is opened.
_SILENCE_S: Final = 2.0
#: Between two tries to open a watch.
_PAUSE_S: Final = 0.2


class Mirror:
    """The keys from `start` to `end`, exclusive. `load` first, then keep `run` running.

    changed_to: told each later revision and its events. began_anew: told the revision that the range was read at.
    """

    def __init__(
        self,
        client: EtcdClient,
        start: bytes,
        end: bytes,
        changed_to: Callable[[int, Sequence[pb.Event]], None] = lambda revision, events: None,
        began_anew: Callable[[int], None] = lambda revision: None,
    ) -> None:
        self._client = client
        self._start = start
        self._end = end
        self._changed_to = changed_to
        self._began_anew = began_anew
        self._items: dict[bytes, pb.KeyValue] = {}
        self._changed = asyncio.Event()
        self._stale = asyncio.Event()
        self._failure: CairnError | None = None
        self.revision = 0

    @property
    def items(self) -> Mapping[bytes, pb.KeyValue]:
        return self._items

    async def load(self) -> None:
        """Read the range anew. Raises what the client raises."""
        while True:
            # Compacted: so much has changed since the first page that its revision is gone.
            with suppress(Compacted):
                self.revision, found = await self._client.read_all(self._start, self._end)
                break
        self._items = {each.key: each for each in found}
        self._began_anew(self.revision)
        self._tell()

    async def run(self) -> None:
        """Follow, until cancelled. Ends only by an error that trying again does not mend."""
        try:
            while True:
                await self._follow_or_pause()
        except CairnError as error:
            self._failure = error
            self._tell()
            raise

    async def at_least(self, revision: int) -> None:
        """Until the mirror shows that revision of its range. Raises QuorumUnavailable after LIMIT_S seconds."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + LIMIT_S
        while self.revision < revision:
            if not await self.next_change(_SILENCE_S):
                self._stale.set()
                if loop.time() > give_up_at:
                    raise QuorumUnavailable(
                        f"the etcd at {self._client.address} has not told of revision {revision} for {LIMIT_S:g} s: "
                        "is one of its members cut off?"
                    )

    async def check(self) -> None:
        """Compare with what etcd holds; where that differs, open another watch. Raises what the client raises.

        For who waits for a change that may be long in coming: a watch can fall silent without a word.
        """
        _, found = await self._client.read_all(self._start, self._end)
        if {each.key: each.mod_revision for each in found} != {
            each.key: each.mod_revision for each in self._items.values()
        }:
            self._stale.set()

    async def next_change(self, timeout_s: float | None = None) -> bool:
        """Until something is new, True; or False after that time. Raises what ended `run`."""
        if self._failure is not None:
            raise self._failure
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        if self._failure is not None:
            raise self._failure
        return changed.is_set()

    async def _follow_or_pause(self) -> None:
        try:
            await self._follow()
        except Compacted:
            _log.info("etcd has compacted what came next; reading anew", revision=self.revision)
            with suppress(QuorumUnavailable):
                await self.load()
        except QuorumUnavailable as error:
            _log.info("a watch of etcd has ended; opening another", error=str(error))
        await asyncio.sleep(_PAUSE_S)

    async def _follow(self) -> None:
        """Until the stream breaks, or somebody has found that it should have told something. Raises Compacted."""
        self._stale.clear()
        watching = asyncio.ensure_future(self._take_in_all())
        stale = asyncio.ensure_future(self._stale.wait())
        try:
            await asyncio.wait([watching, stale], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            for each in (watching, stale):
                each.cancel()
            await asyncio.gather(watching, stale, return_exceptions=True)

    async def _take_in_all(self) -> None:
        async for response in self._client.watch(self._start, self._end, self.revision + 1):
            # etcd never splits a revision over two responses.
            for revision, events in groupby(response.events, lambda event: event.kv.mod_revision):
                self._take_in(revision, list(events))
            self._tell()

    def _take_in(self, revision: int, events: Sequence[pb.Event]) -> None:
        assert revision > self.revision, f"etcd told revision {revision} after {self.revision}"
        for event in events:
            if event.type == pb.Event.DELETE:
                self._items.pop(event.kv.key, None)
            else:
                self._items[event.kv.key] = event.kv
        self.revision = revision
        self._changed_to(revision, events)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
