"""What a replica tells of its sealed generations: for whoever ships a snapshot, or fills a restored volume.

All of it is sealed, committed state, which no epoch changes: nobody is fenced here. Only a whole replica
answers, and every answer is one or a few short transactions, each of which checks that itself. They run in
threads of their own: what lies on disk only must not hold up a guest's I/O, nor take a checkpoint's thread.
"""

from collections.abc import AsyncIterator
from typing import Final

from blockstore.domain import Position
from blockstore.errors import InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.node.hosted_replica import HostedReplica
from blockstore.replica_codec import from_position, to_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.changes import ChangedExtent
from blockstore.storage.copies import MetaCopy
from blockstore.storage.keys import BITMAP_SIZE
from blockstore.storage.meta import Pin
from blockstore.units import BLOCK_SIZE, FILL_GENERATION, MAX_GENERATION, MIB, Generation

#: Of one transaction and one message: 4,096 rows of 40 bytes.
PAGE_EXTENTS: Final = 4096
MAX_READ_BLOCKS: Final = MIB // BLOCK_SIZE


async def describe(hosted: HostedReplica, request: pb.DescribeRequest) -> pb.DescribeResponse:
    """Generations, pins and source, once the tables reflect what was asked for. Raises QuorumUnavailable, Corrupt."""
    await _bring_up_to(hosted, to_position(request.applied))
    found: MetaCopy = await hosted.in_reader(hosted.store.sealed.describe)
    holders: dict[Generation, list[bytes]] = {}
    for pin in filter(_is_held, found.pins):
        holders.setdefault(pin.generation, []).append(pin.holder)
    return pb.DescribeResponse(
        applied=from_position(found.position),
        generation=found.generation,
        sealed=[
            pb.SealedGeneration(
                generation=each.generation,
                sequence=each.sequence,
                argument=each.argument,
                merging=each.merging,
                pins=holders.get(each.generation, ()),
            )
            for each in found.sealed
        ],
        source=found.source,
    )


async def list_changes(hosted: HostedReplica, request: pb.ListChangesRequest) -> AsyncIterator[pb.ListChangesResponse]:
    """What changed in the generations, a page at a time: each as of the applied position at that moment.

    A merge between two pages moves rows within the range only, or ends it: then the next page is NotFound.
    Raises InvalidRequest, NotFound, QuorumUnavailable, Corrupt.
    """
    lowest, highest = request.lowest, request.highest
    if lowest > highest or highest == FILL_GENERATION:
        raise InvalidRequest(f"no guest's generation is in {lowest} to {highest}")
    if highest != MAX_GENERATION:
        await bring_to_seal(hosted, Generation(highest))
    first: int | None = 0
    while first is not None:
        hosted.check_serves()
        page: list[ChangedExtent] = await hosted.in_reader(
            hosted.store.sealed.changes, lowest, highest, first, PAGE_EXTENTS
        )
        first = page[-1][0] + 1 if len(page) == PAGE_EXTENTS else None
        if page:
            yield pb.ListChangesResponse(
                extents=[pb.ChangedExtent(extent=e, blocks=bits.to_bytes(BITMAP_SIZE, "little")) for e, bits in page]
            )


async def read_generation(hosted: HostedReplica, request: pb.ReadGenerationRequest) -> bytes:
    """Blocks as a sealed generation shows them.

    Raises InvalidRequest, OutOfRange, NotFound, QuorumUnavailable, Corrupt.
    """
    ranges = [(each.start, each.count) for each in request.ranges]
    total = sum(count for _, count in ranges)
    if not 0 < total <= MAX_READ_BLOCKS:  # bounded before it is believed
        raise InvalidRequest(f"a read of {total} blocks of a generation, 1 to {MAX_READ_BLOCKS} are allowed")
    if request.generation in (FILL_GENERATION, MAX_GENERATION):
        raise InvalidRequest(f"generation {request.generation} is none that a guest's write belongs to")
    generation = Generation(request.generation)
    await bring_to_seal(hosted, generation)
    payload: bytes = await hosted.in_reader(hosted.store.sealed.read_ranges, generation, ranges)
    return payload


def _is_held(pin: Pin) -> bool:
    return pin.held


async def _bring_up_to(hosted: HostedReplica, asked: Position) -> None:
    """Have the tables reflect a position. Raises QuorumUnavailable where they cannot now."""
    hosted.check_serves()
    if hosted.follower.commit < asked:
        raise QuorumUnavailable(
            f"replica {hosted.replica} knows of commits up to {tuple(hosted.follower.commit)}, asked for {tuple(asked)}"
        )
    if hosted.store.applied < asked or hosted.store.image.filling is not None:
        await _checkpoint(hosted)
    if hosted.store.applied < asked:
        raise QuorumUnavailable(
            f"replica {hosted.replica} has applied {tuple(hosted.store.applied)}, asked for {tuple(asked)}"
        )


async def bring_to_seal(hosted: HostedReplica, generation: Generation) -> None:
    """Where the seal of a generation is committed here, have it applied."""
    hosted.check_serves()
    image = hosted.store.image
    if image.filling is not None or image.generation <= generation < hosted.follower.generation:
        await _checkpoint(hosted)


async def _checkpoint(hosted: HostedReplica) -> None:
    try:
        await hosted.checkpoint()
    except NoSpace as error:
        raise QuorumUnavailable(f"replica {hosted.replica} has no room for a checkpoint: {error}") from error
    hosted.check_serves()
