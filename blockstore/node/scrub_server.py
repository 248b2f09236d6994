"""What a replica tells a peer that compares itself with it: digests of what it shows, as of its applied position.

Like the reads of sealed generations this is committed state, which no epoch changes: nobody is fenced. Damage that
comes to light here is repaired here; the extent is left out of the answer.
"""

from collections.abc import Callable
from typing import Final

from blockstore.domain import Position
from blockstore.errors import Corrupt, InvalidRequest, NoSpace
from blockstore.node.guest_traffic import GuestTraffic
from blockstore.node.hosted_replica import HostedReplica
from blockstore.replica_codec import from_position, to_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.scrub import ExtentView
from blockstore.units import EXTENT_BLOCKS, MAX_BLOCKS, Generation

MAX_EXTENTS: Final = 64
"""Of one request: some 64 MiB to be read for each generation that has that much."""
_MAX_GENERATIONS: Final = 100_000

Repair = Callable[[HostedReplica, Corrupt], None]


async def digest(
    hosted: HostedReplica, request: pb.DigestRequest, traffic: GuestTraffic, repair: Repair
) -> pb.DigestResponse:
    """Raises InvalidRequest, NotFound (it was deleted), QuorumUnavailable (it fills), Corrupt (of pins only)."""
    _check(request)
    hosted.check_serves()
    await apply_up_to(hosted, to_position(request.applied), repair)
    asked = frozenset(map(Generation, request.generations))
    found = []
    for extent in request.extents:
        hosted.check_serves()
        try:
            view: ExtentView = await hosted.in_reader(hosted.store.scrub.view, extent, asked)
        except Corrupt as error:
            repair(hosted, error)
            continue
        found.append(_encode(view))
    applied, pins = await hosted.in_reader(hosted.store.scrub.pins)
    return pb.DigestResponse(extents=found, guests=traffic.busy, pins_applied=from_position(applied), pins=pins)


async def show_extent(hosted: HostedReplica, request: pb.ShowExtentRequest) -> pb.ShowExtentResponse:
    """Raises InvalidRequest, NotFound, QuorumUnavailable, Corrupt."""
    _check_extent(request.extent)
    hosted.check_serves()
    shown = await hosted.in_reader(hosted.store.scrub.shown, request.extent, Generation(request.generation))
    return pb.ShowExtentResponse(
        applied=from_position(shown.position),
        highest=shown.highest,
        blocks=[
            pb.ShownBlock(number=number, generation=each.generation, sequence=each.sequence, digest=each.digest)
            for number, each in shown.blocks.items()
        ],
    )


async def apply_up_to(hosted: HostedReplica, asked: Position, repair: Repair) -> None:
    """Bring what is committed into the tables, if that takes them nearer to `asked`; they may stay behind it.

    Also where the replica is whole, and its tables do not say so yet: in an idle volume no checkpoint comes by itself.
    """
    behind = hosted.store.applied < asked and hosted.store.applied < hosted.follower.commit
    if not behind and not (hosted.follower.whole and hosted.store.image.filling is not None):
        return
    try:
        await hosted.checkpoint()
    except Corrupt as error:
        repair(hosted, error)
    except NoSpace:
        return  # the checkpointer tells of it


def _encode(view: ExtentView) -> pb.ExtentDigest:
    return pb.ExtentDigest(
        extent=view.extent,
        applied=from_position(view.position),
        highest=view.highest,
        generations=view.generations,
        digest=view.digest,
    )


def _check(request: pb.DigestRequest) -> None:
    """Bounded before it is believed."""
    if len(request.extents) > MAX_EXTENTS or len(request.generations) > _MAX_GENERATIONS:
        raise InvalidRequest(
            f"digests of {len(request.extents)} extents in {len(request.generations)} generations: "
            f"at most {MAX_EXTENTS} and {_MAX_GENERATIONS} are allowed"
        )
    for extent in request.extents:
        _check_extent(extent)


def _check_extent(extent: int) -> None:
    if extent >= MAX_BLOCKS // EXTENT_BLOCKS:
        raise InvalidRequest(f"extent {extent} is beyond the largest volume")
