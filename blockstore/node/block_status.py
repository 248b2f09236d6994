"""What a replica tells of the blocks of a range, without their content: who maps an export, or copies what changed.

It is a read (docs/replication.md, rule 4): its epoch is checked, and it is as of all that the leader knew to be
committed when it asked. It runs in a thread of those that read beside guests: a page looks at many entries.
"""

from blockstore.errors import InvalidRequest
from blockstore.node.generations import bring_to_seal
from blockstore.node.hosted_replica import HostedReplica
from blockstore.replica_codec import to_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.status import Page
from blockstore.units import FIRST_GENERATION, MAX_BLOCKS, Epoch, Generation


async def block_status(hosted: HostedReplica, request: pb.BlockStatusRequest) -> pb.BlockStatusResponse:
    """Raises InvalidRequest, Fenced, QuorumUnavailable where another replica may answer, Corrupt."""
    start, end = request.start, request.start + request.count
    if not 0 <= start < end <= MAX_BLOCKS:
        raise InvalidRequest(f"the status of {request.count} blocks from {start}: a replica has up to {MAX_BLOCKS}")
    target = request.target
    refusal = hosted.refuse_read(Epoch(target.epoch), target.configuration, to_position(request.commit))
    if refusal is not None:
        raise refusal
    # A pin comes with its seal, and pins are looked up in the tables.
    if (newest := hosted.follower.generation - 1) >= FIRST_GENERATION:
        await bring_to_seal(hosted, Generation(newest))
    status = hosted.store.status
    if request.changed_since:
        page: Page = await hosted.in_reader(status.changed, request.changed_since, start, end)
    else:
        page = await hosted.in_reader(status.shown, start, end)
    return pb.BlockStatusResponse(
        counts=[run.end - run.start for run in page.runs],
        kinds=bytes(run.kind for run in page.runs),
        generations=() if request.changed_since else [run.generation for run in page.runs],
        pinned=page.pinned,
        source=page.has_source,
    )
