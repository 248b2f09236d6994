"""Stopping control: at its n-th step to the outside nothing goes on any more, as if it was killed.

A step is a transaction of the metastore or a call to a peer, before it and after it was answered.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, TypeVar

from blockstore.config import ControlSettings
from blockstore.control.metastore.interface import Metastore, Revision
from blockstore.control.peers import Peers
from blockstore.rpc import control_pb2

Answer = TypeVar("Answer")


class CrashPoints:
    """Counts control's steps to the outside; at number `stop_at` nothing goes on any more."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.passed = 0
        self.stopped = asyncio.Event()

    async def step(self) -> None:
        """One step is about to be made, or was just made."""
        self.passed += 1
        if self.stopped.is_set() or self.passed == self.stop_at:
            self.stopped.set()
            await asyncio.Event().wait()


class CrashingStore:
    """A metastore that may stop before and after each transaction."""

    def __init__(self, store: Metastore, points: CrashPoints) -> None:
        self._store = store
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def transact(
        self, conditions: Mapping[str, Revision], puts: Mapping[str, bytes] | None = None, deletes: Iterable[str] = ()
    ) -> Revision | None:
        await self._points.step()
        revision = await self._store.transact(conditions, puts, deletes)
        await self._points.step()
        return revision


class CrashingPeers(Peers):
    """Calls that may stop before they leave, and after they were answered."""

    def __init__(self, settings: ControlSettings, points: CrashPoints) -> None:
        super().__init__(settings)
        self._points = points

    async def create(self, *arguments: Any, **named: Any) -> None:
        await self._between(super().create(*arguments, **named))

    async def delete(self, *arguments: Any) -> None:
        await self._between(super().delete(*arguments))

    async def open_volume(self, *arguments: Any) -> None:
        await self._between(super().open_volume(*arguments))

    async def close_volume(self, *arguments: Any) -> bool:
        return await self._between(super().close_volume(*arguments))

    async def hold_writes(self, *arguments: Any) -> None:
        await self._between(super().hold_writes(*arguments))

    async def release_writes(self, *arguments: Any) -> bool:
        return await self._between(super().release_writes(*arguments))

    async def seal_volume(self, *arguments: Any, **named: Any) -> control_pb2.SealVolumeResponse:
        return await self._between(super().seal_volume(*arguments, **named))

    async def unpin_generations(self, *arguments: Any) -> None:
        await self._between(super().unpin_generations(*arguments))

    async def _between(self, call: Awaitable[Answer]) -> Answer:
        try:
            await self._points.step()
            answer = await call
            await self._points.step()
            return answer
        finally:
            if asyncio.iscoroutine(call):
                call.close()
