"""A frame: up to 64 blocks of one key domain that are compressed and encrypted as one.

It is what a lazy read fetches, by one ranged GET. The blocks lie one after the other in a body (`compression`),
which is encrypted under the key of the frame's pack, with the frame's number as nonce; so a frame in another place
than its own (another pack, number, domain) fails its authentication. Compressing needs no key and no number and
lets the GIL go: it may run on threads, ahead of the pack. Source: docs/format.md, "Frames".
"""

from collections.abc import Iterable, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag

from blockstore.errors import Corrupt
from blockstore.units import BLOCK_SIZE
from snapshotd.compression import DEFAULT_LEVEL, HEADER_SIZE, compress, expand
from snapshotd.crypto import TAG_SIZE, DomainKeys

FRAME_BLOCKS: Final = 64
MAX_FRAME_CONTENT: Final = FRAME_BLOCKS * BLOCK_SIZE
#: A frame that did not shrink: nothing longer is read or written.
MAX_STORED_FRAME: Final = MAX_FRAME_CONTENT + HEADER_SIZE + TAG_SIZE
#: The empty zstd frame is longer, and no frame is empty.
MIN_STORED_FRAME: Final = HEADER_SIZE + TAG_SIZE + 1


def compress_frame(blocks: Sequence[bytes | memoryview], level: int = DEFAULT_LEVEL) -> bytes:
    """The body of a frame of 1 to 64 whole blocks, in any pieces: what `FrameCipher.encrypt` takes."""
    content = b"".join(blocks)
    if not 0 < len(content) <= MAX_FRAME_CONTENT or len(content) % BLOCK_SIZE:
        raise ValueError(f"{len(content)} bytes make no frame")
    return compress(content, level)


def decode_frame(keys: DomainKeys, pack: bytes, number: int, stored: bytes) -> list[bytes]:
    """The blocks of frame `number` of the pack with id `pack` (16 bytes), by slot. Raises Corrupt as `open_frame`."""
    content = open_frame(keys, pack, number, stored)
    return [content[at : at + BLOCK_SIZE] for at in range(0, len(content), BLOCK_SIZE)]


def open_frame(keys: DomainKeys, pack: bytes, number: int, stored: bytes) -> bytes:
    """The same blocks as they lie, one after the other.

    Raises Corrupt where the bytes are not that frame, whole and unchanged.
    """
    (body,) = open_bodies(keys, pack, [(number, stored)])
    content = expand(body, MAX_FRAME_CONTENT, _name(pack, number))
    if not content or len(content) % BLOCK_SIZE:
        raise Corrupt(f"{_name(pack, number)} holds {len(content)} bytes: whole blocks are needed")
    return content


def open_bodies(keys: DomainKeys, pack: bytes, frames: Iterable[tuple[int, bytes | memoryview]]) -> list[bytes]:
    """The bodies of stored frames of one pack, each with its number, authenticated. Raises Corrupt as `open_frame`."""
    cipher = keys.frame_cipher(pack)
    bodies = []
    for number, stored in frames:
        if not MIN_STORED_FRAME <= len(stored) <= MAX_STORED_FRAME:
            raise Corrupt(
                f"{_name(pack, number)} has {len(stored)} bytes: {MIN_STORED_FRAME} to {MAX_STORED_FRAME} are possible"
            )
        try:
            bodies.append(cipher.decrypt(number, stored))
        except InvalidTag as error:
            raise Corrupt(
                f"{_name(pack, number)} fails its authentication: it was changed, or belongs elsewhere"
            ) from error
    return bodies


def _name(pack: bytes, number: int) -> str:
    return f"frame {number} of pack {pack.hex()}"
