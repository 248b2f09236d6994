"""Lists of changed blocks against sets of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import InvalidRequest
from blockstore.units import EXTENT_BLOCKS
from blockstore.volume.changes import Changes, Run

BLOCKS = 3 * EXTENT_BLOCKS + 100


@given(st.sets(st.integers(0, 4 * EXTENT_BLOCKS - 1)), st.integers(1, 300))
def test_batches_name_each_changed_block_once_and_in_order(numbers: set[int], limit: int) -> None:
    changes = Changes(BLOCKS)
    for extent in range(4):
        bits = sum(1 << number % EXTENT_BLOCKS for number in numbers if number // EXTENT_BLOCKS == extent)
        changes.add(extent, bits.to_bytes(32, "little"))
    inside = sorted(number for number in numbers if number < BLOCKS)
    assert changes.count == len(inside)
    parts = list(changes.batches(lambda: limit))
    assert [number for runs in parts for start, length in runs for number in range(start, start + length)] == inside
    sizes = [sum(run.length for run in runs) for runs in parts]
    assert all(size == limit for size in sizes[:-1])
    assert not sizes or 0 < sizes[-1] <= limit


def test_a_run_is_cut_where_a_batch_is_full() -> None:
    changes = Changes(BLOCKS)
    changes.add(0, b"\xff" * 32)
    changes.add(2, b"\x01" + bytes(31))
    assert list(changes.batches(lambda: 200)) == [[Run(0, 200)], [Run(200, 56), Run(512, 1)]]


def test_what_a_node_lists_is_checked() -> None:
    changes = Changes(BLOCKS)
    changes.add(1, b"\xff" * 32)
    with pytest.raises(InvalidRequest):
        changes.add(1, b"\xff" * 32)
    with pytest.raises(InvalidRequest):
        changes.add(2, b"\xff" * 31)
