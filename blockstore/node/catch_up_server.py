"""What a replica gives to a peer that lacks something: records of its log, or content of its tables.

Records are chained: each names its predecessor, the first one what the peer knows to be committed,
the last one what its leader vouches for. So records of a branch that was cut cannot pass for the log.
Content is always that of the tables at a stated position: applied, and so committed.
"""

from collections.abc import AsyncIterator, Sequence

from blockstore.domain import Position
from blockstore.errors import Conflict, QuorumUnavailable
from blockstore.node.hosted_replica import HostedReplica
from blockstore.record import Record
from blockstore.replica_codec import from_position, to_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.journal import Journal
from blockstore.units import MIB

_MESSAGE_BYTES = MIB


async def serve_log(
    hosted: HostedReplica, journal: Journal, request: pb.FetchLogRequest
) -> AsyncIterator[pb.FetchLogResponse]:
    """The records behind `after` up to `up_to`, from memory or from the journal's files."""
    at, up_to = to_position(request.after), to_position(request.up_to)
    while at != up_to:
        records = await _records(hosted, journal, at, up_to)
        if not records:
            yield pb.FetchLogResponse(not_held=True)
            return
        for batch in _batches(records):
            yield pb.FetchLogResponse(records=[bytes(record.encoded) for record in batch])
        at = records[-1].position


async def _records(hosted: HostedReplica, journal: Journal, after: Position, up_to: Position) -> Sequence[Record]:
    """The next records of the chain, some of them; none where they are not held."""
    held = hosted.follower.records(after, up_to)
    if held is not None:
        return held
    read = await hosted.in_thread(
        journal.read_records, hosted.replica, after.sequence, up_to.sequence, 4 * _MESSAGE_BYTES
    )
    chain: list[Record] = []
    for record in read or ():
        if record.previous != (chain[-1].position if chain else after):
            return []
        chain.append(record)
    if chain and (chain[-1].position > up_to or (chain[-1].sequence == up_to.sequence and chain[-1].position != up_to)):
        return []
    return chain


def _batches(records: Sequence[Record]) -> list[list[Record]]:
    """Lists whose encodings fit a message each."""
    batches: list[list[Record]] = []
    size = _MESSAGE_BYTES
    for record in records:
        if not batches or size + len(record.encoded) > _MESSAGE_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(record)
        size += len(record.encoded)
    return batches


async def serve_delta(hosted: HostedReplica, request: pb.FetchDeltaRequest) -> AsyncIterator[pb.FetchDeltaResponse]:
    """First the meta, then every extent that changed above `since`, each as of the applied position stated with it.

    Raises Conflict where this replica is filling itself, QuorumUnavailable where it is behind `base`.
    """
    base = to_position(request.base)
    if hosted.store.applied < base:
        await hosted.checkpoint()
    if not hosted.follower.whole:
        raise Conflict(f"replica {hosted.replica} is filling itself: copy from another one")
    if hosted.store.applied < base:
        raise QuorumUnavailable(f"replica {hosted.replica} has applied {hosted.store.applied}, asked for {base}")
    async with hosted.reading_tables():
        stated = hosted.store.applied
        meta = await hosted.in_thread(hosted.store.delta_meta)
        extents: list[int] = await hosted.in_thread(hosted.store.delta_extents, request.since)
    yield pb.FetchDeltaResponse(applied=from_position(stated), meta=meta, extents_total=len(extents))
    for extent in extents:
        async with hosted.reading_tables():
            if hosted.closed or not hosted.follower.whole:
                raise Conflict(f"replica {hosted.replica} is no source of copies any more")
            stated = hosted.store.applied
            parts: list[bytes] = await hosted.in_thread(hosted.store.copy_extent, extent)
        for number, part in enumerate(parts, 1):
            yield pb.FetchDeltaResponse(
                applied=from_position(stated),
                parts=[part],
                continues=number < len(parts),
                extents_total=len(extents),
            )
