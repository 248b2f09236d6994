"""The index of overlaps against a list that is scanned from its end."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.record import Operation, OperationKind
from blockstore.replication.in_flight import OverlapIndex, Write
from blockstore.units import EXTENT_BLOCKS, BlockNumber
from tests.replication_parts import trim

SEAL = Operation(OperationKind.SEAL)


def scanned(writes: list[Write], start: int, count: int) -> Write | None:
    for write in reversed(writes):
        operation = write.operation
        if operation.on_blocks and operation.start < start + count and start < operation.end:
            return write
    return None


_COUNTS = st.sampled_from([1, 1, 2, 5, EXTENT_BLOCKS, EXTENT_BLOCKS + 1, 3 * EXTENT_BLOCKS])
_STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "seal", "commit", "ask"]), st.integers(0, 900), _COUNTS))


@settings(deadline=None)
@given(_STEPS)
def test_as_a_list(steps: list[tuple[str, int, int]]) -> None:
    index, writes, number = OverlapIndex(), list[Write](), 0
    for what, start, count in steps:
        if what in ("add", "seal"):
            number += 1
            write = Write(number, number, trim(start, count) if what == "add" else SEAL, 0.0)
            expected = scanned(writes, start, count) if what == "add" else None
            index.add(write)
            writes.append(write)
            assert write.after == (expected.number if expected else 0)
        elif what == "commit" and writes:
            index.remove(writes.pop(0))
        assert index.newest_over(start, count) is scanned(writes, start, count)


def test_a_narrow_write_over_a_wide_one_and_the_other_way_round() -> None:
    index = OverlapIndex()
    wide = Write(1, 1, trim(0, 1000), 0.0)
    narrow = Write(2, 2, Operation(OperationKind.TRIM, BlockNumber(7), 1), 0.0)
    wider = Write(3, 3, trim(0, 2000), 0.0)
    for write in (wide, narrow, wider):
        index.add(write)
    assert (narrow.after, wider.after) == (1, 2)
    assert index.newest_over(7, 1) is wider
    index.remove(wide)
    assert index.newest_over(1500, 1) is wider
