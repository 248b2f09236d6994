"""A sealed generation of one segment, read from whichever of its replicas answers.

A sealed generation is the same on every whole replica, so each call goes to the one that answered
last, and on an error to the next; where all have refused, the error says what each said. Addresses
may change while it is read: control brings them with every heartbeat.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import grpc

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.grpc_connections import Connections
from blockstore.grpc_errors import cairn_errors
from blockstore.replica_codec import GenerationRead, decode_generation
from blockstore.rpc import control_pb2, replica_pb2_grpc
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, FILL_GENERATION
from blockstore.volume.changes import Changes, Run
from blockstore.volume.generation_streams import GenerationStreams
from blockstore.volume.guest_pace import GuestPace

#: Of the whole list of changes; a segment of 1 TiB has a million extents, listed in seconds.
_LIST_TIMEOUT_S: Final = 600.0
_READ_GENERATION: Final = "/cairn.v1.Replica/ReadGeneration"

Answer = TypeVar("Answer")


class NodeChannels:
    """Connections to nodes, one for each address, kept until `close`; and the pace at which they are read."""

    def __init__(self) -> None:
        self.pace = GuestPace()
        self._nodes = Connections(_replica_stub)
        self._streams = GenerationStreams()

    def stub(self, address: str) -> Any:
        """The Replica service there; ReadGeneration gives bytes, for `decode_generation`."""
        return self._nodes.to(address)

    async def read_generation(
        self, address: str, request: pb.ReadGenerationRequest, timeout_s: float
    ) -> GenerationRead:
        """What the node there answers: over a stream where it takes them, as its first answer says, else by gRPC."""
        message = await self._streams.ask(address, request, timeout_s)
        if message is None:
            message = await self.stub(address).ReadGeneration(request, timeout=timeout_s)
        found = decode_generation(message)
        self._streams.note(address, found.streams_port)
        return found

    async def close(self) -> None:
        self._streams.close()
        await self._nodes.close()


def _replica_stub(channel: grpc.aio.Channel) -> Any:
    stub: Any = replica_pb2_grpc.ReplicaStub(channel)
    stub.ReadGeneration = channel.unary_unary(
        _READ_GENERATION, pb.ReadGenerationRequest.SerializeToString, response_deserializer=None
    )
    return stub


class SealedSegment:
    """The generations of one segment up to a sealed one, `segment` being where it is as control knows.

    blocks: that it had when it was sealed; volumes grow. generation: the sealed one; base: that of the base, 0 where
    the base does not have this segment. seal: what the record carried that sealed it. A replica that has what was given
    up with a loss may have another generation of that number, and is not believed; empty: whatever has that number.
    """

    def __init__(
        self,
        volume: str,
        segment: control_pb2.Segment,
        blocks: int,
        channels: NodeChannels,
        call_timeout_s: float,
        *,
        base: int = 0,
        generation: int = 0,
        seal: str = "",
    ) -> None:
        self.blocks = blocks
        self.base = base
        self.generation = generation
        self._seal = seal
        self._sealed: set[str] = set()
        """Replicas that have the generation by that very seal."""
        self._volume = volume
        self._segment = segment
        self._channels = channels
        self._call_timeout_s = call_timeout_s
        self._best = ""
        """The replica that answered last."""
        self._counts_fills = False
        """Whether generation 0 was listed: then what a replica lacks of the volume's source would pass for zeroes."""
        self._filled: set[str] = set()
        """Replicas that need no source, or none any more, and have said so."""

    def move(self, segment: control_pb2.Segment) -> None:
        """Control knows newer addresses, or other members."""
        self._segment = segment

    async def list_changes(self, lowest: int, highest: int) -> Changes:
        """The blocks written, zeroed or trimmed in the generations lowest..highest.

        With generation 0, the fills, only replicas that have all of them are asked, also by `read` from then on.
        Raises NotFound where no replica has the generation, QuorumUnavailable where one may later.
        """

        async def ask(address: str, target: pb.Target) -> Changes:
            changes = Changes(self.blocks)
            request = pb.ListChangesRequest(target=target, lowest=lowest, highest=highest)
            async for response in self._channels.stub(address).ListChanges(request, timeout=_LIST_TIMEOUT_S):
                for each in response.extents:
                    changes.add(each.extent, each.blocks)
            return changes

        self._counts_fills = lowest == FILL_GENERATION
        return await self._ask_any(ask)

    async def read(self, generation: int, runs: Sequence[Run]) -> memoryview:
        """The content of `runs`, at most 1 MiB in all, as of `generation`; zeroes for what has no entry.

        It takes its time where guests use the nodes (blockstore.volume.guest_pace).

        Raises as list_changes does, and Corrupt where every replica's copy is damaged.
        """

        pace = self._channels.pace

        async def ask(address: str, target: pb.Target) -> memoryview:
            ranges = [pb.BlockRange(start=run.start, count=run.length) for run in runs]
            request = pb.ReadGenerationRequest(target=target, generation=generation, ranges=ranges)
            payload, guests, _ = await self._channels.read_generation(address, request, self._call_timeout_s)
            if len(payload) != sum(run.length for run in runs) * BLOCK_SIZE:
                raise InvalidRequest(f"replica {target.replica} answered {len(payload)} bytes to {runs}")
            pace.note(busy=guests)
            return payload

        return await pace.read(lambda: self._ask_any(ask))

    async def _ask_any(self, ask: Callable[[str, pb.Target], Awaitable[Answer]]) -> Answer:
        """ask: told a node's address, and which replica it has."""
        errors: list[CairnError] = []
        for member in self._members():
            target = pb.Target(volume=self._volume, segment=self._segment.number, replica=member.replica)
            try:
                with cairn_errors(f"node at {member.address}"):
                    stub = self._channels.stub(member.address)
                    if self._counts_fills:
                        await self._check_filled(stub, target)
                    answer = await ask(member.address, target)
                    await self._check_seal(stub, target)
                self._best = member.replica
                return answer
            except CairnError as error:
                errors.append(error)
        raise _summary(errors)

    async def _check_seal(self, stub: Any, target: pb.Target) -> None:
        """Raises NotFound where the replica's generation of that number is another one. It has answered: it has one."""
        if not self._seal or target.replica in self._sealed:
            return
        described = await stub.Describe(pb.DescribeRequest(target=target), timeout=self._call_timeout_s)
        if (self.generation, self._seal.encode()) not in {
            (each.generation, each.argument) for each in described.sealed
        }:
            raise NotFound(f"replica {target.replica} has no generation {self.generation} that {self._seal} sealed")
        self._sealed.add(target.replica)

    async def _check_filled(self, stub: Any, target: pb.Target) -> None:
        """Raises QuorumUnavailable where the replica's tables do not say that its source has ended, if it had one."""
        if target.replica in self._filled:
            return
        described = await stub.Describe(pb.DescribeRequest(target=target), timeout=self._call_timeout_s)
        if described.source:
            raise QuorumUnavailable(f"replica {target.replica} has not applied the end of its source: ask another one")
        self._filled.add(target.replica)

    def _members(self) -> list[control_pb2.Member]:
        """Those that can be dialled, the one that answered last first."""
        configuration = self._segment.configuration
        members = {each.replica: each for each in (*configuration.members, *configuration.old_members) if each.address}
        return sorted(members.values(), key=lambda each: each.replica != self._best)


def _summary(errors: list[CairnError]) -> CairnError:
    """One error for what each replica said: the class that all share, else "try again"."""
    if not errors:
        return QuorumUnavailable("control does not know where any of the replicas is")
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else QuorumUnavailable
    if kind not in {Corrupt, NotFound, InvalidRequest}:
        kind = QuorumUnavailable
    return kind("; ".join(dict.fromkeys(str(error) for error in errors)))
