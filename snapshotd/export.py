"""Export: a snapshot's content as a raw image, in order, without its zeroes.

Only mapped blocks are fetched, some pieces ahead of the one that is handed on, so that it takes the store's throughput
and not one latency for each frame; what is handed on slowly is fetched slowly, and memory stays bounded.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, NamedTuple

from blockstore.errors import OutOfRange
from blockstore.units import BLOCK_SIZE
from snapshotd import bitmap
from snapshotd.ahead import ahead
from snapshotd.manifest import SHARD_BLOCKS
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root

#: 1 MiB: a message has to stay under gRPC's limit.
PIECE_BLOCKS: Final = 256
#: Pieces that are fetched or wait to be handed on.
_WIDTH: Final = 16


class Piece(NamedTuple):
    """Content from byte `offset` on; what lies between two pieces is zero."""

    offset: int
    data: bytes


async def export(reader: SnapshotReader, root: Root, offset: int = 0, size: int = 0) -> AsyncGenerator[Piece, None]:
    """The pieces of `size` bytes from byte `offset` on (0: up to the end), in order, none larger than 1 MiB.

    Raises OutOfRange, Corrupt, QuorumUnavailable.
    """
    end = offset + size if size else root.size_bytes
    if not 0 <= offset <= end <= root.size_bytes:
        raise OutOfRange(f"bytes {offset} to {end} of {root.snapshot}, which has {root.size_bytes}")

    async def load(run: tuple[int, int]) -> Piece:
        start, count = run
        _, payload = await reader.read(root, start, count, background=True)
        return _cut(Piece(start * BLOCK_SIZE, payload), offset, end)

    async with aclosing(ahead(load, _runs(reader, root, offset, end), _WIDTH)) as pieces:
        async for piece in pieces:
            yield piece


async def _runs(reader: SnapshotReader, root: Root, offset: int, end: int) -> AsyncGenerator[tuple[int, int], None]:
    """(start, count) of the runs of mapped blocks that touch bytes offset..end, cut to PIECE_BLOCKS."""
    first, behind = offset // BLOCK_SIZE, -(-end // BLOCK_SIZE)
    for number in sorted(root.shards):
        base = number * SHARD_BLOCKS
        if base >= behind or base + SHARD_BLOCKS <= first:
            continue
        mapped = await reader.mapped(root, number, background=True)
        for start, length in bitmap.runs(mapped):
            at, stop = max(base + start, first), min(base + start + length, behind)
            while at < stop:
                # Pieces end where a multiple of their size does: neighbours share few frames then.
                count = min(stop - at, PIECE_BLOCKS - at % PIECE_BLOCKS)
                yield at, count
                at += count


def _cut(piece: Piece, offset: int, end: int) -> Piece:
    """What of `piece` lies in bytes offset..end."""
    before, after = max(0, offset - piece.offset), piece.offset + len(piece.data) - end
    if not before and after <= 0:
        return piece
    return Piece(piece.offset + before, piece.data[before : len(piece.data) - max(0, after)])
