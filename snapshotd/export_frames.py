"""Export as frames: a snapshot's content as it is stored but for the encryption, with what goes where.

For who writes it to a file: a frame crosses compressed and is unpacked there, on as many threads as there are, and
each of its blocks goes to every place that shows it. A frame is read once for each shard that names it; frames that
lie one behind the other in an object come by one request. What is under way is bounded; nothing is kept.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import groupby
from typing import Final, NamedTuple

import xxhash

from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.ahead import ahead
from snapshotd.manifest import SHARD_BLOCKS, FramePart, Shard
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root

#: In one message: 2 MiB where nothing shrank, of the 4 MiB that gRPC takes.
_FRAMES: Final = 8
#: Messages that are made or wait to be handed on.
_WIDTH: Final = 6


class _Batch(NamedTuple):
    """Frames of one pack, by number, with their parts in the shard that begins with block `first` of the volume."""

    pack: bytes
    first: int
    frames: dict[int, list[FramePart]]


async def export_frames(reader: SnapshotReader, root: Root) -> AsyncGenerator[pb.ExportResponse, None]:
    """All that is mapped, shard by shard, in no order within one. Raises Corrupt, QuorumUnavailable."""

    async def load(batch: _Batch) -> pb.ExportResponse:
        bodies = await reader.bodies(batch.pack, list(batch.frames))
        return pb.ExportResponse(
            frames=[
                pb.ExportedFrame(
                    body=body,
                    checksum=xxhash.xxh3_64_intdigest(body),
                    blocks=[batch.first + part.start for part in parts],
                    slots=[part.slot for part in parts],
                    counts=[part.length for part in parts],
                )
                for body, parts in zip(bodies, batch.frames.values(), strict=True)
            ]
        )

    async with aclosing(ahead(load, _batches(reader, root), _WIDTH)) as messages:
        async for message in messages:
            yield message


async def _batches(reader: SnapshotReader, root: Root) -> AsyncGenerator[_Batch, None]:
    for number in sorted(root.shards):
        shard = await reader.shard(root, number, background=True)
        assert shard is not None, "the root names it"
        for batch in _batches_of(shard, number * SHARD_BLOCKS):
            yield batch


def _batches_of(shard: Shard, first: int) -> Iterator[_Batch]:
    """The frames that a shard names, in the order in which they are stored."""
    parts = sorted(shard.parts(0, SHARD_BLOCKS), key=lambda part: (part.pack, part.frame))
    for pack, of_pack in groupby(parts, key=lambda part: part.pack):
        batch = _Batch(pack, first, {})
        for number, of_frame in groupby(of_pack, key=lambda part: part.frame):
            batch.frames[number] = list(of_frame)
            if len(batch.frames) == _FRAMES:
                yield batch
                batch = _Batch(pack, first, {})
        if batch.frames:
            yield batch
