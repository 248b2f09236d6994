"""One try of a barrier over several volumes or segments: hold at all, seal at all, release at all.

Invariants (design, section 3, rule 8): releases are sent whatever failed; it succeeded only if every front-end says
that it held without a break. What a guest feels is the time from its hold to its release, which the limit bounds, so
a try that takes longer has failed, and says where the time went.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from blockstore.control.peers import Peers
from blockstore.control.records import FrontEnd
from blockstore.control.snapshot_records import Snapshot
from blockstore.domain import VolumeId
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.rpc.control_pb2 import SealVolumeResponse
from blockstore.units import Epoch

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Part:
    """One snapshot of a barrier, and where its volume is served."""

    snapshot: Snapshot
    front_end: FrontEnd
    volume: VolumeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one try. answers: of each part; pause_us: from the first hold to the last release; error: why it failed."""

    answers: Sequence[SealVolumeResponse]
    pause_us: int
    error: CairnError | None = None


class Barrier:
    """name: of this try alone; a front-end never begins one a second time."""

    def __init__(self, peers: Peers, parts: Sequence[Part], name: str, hold_limit_s: float) -> None:
        self._peers = peers
        self._parts = parts
        self._name = name
        self._hold_limit_s = hold_limit_s
        self._slowest = (0.0, "nothing was done")

    async def attempt(self, seal: Callable[[Part], Awaitable[SealVolumeResponse]]) -> Outcome:
        """Once. What is no CairnError is raised."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        answers: list[SealVolumeResponse] = []
        _, error = await self._all("holding writes of", self._hold)
        if error is None:
            answers, error = await self._all("sealing", seal)
        held, not_released = await self._all("releasing", self._release)
        pause_us = int((loop.time() - began) * 1e6)
        error = error or not_released or self._broken(held)
        return Outcome(answers, pause_us, type(error)(f"{error} ({self._told()})") if error else None)

    async def release(self) -> CairnError | None:
        """Whoever holds for this try does so no more; the first error."""
        _, error = await self._all("releasing", self._release)
        return error

    def _broken(self, held: Sequence[bool]) -> CairnError | None:
        for part, kept in zip(self._parts, held, strict=True):
            if not kept:
                return QuorumUnavailable(f"writes of volume {part.volume} went on before all volumes were sealed")
        return None

    def _told(self) -> str:
        took_s, what = self._slowest
        return f"writes are held for at most {self._hold_limit_s:g} s, and {what} took {took_s:.1f} s"

    async def _hold(self, part: Part) -> None:
        await self._peers.hold_writes(part.front_end, part.volume, part.epoch, self._name, self._hold_limit_s)

    async def _release(self, part: Part) -> bool:
        return await self._peers.release_writes(part.front_end, part.volume, part.epoch, self._name)

    async def _all(
        self, doing: str, call: Callable[[Part], Awaitable[Result]]
    ) -> tuple[list[Result], CairnError | None]:
        return await all_of(self._timed(doing, part, call) for part in self._parts)

    async def _timed(self, doing: str, part: Part, call: Callable[[Part], Awaitable[Result]]) -> Result:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await call(part)
        finally:
            what = f"{doing} volume {part.volume} at front-end {part.front_end.id}"
            self._slowest = max(self._slowest, (loop.time() - began, what))


async def all_of(calls: Iterable[Awaitable[Result]]) -> tuple[list[Result], CairnError | None]:
    """All results, or the first error once every call has ended. What is no CairnError is raised."""
    outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, CairnError):
            raise outcome
    first = next((outcome for outcome in outcomes if isinstance(outcome, CairnError)), None)
    return ([] if first else outcomes), first
