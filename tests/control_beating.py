"""Processes around control in tests: they serve real gRPC, register, and beat at whatever address control has now."""

import asyncio
from abc import ABC, abstractmethod
from typing import Any

import grpc

from blockstore.errors import CairnError, NotFound
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.grpc_parts import whole
from blockstore.rpc import control_pb2_grpc, snapshot_pb2_grpc

LIMIT_S = 60
BEAT_S = 0.1


class Stubs:
    """The calls of both services of control, over one channel."""

    def __init__(self, channel: Any) -> None:
        self._services = (control_pb2_grpc.ControlStub(channel), snapshot_pb2_grpc.SnapshotsStub(channel))

    def __getattr__(self, name: str) -> Any:
        return next(getattr(service, name) for service in self._services if hasattr(service, name))


async def answer_of(call: Any) -> Any:
    """What a call answers, also where it does so in parts."""
    return await (whole(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)


class Beating(ABC):
    """Registers with control and beats, as blockstore.heartbeat does."""

    id: str

    def __init__(self) -> None:
        self.control = ""
        self.endpoint = Endpoint("127.0.0.1:0")
        self._beats: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.endpoint.start()
        self._beats = asyncio.ensure_future(self._beat())

    async def fall_silent(self) -> None:
        """Beat no more; it serves on."""
        if self._beats:
            self._beats.cancel()
            await asyncio.gather(self._beats, return_exceptions=True)

    async def stop(self) -> None:
        """Gone, without a word."""
        await self.fall_silent()
        await self.endpoint.stop(0)

    async def _beat(self) -> None:
        known = ""
        while True:
            if self.control:
                control, channel = self.control, open_channel(self.control)
                try:
                    with cairn_errors("control"):
                        while control == self.control:
                            stub = Stubs(channel)
                            if known != control:
                                await self.register(stub)
                                known = control
                            await self.report(stub)
                            await asyncio.sleep(BEAT_S)
                except NotFound:
                    known = ""
                except CairnError:
                    pass  # Told again with the next beat.
                finally:
                    await channel.close(None)
            await asyncio.sleep(BEAT_S)

    @abstractmethod
    async def register(self, stub: Any) -> None: ...

    @abstractmethod
    async def report(self, stub: Any) -> None: ...
