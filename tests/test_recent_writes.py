"""What tables have to reflect for a read out of them: never less than the last record that touched its blocks."""

import hypothesis.strategies as st
from hypothesis import given

from blockstore.record import Operation, OperationKind
from blockstore.replication import recent_writes
from blockstore.replication.recent_writes import RecentWrites
from blockstore.units import BLOCK_SIZE, BlockNumber, Sequence

_BLOCKS = 700
FLOOR = 5


def touching(start: int, count: int, kind: OperationKind = OperationKind.TRIM) -> Operation:
    return Operation(kind, BlockNumber(start), count)


def noted(*operations: Operation) -> RecentWrites:
    """Each in a record of its own, behind FLOOR."""
    recent = RecentWrites(FLOOR)
    for sequence, operation in enumerate(operations, FLOOR + 1):
        recent.note(sequence, operation)
    return recent


def test_what_came_before_is_as_new_as_the_floor() -> None:
    assert noted().newest(0, 1) == FLOOR


def test_the_last_record_that_touched_a_block_counts() -> None:
    recent = noted(touching(0, 1), touching(1, 2), touching(0, 1), touching(0, 600))
    assert [recent.newest(block, 1) for block in (0, 1, 2, 599, 600)] == [9, 9, 9, 9, FLOOR]
    assert noted(touching(0, 1), touching(1, 2)).newest(0, 4) == 7


def test_each_kind_of_operation_on_blocks_counts_and_no_other() -> None:
    for kind in OperationKind:
        operation = Operation(kind, BlockNumber(3), 1 if Operation(kind).on_blocks else 0)
        assert (noted(operation).newest(3, 1) > FLOOR) is operation.on_blocks, kind


def test_what_is_reflected_is_forgotten_and_not_asked_of_anybody_less() -> None:
    recent = noted(touching(0, 1), touching(1, 1))
    recent.reflected(7)
    recent.note(8, touching(2, 1))
    recent.reflected(7)
    assert recent.newest(0, 1) == 7  # of another replica's tables, which may be behind
    assert recent.newest(2, 1) == 8


def test_more_than_is_remembered_is_asked_for_as_a_whole() -> None:
    ranges = [touching(0, 600)] * (recent_writes._MAX_RANGES + 1)
    recent = noted(*ranges)
    assert recent.newest(650, 1) == FLOOR + len(ranges)
    payload = Operation(OperationKind.WRITE, BlockNumber(0), 256, bytes(256 * BLOCK_SIZE))
    recent = RecentWrites(0)
    count = recent_writes._MAX_BLOCKS // 256 + 1
    for sequence in range(1, count + 1):
        recent.note(sequence, Operation(payload.kind, BlockNumber(sequence * 256), 256, payload.data))
    assert recent.newest(0, 1) == count


_OPERATIONS = st.builds(touching, st.integers(0, _BLOCKS - 1), st.sampled_from((1, 2, 5, 256, 257, 600)))
_STEPS = st.lists(st.one_of(_OPERATIONS, st.integers(0, 40).map(Sequence)), max_size=40)


@given(_STEPS, st.integers(0, _BLOCKS - 1), st.sampled_from((1, 3, 256, 300)))
def test_never_less_than_is_true_and_no_more_than_was_reflected(
    steps: list[Operation | Sequence], start: int, count: int
) -> None:
    """An integer step: the tables reflect all up to that many records ago."""
    recent, sequence, reflected, true = RecentWrites(0), 0, 0, 0
    for step in steps:
        if isinstance(step, Operation):
            sequence += 1
            recent.note(sequence, step)
            if step.start < start + count and start < step.end:
                true = sequence
        else:
            reflected = max(reflected, sequence - step)
            recent.reflected(reflected)
        found = recent.newest(start, count)
        assert found == true or true < found <= reflected
