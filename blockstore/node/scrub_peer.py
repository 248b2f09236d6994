"""Asking a peer what it shows: the next member in the order of ids, or the one after it where that does not answer.

So each pair of three is compared once in a period, and each extent is read twice: by its own scrub, and for the
member before it.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Final, NamedTuple

import grpc

from blockstore.domain import Position, ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, NotFound
from blockstore.grpc_errors import cairn_errors
from blockstore.node.hosted_replica import HostedReplica
from blockstore.replica_codec import from_position, make_target, to_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.storage.scrub import ExtentView, ShownBlock, ShownExtent
from blockstore.units import Generation, Sequence

#: A peer that reads from a slow disk, for a request that nobody waits for.
_TIMEOUTS: Final = 4.0


class PeerViews(NamedTuple):
    """What a peer shows of the extents that were asked for; those that are damaged there are missing.

    pins: a digest of pins and source, as of that position. guests: they want something of its node.
    """

    peer: ReplicaId
    views: dict[int, ExtentView]
    pins: tuple[Position, bytes]
    guests: bool


class ScrubPeers:
    """open_channel: a shared channel to an address. timeout_s: of other calls between nodes."""

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel], timeout_s: float) -> None:
        self._open_channel = open_channel
        self._timeout_s = _TIMEOUTS * timeout_s

    async def views(
        self, hosted: HostedReplica, extents: Collection[int], generations: Iterable[Generation], applied: Position
    ) -> tuple[PeerViews | None, str]:
        """Of the first peer that answers; else why none does."""
        why = ["nobody has said where the other members are"] if not hosted.peers else []
        for peer in in_turn(hosted.replica, hosted.peers):
            request = pb.DigestRequest(
                target=_target(hosted, peer), extents=extents, generations=generations, applied=from_position(applied)
            )
            try:
                with cairn_errors(f"replica {peer}"):
                    answer: pb.DigestResponse = await self._stub(hosted, peer).Digest(request, timeout=self._timeout_s)
            except CairnError as error:
                why.append(str(error))
                continue
            return _decode(peer, answer, set(extents)), ""
        hosted.peers_moved = True
        return None, "; ".join(why)

    async def shown(self, hosted: HostedReplica, peer: ReplicaId, extent: int, generation: Generation) -> ShownExtent:
        """Raises what the peer answers."""
        request = pb.ShowExtentRequest(target=_target(hosted, peer), extent=extent, generation=generation)
        with cairn_errors(f"replica {peer}"):
            answer: pb.ShowExtentResponse = await self._stub(hosted, peer).ShowExtent(request, timeout=self._timeout_s)
        blocks = {
            each.number: ShownBlock(Generation(each.generation), Sequence(each.sequence), each.digest)
            for each in answer.blocks
        }
        return ShownExtent(to_position(answer.applied), Sequence(answer.highest), blocks)

    def _stub(self, hosted: HostedReplica, peer: ReplicaId) -> "replica_pb2_grpc.ReplicaAsyncStub":
        address = hosted.peers.get(peer)
        if not address:
            raise NotFound(f"nobody has said where replica {peer} is")
        return replica_pb2_grpc.ReplicaStub(self._open_channel(address))


def in_turn(own: ReplicaId, members: Iterable[ReplicaId]) -> list[ReplicaId]:
    """The other members, the next one first, in a ring of all."""
    others = sorted(set(members) - {own})
    return [each for each in others if each > own] + [each for each in others if each < own]


def _target(hosted: HostedReplica, peer: ReplicaId) -> pb.Target:
    address = ReplicaAddress(hosted.address.volume, hosted.address.segment, peer)
    return make_target(address, hosted.follower.epoch, hosted.follower.configuration)


def _decode(peer: ReplicaId, answer: pb.DigestResponse, asked: set[int]) -> PeerViews:
    views = {
        each.extent: ExtentView(
            each.extent,
            to_position(each.applied),
            Sequence(each.highest),
            tuple(map(Generation, each.generations)),
            each.digest,
            0,
        )
        for each in answer.extents
        if each.extent in asked
    }
    return PeerViews(peer, views, (to_position(answer.pins_applied), answer.pins), answer.guests)
