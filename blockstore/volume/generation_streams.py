"""Reads of sealed generations over streams of messages, which cost half of what gRPC does for a MiB.

A stream carries one request at a time: a node that refuses one ends the stream, and so says it of that request alone.
Streams that wait for the next request are kept. Where a node takes them its answers say; one that nobody reaches there
is asked by gRPC, for a while or until it names another port.
"""

import asyncio
from typing import Final

import structlog

from blockstore.config import split_address
from blockstore.domain import ReplicaAddress
from blockstore.errors import CairnError, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.message_stream import Message, MessageStream, connect
from blockstore.replica_codec import GENERATION_GREETING, greeting_to, to_address
from blockstore.rpc import replica_pb2 as pb

_log = structlog.get_logger(__name__)
#: That wait for a request, over all replicas: as many as some ships have under way.
_KEPT: Final = 16
#: A firewall that lets nothing through does not say so.
_CONNECT_S: Final = 2.0
#: Until a node that was not to be reached is tried again: it may just have been down.
_AGAIN_S: Final = 60.0


class GenerationStreams:
    """Of all nodes that this process reads generations from. Addresses are HOST:PORT of the nodes' gRPC."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._refused: dict[str, tuple[int, float]] = {}
        """The port at which a node was not to be reached, and the loop's time until which it is not tried."""
        self._idle: list[tuple[str, ReplicaAddress, _Exchange]] = []
        """The one that carried something last comes last."""

    def note(self, address: str, port: int) -> None:
        """The node says that it takes streams there; 0: nowhere."""
        self._ports[address] = port

    async def ask(self, address: str, request: pb.ReadGenerationRequest, timeout_s: float) -> Message | None:
        """A serialized answer; None where that node has to be asked by gRPC. Raises what the node answers."""
        replica = to_address(request.target)
        try:
            async with asyncio.timeout(timeout_s):
                exchange = await self._exchange_with(address, replica)
                if exchange is None:
                    return None
                answer = await exchange.ask(request.SerializeToString())
        except TimeoutError:
            raise QuorumUnavailable(f"the node at {address} has not answered within {timeout_s:g} s") from None
        self._keep(address, replica, exchange)
        return answer

    def close(self) -> None:
        """Those that carry nothing; the others end with their request."""
        for _, _, exchange in self._idle:
            exchange.close()
        self._idle.clear()

    async def _exchange_with(self, address: str, replica: ReplicaAddress) -> "_Exchange | None":
        """One that waits, or a new one."""
        port = self._ports.get(address, 0)
        refused, until = self._refused.get(address, (0, 0.0))
        if not port or (refused == port and asyncio.get_running_loop().time() < until):
            return None
        self._idle = [each for each in self._idle if not each[2].ended]
        for each in reversed(self._idle):
            if each[:2] == (address, replica):
                self._idle.remove(each)
                return each[2]
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await _Exchange.to(split_address(address)[0], port, replica)
        except NotFound:
            return None  # by gRPC it says so, too
        except (CairnError, TimeoutError) as error:
            self._refused[address] = port, asyncio.get_running_loop().time() + _AGAIN_S
            why = str(error) or f"nobody answered at port {port} within {_CONNECT_S:g} s"
            _log.warning("generations are read over gRPC", node=address, why=why)
            return None

    def _keep(self, address: str, replica: ReplicaAddress, exchange: "_Exchange") -> None:
        self._idle.append((address, replica, exchange))
        if len(self._idle) > _KEPT:
            self._idle.pop(0)[2].close()


class _Exchange:
    """One stream: a request, its answer, and then perhaps the next one."""

    def __init__(self) -> None:
        self.ended = False
        self._stream: MessageStream | None = None
        self._answer: asyncio.Future[Message] | None = None

    @classmethod
    async def to(cls, host: str, port: int, replica: ReplicaAddress) -> "_Exchange":
        """Raises CairnError where nobody takes it, or somebody who has no such replica."""
        exchange = cls()
        greeting = greeting_to(GENERATION_GREETING, replica)
        exchange._stream = await connect(host, port, greeting, exchange._take, exchange._end)
        return exchange

    async def ask(self, request: bytes) -> Message:
        """Raises what ended the stream. One whose answer is not waited for to the end is closed."""
        assert self._stream is not None
        if self.ended:
            raise QuorumUnavailable("the node has ended the stream")
        self._answer = asyncio.get_running_loop().create_future()
        self._stream.send(request)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _take(self, message: Message) -> None:
        if self._answer is None or self._answer.done():
            raise InvalidRequest("an answer that nobody has asked for")
        self._answer.set_result(message)

    def _end(self, error: CairnError) -> None:
        self.ended = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
