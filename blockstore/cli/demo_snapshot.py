"""The second half of `cairn demo`: a snapshot into the object store, and a volume restored from it at once.

The restored volume is read while its blocks are still on their way, and compared with what was written. Its
background copying is slowed down at first, for otherwise there would be nothing to see.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Final

from blockstore.cli.attaching import attach_and_wait, until_state
from blockstore.cli.client import ControlClient, wait_until
from blockstore.cli.demo_load import CHUNK_BYTES, Load
from blockstore.cli.following import refuse_failed, until_ended
from blockstore.cli.meters import Amount
from blockstore.cli.screen import Steps
from blockstore.errors import Corrupt, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2
from blockstore.units import BLOCK_SIZE, format_size
from nbd_server import uri as nbd_uri

RESTORED_NAME: Final = "demo-restored"
WAIT_S: Final = 60.0
_SLOW_S: Final = 20
"""The background would take so long at the rate that the restored volume begins with."""
_CHANGES: Final = 16
"""Chunks that are overwritten between the first snapshot and the second."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What the demo made: the first snapshot, the second, and the volume that came from the first."""

    first: snapshot_pb2.Snapshot
    second: snapshot_pb2.Snapshot
    volume: pb.Volume


async def snapshot_and_restore(client: ControlClient, volume: pb.Volume, load: Load, steps: Steps) -> Restored:
    """From the volume with the load's data to a second one with the same, compared byte by byte. Raises Corrupt."""
    repeated = await load.repeat(load.size_bytes // 4)
    steps(
        "demo", f"wrote the first {format_size(repeated)} once more, at the end: the object store will keep them once"
    )
    first = await _snapshot(client, volume, "first", steps)
    changed = await _overwrite_some(volume, load)
    steps("demo", f"overwrote {format_size(changed)} of {volume.name} here and there")
    second = await _snapshot(client, volume, "second", steps)
    restored = await _restore(client, first, load, steps)
    await _read_while_hydrating(client, restored, load, steps)
    await _until_hydrated(client, restored, steps)
    return Restored(first, second, await client.volume(restored.id))


class _Quiet:
    """Shows nothing: the steps say enough."""

    def update(self, name: str, amount: Amount) -> None:
        """Nothing."""


async def _snapshot(client: ControlClient, volume: pb.Volume, which: str, steps: Steps) -> snapshot_pb2.Snapshot:
    began = time.monotonic()
    request = snapshot_pb2.CreateSnapshotRequest(volumes=[volume.id], description=f"the {which} of cairn demo")
    (created,) = (await client.call(client.snapshots.CreateSnapshot, request)).snapshots
    refuse_failed([created])
    sealed_ms = (time.monotonic() - began) * 1000
    steps("snapshot", f"the {which}, {created.id}, was taken in {sealed_ms:.0f} ms; it is shipped while I/O goes on")
    ended = await until_ended(client, [created.id], WAIT_S, _Quiet())
    refuse_failed(ended)
    seconds, sizes = time.monotonic() - began, ended[0].statistics
    steps(
        "snapshotd",
        f"{created.id} is whole in the object store after {seconds:.1f} s: {format_size(sizes.changed_bytes)} changed, "
        f"{format_size(sizes.deduplicated_bytes)} of it there already, {format_size(sizes.stored_bytes)} stored "
        "(compressed, encrypted)",
    )
    return ended[0]


async def _overwrite_some(volume: pb.Volume, load: Load) -> int:
    """Change what the load wrote, without telling it: it still knows what the first snapshot must show."""
    chunks = load.size_bytes // CHUNK_BYTES
    places = range(0, chunks, max(1, chunks // _CHANGES))
    async with await load.connect(_target(volume)) as nbd:
        for place in places:
            await nbd.write(place * CHUNK_BYTES, os.urandom(BLOCK_SIZE))
    return len(places) * BLOCK_SIZE


async def _restore(client: ControlClient, snapshot: snapshot_pb2.Snapshot, load: Load, steps: Steps) -> pb.Volume:
    """A volume that has the snapshot's content, served."""
    began = time.monotonic()
    request = pb.CreateVolumeRequest(
        name=RESTORED_NAME,
        client_token=RESTORED_NAME,
        snapshot=snapshot.id,
        init_rate_bytes=max(BLOCK_SIZE, snapshot.size_bytes // _SLOW_S),
    )
    volume = await client.call(client.stub.CreateVolume, request)
    volume = await until_state(client, volume, pb.VOLUME_STATE_AVAILABLE, WAIT_S)
    volume = await attach_and_wait(client, pb.AttachVolumeRequest(volume=volume.id), WAIT_S, lambda _: None)
    steps("volume", f"restored it as {volume.id}, attached after {time.monotonic() - began:.1f} s: {_uri(volume)}")
    async with await load.connect(_target(volume)) as nbd:
        asked = time.monotonic()
        await nbd.read(volume.size_bytes // 2 // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE)
        took_ms = (time.monotonic() - asked) * 1000
    steps("demo", f"read a block in its middle in {took_ms:.0f} ms; {_how_far(await client.volume(volume.id))}")
    return volume


async def _read_while_hydrating(client: ControlClient, volume: pb.Volume, load: Load, steps: Steps) -> None:
    """Compare all of it while the background is slow, then let that go."""
    steps("volume", f"reading all of {volume.name} while it hydrates")
    comparing = asyncio.create_task(load.wrong_offsets(_target(volume)))
    while not (await asyncio.wait({comparing}, timeout=1.0))[0]:
        steps("volume", _how_far(await client.volume(volume.id)))
    wrong = comparing.result()
    if wrong:
        raise Corrupt(
            f"{_uri(volume)} is not as its snapshot in {len(wrong)} places, the first at byte {wrong[0]}: "
            "please report it"
        )
    steps("demo", f"{format_size(load.size_bytes)} compared: every byte as it was when the first snapshot was taken")


async def _until_hydrated(client: ControlClient, volume: pb.Volume, steps: Steps) -> None:
    """Let the background go as fast as it can, and wait until it is done."""
    request = snapshot_pb2.SetHydrationRequest(volume=volume.id, rate_bytes=0)
    if (await client.volume(volume.id)).HasField("source"):
        await client.call(client.snapshots.SetHydration, request)
    latest = volume

    async def hydrated() -> bool | None:
        nonlocal latest
        latest = await client.volume(volume.id)
        return None if latest.HasField("source") else True

    await wait_until(hydrated, WAIT_S, lambda: QuorumUnavailable(f"{volume.id} is not hydrated: {_how_far(latest)}"))
    steps("volume", f"{volume.name} is hydrated: it needs its snapshot no more")


def _how_far(volume: pb.Volume) -> str:
    """How much of it has come."""
    if not volume.HasField("source"):
        return "all of it has come"
    known = volume.hydration
    if not known.blocks_total:
        return "nothing has come yet"
    return f"{100 * known.blocks_done / known.blocks_total:.0f}% has come from the object store"


def _uri(volume: pb.Volume) -> str:
    return volume.attachment.uris[0]


def _target(volume: pb.Volume) -> nbd_uri.NbdTarget:
    return nbd_uri.parse_uri(_uri(volume))
