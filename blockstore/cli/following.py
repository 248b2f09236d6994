"""Waiting for snapshots: until each is whole in the object store, or will not come to be."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from blockstore.cli.client import POLL_S, ControlClient
from blockstore.cli.meters import Amount, Meters
from blockstore.cli.snapshot_documents import snapshot_state
from blockstore.errors import Conflict, QuorumUnavailable
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import snapshot_pb2 as pb

_ENDED: Final = (pb.SNAPSHOT_STATE_COMPLETED, pb.SNAPSHOT_STATE_ERROR, pb.SNAPSHOT_STATE_DELETING)


async def until_ended(
    client: ControlClient, snapshots: Sequence[str], limit_s: float, show: Meters
) -> list[pb.Snapshot]:
    """The snapshots of those ids, in their order, once none of them is pending. limit_s: 0 for none.

    Goes on while control is away. Raises NotFound for one that is not there (any more), and
    QuorumUnavailable after `limit_s` seconds.
    """
    try:
        async with asyncio.timeout(limit_s or None), asyncio.TaskGroup() as group:
            tasks = [group.create_task(_follow(client, each, show)) for each in snapshots]
    except TimeoutError:
        raise QuorumUnavailable(
            f"not all of {', '.join(snapshots)} are completed after {limit_s:g} s: they go on by themselves, "
            "see `cairn snapshot list`"
        ) from None
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _follow(client: ControlClient, snapshot: str, show: Meters) -> pb.Snapshot:
    """The snapshot when it has ended."""
    latest = pb.Snapshot()

    def heard(value: pb.Snapshot) -> None:
        nonlocal latest
        latest = value
        show.update(snapshot, amount_of(value))

    while True:
        try:
            await _watch(client, snapshot, heard)
        except QuorumUnavailable as error:
            show.update(snapshot, Amount(latest.progress.bytes_done, latest.progress.bytes_total, note=str(error)))
        if latest.state in _ENDED:
            return latest
        await asyncio.sleep(POLL_S)


async def _watch(client: ControlClient, snapshot: str, heard: Callable[[pb.Snapshot], None]) -> None:
    """Until control says no more; it does when the snapshot has ended, and when it stops itself."""
    with cairn_errors(f"control at {client.address}"):
        async for each in client.snapshots.WatchSnapshot(pb.GetSnapshotRequest(snapshot=snapshot)):
            heard(each)


def amount_of(value: pb.Snapshot) -> Amount:
    """How far the shipping of a snapshot is."""
    progress = value.progress
    if value.state != pb.SNAPSHOT_STATE_PENDING:
        done = value.statistics.changed_bytes
        return Amount(done, done, note=snapshot_state(value))
    note = progress.why or ("" if value.sealed_at_ms else "being sealed")
    return Amount(progress.bytes_done, progress.bytes_total, rate=progress.rate_bytes or None, note=note)


def refuse_failed(snapshots: Sequence[pb.Snapshot]) -> None:
    """Raises Conflict where one of them is in error, with the reasons and what to do, or is being deleted."""
    failed = [each for each in snapshots if each.state == pb.SNAPSHOT_STATE_ERROR]
    if failed:
        reasons = "; ".join(f"{each.id} is in error: {each.reason or 'no reason known'}" for each in failed)
        retry = " or ".join(f"`cairn snapshot retry {each.id}`" for each in failed if each.sealed_at_ms)
        advice = f"try again with {retry}" if retry else "never sealed, so delete it and take another"
        raise Conflict(f"{reasons}; {advice}")
    if leaving := [each.id for each in snapshots if each.state == pb.SNAPSHOT_STATE_DELETING]:
        raise Conflict(f"{', '.join(leaving)} {'are' if len(leaving) > 1 else 'is'} being deleted: take another")
