"""What of a read goes as holes, against a model that looks at every byte."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from blockstore.units import BLOCK_SIZE, MIB
from nbd_server.holes import Piece, pieces

#: What a block may hold: only its first byte, its last, some word in the middle, or nothing.
BLOCKS = st.sampled_from([b"", b"x", b"\0" * (BLOCK_SIZE - 1) + b"x", b"\0" * 2000 + b"x", b"x" * BLOCK_SIZE])


@given(st.lists(BLOCKS, max_size=8), st.integers(0, 3 * BLOCK_SIZE), st.integers(0, 9000), st.integers(0, 9000))
def test_runs_are_in_turn_cover_all_and_say_what_is_so(blocks: list[bytes], offset: int, head: int, tail: int) -> None:
    content = b"".join(block.ljust(BLOCK_SIZE, b"\0") for block in blocks)
    data = content[head : max(head, len(content) - tail)]
    for given_data in (data, memoryview(data), bytearray(data)):
        found = pieces(given_data, offset)
        assert [piece.start for piece in found] == [0, *(piece.end for piece in found[:-1])][: len(found)]
        assert (found[-1].end if found else 0) == len(data)
        assert all(first.hole != second.hole for first, second in itertools.pairwise(found))
        for piece in found:
            assert piece.start < piece.end
            zeroes = not any(data[piece.start : piece.end])
            assert zeroes if piece.hole else not _has_zero_block(data, offset, piece)


def _has_zero_block(data: bytes, offset: int, piece: Piece) -> bool:
    """Whether a piece of data has a whole block of zeroes, as blocks lie in the export."""
    first = piece.start + -(offset + piece.start) % BLOCK_SIZE
    starts = range(first, piece.end - BLOCK_SIZE + 1, BLOCK_SIZE)
    return any(not any(data[start : start + BLOCK_SIZE]) for start in starts)


def test_pieces_end_where_blocks_do() -> None:
    data = b"x" * 100 + bytes(2 * BLOCK_SIZE) + b"y" * 50
    assert pieces(data, BLOCK_SIZE - 100) == [
        Piece(0, 100, False),
        Piece(100, 100 + 2 * BLOCK_SIZE, True),
        Piece(100 + 2 * BLOCK_SIZE, len(data), False),
    ]


def test_a_long_run_is_one_piece() -> None:
    assert pieces(bytes(32 * MIB), 0) == [Piece(0, 32 * MIB, True)]
    assert pieces(b"x" * MIB, 5) == [Piece(0, MIB, False)]
