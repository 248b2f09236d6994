"""What a front-end asks of its members beside records and reads: state that no epoch changes, whole by whole.

Asked of whole members only, one after the other until one answers. Each answer is stated at a position, and
the caller says how new that has to be: a member whose tables are behind brings them up first, and one that
has not heard of the commit yet is asked again a moment later.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from blockstore.domain import Position, ReplicaAddress
from blockstore.errors import CairnError, Fenced, QuorumUnavailable
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.replica_codec import from_position, make_target
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.units import MAX_GENERATION, Epoch, Generation, Sequence

_PAUSE_S: Final = 0.05

Message = TypeVar("Message")
Answer = TypeVar("Answer")
Members = Callable[[], list[tuple[ReplicaAddress, str]]]
"""The whole members now, and where each is."""


class MemberQueries:
    """call_timeout_s: of a call, and of each message of a stream."""

    def __init__(self, members: Members, epoch: Epoch, configuration: int, call_timeout_s: float) -> None:
        self._members = members
        self._epoch = epoch
        self._configuration = configuration
        self._call_timeout_s = call_timeout_s
        self._turn = 0

    async def describe(self, at_least: Position, limit_s: float) -> pb.DescribeResponse:
        """Generations, pins and source as of a position at or above that. Raises QuorumUnavailable after `limit_s`."""
        return await self._until(limit_s, lambda: self._describe_somewhere(at_least))

    async def changes(self, at_least: Position) -> AsyncGenerator[pb.ChangedExtent, None]:
        """Each extent with an entry in any generation, in order, as of a position at or above that.

        Of one member, and of another one the next time: raises what went wrong there.
        """
        address, place = self._next_member()
        channel = open_channel(place)
        try:
            with cairn_errors(f"node at {place}"):
                # It is as new as this says from then on, for an applied position never falls.
                await self._until(self._call_timeout_s, lambda: self._describe(channel, address, place, at_least))
                request = pb.ListChangesRequest(target=self._target(address), lowest=0, highest=MAX_GENERATION)
                call: Any = replica_pb2_grpc.ReplicaStub(channel).ListChanges(request)
                async for response in _paced(call, self._call_timeout_s):
                    for extent in response.extents:
                        yield extent
        finally:
            await channel.close(None)

    async def _describe_somewhere(self, at_least: Position) -> pb.DescribeResponse:
        address, place = self._next_member()
        channel = open_channel(place)
        try:
            return await self._describe(channel, address, place, at_least)
        finally:
            await channel.close(None)

    async def _describe(
        self, channel: grpc.aio.Channel, address: ReplicaAddress, place: str, at_least: Position
    ) -> pb.DescribeResponse:
        request = pb.DescribeRequest(target=self._target(address), applied=from_position(at_least))
        with cairn_errors(f"node at {place}"):
            response: pb.DescribeResponse = await replica_pb2_grpc.ReplicaStub(channel).Describe(
                request, timeout=self._call_timeout_s
            )
        return response

    async def _until(self, limit_s: float, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """A member hears of a commit with the next record, or heartbeat: until then it is asked again."""
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            try:
                return await ask()
            except Fenced:
                raise
            except CairnError as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise QuorumUnavailable(f"no member tells its state within {limit_s} s: {error}") from error
            await asyncio.sleep(_PAUSE_S)

    def _target(self, address: ReplicaAddress) -> pb.Target:
        return make_target(address, self._epoch, self._configuration)

    def _next_member(self) -> tuple[ReplicaAddress, str]:
        members = [(address, place) for address, place in self._members() if place]
        if not members:
            raise QuorumUnavailable("no whole member is connected")
        self._turn += 1
        return members[self._turn % len(members)]


def sealed_for(described: pb.DescribeResponse, snapshot: str) -> tuple[Generation, Sequence] | None:
    """The generation whose SEAL carried this snapshot's id, and the sequence of that SEAL.

    The first one of several: its content may have been promised already, and once fixed it is never fixed anew.
    """
    found = [(each.sequence, each.generation) for each in described.sealed if each.argument == snapshot.encode()]
    if not found:
        return None
    sequence, generation = min(found)
    return Generation(generation), Sequence(sequence)


async def _paced(call: AsyncIterable[Message], limit_s: float) -> AsyncIterator[Message]:
    """The messages of a stream, each within `limit_s` of the one before being done with."""
    messages = aiter(call)
    while True:
        try:
            async with asyncio.timeout(limit_s):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise QuorumUnavailable(f"the stream stood still for {limit_s} s") from None
        yield message
