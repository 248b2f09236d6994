"""What a front-end does for snapshots, in memory: volumes are layers of counted writes.

The layers belong to the volumes, as if nodes kept them, so they outlive front-ends and control.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockstore.errors import CairnError, Conflict, NotFound
from blockstore.rpc import control_pb2
from blockstore.rpc.replica_pb2 import Position


@dataclass
class Layers:
    """One volume's content. writes: acknowledged to a guest. sealed: snapshot to (generation, writes in it)."""

    generation: int = 1
    writes: int = 0
    sealed: dict[str, tuple[int, int]] = field(default_factory=dict)
    pins: set[tuple[int, str]] = field(default_factory=set)
    hydrated: bool = False

    def seal(self, snapshot: str, again: bool) -> int:
        if not (again and snapshot in self.sealed):
            assert snapshot not in self.sealed, "sealed twice: the second call did not say `again`"
            self.sealed[snapshot] = self.generation, self.writes
            self.pins.add((self.generation, snapshot))
            self.generation += 1
        return self.sealed[snapshot][0]


class Volumes(defaultdict[str, Layers]):
    """Of all volumes, by id."""

    def __init__(self) -> None:
        super().__init__(Layers)


class MemorySeals:
    """The calls HoldWrites, ReleaseWrites, SealVolume and UnpinGeneration.

    fails, then_fails: by a call's name, what it raises before and after it did its work. hooks: what
    is done when it arrives. waits: what it waits for before it answers.
    """

    layers: Volumes
    volumes: dict[str, Any]

    def __init__(self) -> None:
        self.fails: dict[str, CairnError] = {}
        self.then_fails: dict[str, CairnError] = {}
        self.hooks: dict[str, Callable[[Any], None]] = {}
        self.waits: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[str, str]] = []
        self.held: dict[str, str] = {}
        self.broken: set[str] = set()
        self.position = Position()

    def write(self, volume: str) -> bool:
        """A write of a guest: False where it is not acknowledged now."""
        if volume in self.held:
            return False
        self.layers[volume].writes += 1
        return True

    def release_too_early(self, volume: str) -> None:
        """As if the limit had passed."""
        self.broken.add(volume)
        self.held.pop(volume, None)

    async def HoldWrites(self, request: control_pb2.HoldWritesRequest, context: Any) -> control_pb2.HoldWritesResponse:
        self._begin("HoldWrites", request)
        assert 0 < request.limit_s <= 10
        if self.held.get(request.volume, request.barrier) != request.barrier:
            raise Conflict(f"another barrier holds {request.volume}")
        self.broken.discard(request.volume)
        self.held[request.volume] = request.barrier
        await self._end("HoldWrites")
        return control_pb2.HoldWritesResponse()

    async def ReleaseWrites(
        self, request: control_pb2.ReleaseWritesRequest, context: Any
    ) -> control_pb2.ReleaseWritesResponse:
        self._begin("ReleaseWrites", request)
        held = self.held.pop(request.volume, "") == request.barrier and request.volume not in self.broken
        await self._end("ReleaseWrites")
        return control_pb2.ReleaseWritesResponse(held=held)

    async def SealVolume(self, request: control_pb2.SealVolumeRequest, context: Any) -> control_pb2.SealVolumeResponse:
        self._begin("SealVolume", request)
        generation = self.layers[request.volume].seal(request.snapshot, request.again)
        await self._end("SealVolume")
        return control_pb2.SealVolumeResponse(generation=generation, position=self.position, took_us=250)

    async def UnpinGeneration(
        self, request: control_pb2.UnpinGenerationRequest, context: Any
    ) -> control_pb2.UnpinGenerationResponse:
        self._begin("UnpinGeneration", request)
        self.layers[request.volume].pins.discard((request.generation, request.snapshot))
        await self._end("UnpinGeneration")
        return control_pb2.UnpinGenerationResponse()

    def _begin(self, name: str, request: Any) -> None:
        opened = self.volumes.get(request.volume)
        if opened is None or opened.epoch != request.epoch:
            raise NotFound(f"{request.volume} is not served here in epoch {request.epoch}")
        self.calls.append((name, request.volume))
        if hook := self.hooks.get(name):
            hook(request)
        if error := self.fails.get(name):
            raise error

    async def _end(self, name: str) -> None:
        if event := self.waits.get(name):
            await event.wait()
        if error := self.then_fails.get(name):
            raise error
