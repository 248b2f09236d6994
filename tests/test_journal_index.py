"""The index of records: what it finds is what a plain list of the log would."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from blockstore.domain import ORIGIN
from blockstore.storage.journal_format import PAGE, GroupItem
from blockstore.storage.journal_index import RUN_BYTES, Place, RecordIndex
from tests.journal_cases import replica

A, B = replica(1), replica(2)


def item(first: int, last: int, *, restarts: bool = False) -> GroupItem:
    return GroupItem(A, ORIGIN, 1, 0, first, last, restarts)


GROUPS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4), st.booleans(), st.booleans()), max_size=40)


@given(groups=GROUPS)
def test_against_a_dictionary(groups: list[tuple[int, int, bool, bool]]) -> None:
    """A record replaces what stood at its sequence and above; a restart drops all; a new file now and then."""
    index, model, offset = RecordIndex(), dict[int, int](), 0
    place = Place(Path("file"), 0)
    for number, (first, more, restart, new_file) in enumerate(groups):
        restarts = restart and number % 5 == 0
        if new_file and number % 4 == 0:
            place, offset = Place(Path(f"file{number}"), number), 0
        index.add((item(first, first + more, restarts=restarts),), place, offset, offset + PAGE)
        offset += PAGE
        model = {} if restarts else {at: group for at, group in model.items() if at < first}
        model |= dict.fromkeys(range(first, first + more + 1), number)
    for after in range(36):
        for up_to in (after + 1, 40):
            runs = index.find(A, after, up_to)
            held = 0
            while after + 1 + held in model and after + held < up_to:
                held += 1
            assert (runs is None) == (held == 0)
            if runs:
                assert [s for run in runs for s in range(run.first, run.last + 1)] == [
                    after + 1 + i for i in range(held)
                ]


def test_a_lone_writer_takes_one_run_for_many_groups_up_to_a_bound() -> None:
    index, place = RecordIndex(), Place(Path("file"), 1)
    count = 4 * RUN_BYTES // PAGE
    for number in range(count):
        index.add((item(number + 1, number + 1),), place, number * PAGE, (number + 1) * PAGE)
    runs = index.find(A, 0, count)
    assert runs is not None
    assert len(runs) == 4
    assert max(run.end - run.start for run in runs) == RUN_BYTES


def test_a_reused_file_takes_its_runs_along() -> None:
    index = RecordIndex()
    old, new = Place(Path("file"), 1), Place(Path("file"), 2)
    index.add((item(1, 3),), old, 0, PAGE)
    index.add((item(4, 5),), new, 0, PAGE)
    index.drop_place(old)
    assert index.find(A, 0, 9) is None
    assert [run.first for run in index.find(A, 3, 9) or ()] == [4]
    index.drop_place(new)
    assert list(index.replicas()) == []


def test_who_has_no_records_has_no_runs() -> None:
    index = RecordIndex()
    index.add((item(0, 0),), Place(Path("file"), 1), 0, PAGE)
    assert index.find(A, 0, 9) is None
    assert index.find(B, 0, 9) is None
