"""Fetching from peers what a replica lacks: records, or the difference of the tables.

One fetch of each kind runs at a time for each replica; a newer attempt ends the one before. What arrives is handed
to the follower, which decides whether it still counts. A fetch that breaks is told as failed: the
leader's next message starts another.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from blockstore.domain import Position, ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, NotFound, QuorumUnavailable
from blockstore.grpc_errors import from_rpc_error
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.memory import MemoryBudget
from blockstore.rate_limit import RateLimit
from blockstore.replica_codec import from_position, make_target, to_position, to_records
from blockstore.replication.messages import FetchDelta, FetchLog
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.storage.copies import copied_extent, encode_absence

_log = structlog.get_logger(__name__)

OpenChannel = Callable[[str], grpc.aio.Channel]


class CatchUpClient:
    """Runs the fetches of all replicas of a node. open_channel gives a shared channel to an address."""

    def __init__(self, open_channel: OpenChannel, memory: MemoryBudget, rate: RateLimit, idle_timeout_s: float) -> None:
        self._open_channel = open_channel
        self._memory = memory
        self._rate = rate
        self._idle_timeout_s = idle_timeout_s
        self.log_bytes = 0
        """Of records that peers sent."""
        self.copied_bytes = 0
        """Of what they sent of their tables."""
        self._running: dict[tuple[ReplicaId, type], asyncio.Task[None]] = {}

    def start(self, hosted: HostedReplica, effect: FetchLog | FetchDelta) -> None:
        """Begin what the follower asked for; an earlier fetch of the same kind for the same replica ends."""
        self._stop(hosted.replica, type(effect))
        fetch = self._fetch_log(hosted, effect) if isinstance(effect, FetchLog) else self._fetch_delta(hosted, effect)
        task = asyncio.get_running_loop().create_task(fetch)
        self._running[hosted.replica, type(effect)] = task

    def stop(self, replica: ReplicaId) -> None:
        """End the fetches under way for it."""
        for kind in (FetchLog, FetchDelta):
            self._stop(replica, kind)

    def _stop(self, replica: ReplicaId, kind: type) -> None:
        task = self._running.pop((replica, kind), None)
        if task is not None:
            task.cancel()

    async def _fetch_log(self, hosted: HostedReplica, effect: FetchLog) -> None:
        try:
            request = pb.FetchLogRequest(
                target=self._target(hosted, effect.peer),
                after=from_position(effect.after),
                up_to=from_position(effect.target),
            )
            async for response in self._responses(self._stub(hosted, effect.peer).FetchLog(request)):
                if response.not_held:
                    hosted.carry_out(hosted.follower.log_not_held(effect.attempt))
                    return
                received_bytes = sum(map(len, response.records))
                self.log_bytes += received_bytes
                await self._memory.wait_for_room(hosted.replica)
                hosted.carry_out(hosted.follower.log_fetched(effect.attempt, to_records(response.records)))
                if not hosted.follower.whole:
                    # Who is whole was away for a moment, and is brought up at once.
                    await self._rate.after(received_bytes)
        except Exception as error:
            _note_failure("fetching the log failed", hosted, effect.peer, error)
            hosted.carry_out(hosted.follower.fetch_failed(effect.attempt))
        else:
            hosted.carry_out(hosted.follower.log_ended(effect.attempt))

    async def _fetch_delta(self, hosted: HostedReplica, effect: FetchDelta) -> None:
        try:
            done = await self._copy_delta(hosted, effect)
        except Exception as error:
            _note_failure("copying from a peer failed", hosted, effect.peer, error)
            done = False
        if done:
            hosted.carry_out(hosted.follower.delta_done(effect.attempt))
        else:
            hosted.carry_out(hosted.follower.delta_failed(effect.attempt))

    async def _copy_delta(self, hosted: HostedReplica, effect: FetchDelta) -> bool:
        """False where the attempt is over."""
        request = pb.FetchDeltaRequest(
            target=self._target(hosted, effect.peer), since=effect.since, base=from_position(effect.at_least)
        )
        began: Position | None = None
        copied: set[int] = set()
        parts: list[bytes] = []
        async for response in self._responses(self._stub(hosted, effect.peer).FetchDelta(request)):
            parts += response.parts
            self.copied_bytes += sum(map(len, response.parts))
            if response.continues:
                continue
            extents = [parts] if parts else []
            stated = to_position(response.applied)
            began = began or stated
            copied.update(copied_extent(part) for part in parts)
            if not await hosted.copy(effect.attempt, stated, response.meta or None, extents):
                return False
            await self._rate.after(sum(map(len, parts)))
            parts = []
            hosted.follower.delta_progress(effect.attempt, len(copied), response.extents_total)
        return effect.since > 0 or await self._take_away(hosted, effect.attempt, began, copied)

    async def _take_away(self, hosted: HostedReplica, attempt: int, began: Position | None, copied: set[int]) -> bool:
        """A copy of everything: what the peer did not have when it began goes. False where the attempt is over."""
        if began is None:
            return False
        for extent in sorted(await hosted.held_extents() - copied):
            if not await hosted.copy(attempt, began, None, [[encode_absence(extent, began)]], absent=True):
                return False
        return True

    async def _responses(self, call: Any) -> AsyncIterator[Any]:
        """What a peer streams. Raises QuorumUnavailable where it falls silent, else what it says."""
        responses = aiter(call)
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle_timeout_s):
                        response = await anext(responses)
                except StopAsyncIteration:
                    return
                yield response
        except TimeoutError:
            raise QuorumUnavailable(f"the peer sent nothing for {self._idle_timeout_s} s") from None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _stub(self, hosted: HostedReplica, peer: ReplicaId) -> replica_pb2_grpc.ReplicaStub:
        address = hosted.peers.get(peer)
        if not address:
            raise NotFound(f"nobody has said where replica {peer} is")
        return replica_pb2_grpc.ReplicaStub(self._open_channel(address))

    def _target(self, hosted: HostedReplica, peer: ReplicaId) -> pb.Target:
        address = ReplicaAddress(hosted.address.volume, hosted.address.segment, peer)
        return make_target(address, hosted.follower.epoch, hosted.follower.configuration)


def _note_failure(what: str, hosted: HostedReplica, peer: ReplicaId, error: Exception) -> None:
    """What nobody foresaw is a defect and is logged with its stack; the fetch has failed either way."""
    unforeseen = None if isinstance(error, CairnError) else error
    _log.warning(what, replica=hosted.replica, peer=peer, error=str(error), exc_info=unforeseen)
