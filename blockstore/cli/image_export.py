"""How an exported image comes: to a stream in order, to a file as frames, which go wherever their blocks are shown.

Frames are unpacked here, on as many threads as there are processors, while others are on their way; a few messages
of some MiB are in memory. Disk and pipe are waited for in threads: who does not answer probes is cut off.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import xxhash

from blockstore.cli.image_output import HoleFile, ImageOutput
from blockstore.cli.meters import Amount, Meters, Rate
from blockstore.cli.store_client import StoreClient
from blockstore.errors import Corrupt
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.compression import expand
from snapshotd.frame import MAX_FRAME_CONTENT

#: Messages that are unpacked and written, or wait for it, for each thread.
_WAITING: Final = 2
#: Bytes, written behind the back of what comes: else the disk has nothing to do until the end, and much then.
_SYNC_EVERY: Final = 64 * MIB

Progress = Callable[[int], None]
"""Told how many bytes are written."""


async def export_image(store: StoreClient, snapshot: pb.Snapshot, target: ImageOutput, show_work: Meters) -> int:
    """How many bytes of data came. Raises what the store answers, and Corrupt."""
    rate, total = Rate(), snapshot.statistics.logical_bytes

    def show(done: int) -> None:
        show_work.update(snapshot.id, Amount(done, max(done, total), rate=rate.after(done)))

    if isinstance(target, HoleFile):
        done = await _export_frames(store, snapshot.id, target, show)
    else:
        done = await _export_in_order(store, snapshot.id, target, show)
    await asyncio.to_thread(target.finish, snapshot.size_bytes)
    return done


async def _export_in_order(store: StoreClient, snapshot: str, target: ImageOutput, show: Progress) -> int:
    done = 0
    async for each in store.stream(store.stub.Export, pb.ExportRequest(snapshot=snapshot)):
        await asyncio.to_thread(target.write, each.offset, each.data)
        done += len(each.data)
        show(done)
    return done


async def _export_frames(store: StoreClient, snapshot: str, target: HoleFile, show: Progress) -> int:
    count = os.cpu_count() or 1
    done, working = 0, set[asyncio.Future[int]]()
    with ThreadPoolExecutor(count + 1, "unpack") as threads:
        run = partial(asyncio.get_running_loop().run_in_executor, threads)
        syncing, synced = run(target.sync), 0
        try:
            async for each in store.stream(store.stub.Export, pb.ExportRequest(snapshot=snapshot, frames=True)):
                working.add(run(_write, target, each))
                if len(working) >= _WAITING * count:
                    done, working = await _go_on(done, working)
                    show(done)
                if syncing.done() and done - synced >= _SYNC_EVERY:
                    await syncing
                    syncing, synced = run(target.sync), done
            while working:
                done, working = await _go_on(done, working)
                show(done)
            await syncing
        finally:
            await asyncio.gather(*working, syncing, return_exceptions=True)
    return done


async def _go_on(done: int, working: set[asyncio.Future[int]]) -> tuple[int, set[asyncio.Future[int]]]:
    """`done` with what has ended meanwhile, one message at least, and what has not. Raises what one failed with."""
    ended, left = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
    return done + sum([each.result() for each in ended]), left


def _write(target: HoleFile, message: pb.ExportResponse) -> int:
    """How many bytes it brought; one that knows nothing of frames brings data."""
    if message.data:
        target.write(message.offset, message.data)
    return len(message.data) + sum([_write_frame(target, frame) for frame in message.frames])


def _write_frame(target: HoleFile, frame: pb.ExportedFrame) -> int:
    body, written = frame.body, 0
    if xxhash.xxh3_64_intdigest(body) != frame.checksum:
        raise Corrupt("a frame fails its checksum on the way: try again")
    content = memoryview(expand(body, MAX_FRAME_CONTENT, "a frame on its way"))
    for block, slot, count in zip(frame.blocks, frame.slots, frame.counts, strict=True):
        part = content[slot * BLOCK_SIZE : (slot + count) * BLOCK_SIZE]
        if len(part) != count * BLOCK_SIZE:
            raise Corrupt(f"blocks {slot} to {slot + count} of a frame that has {len(content) // BLOCK_SIZE}")
        target.write(block * BLOCK_SIZE, part)
        written += len(part)
    return written
