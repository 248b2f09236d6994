"""A run of records against a plain list."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.domain import ORIGIN
from blockstore.record import Operation, OperationKind
from blockstore.replication.record_run import RecordRun, earlier, generation_after
from tests.replication_parts import at, read_all_of, record, run_of


def test_what_a_run_holds() -> None:
    run = RecordRun(at(1, 2), run_of(1, 3, 5))
    assert (run.start, run.end, len(run)) == (at(1, 2), at(1, 5), 3)
    assert run.holds(at(1, 2))
    assert run.holds(at(1, 5))
    assert not run.holds(at(2, 5))
    assert run.position_at(1) is None
    assert run.position_at(6) is None


def test_an_empty_run_ends_where_it_starts() -> None:
    run = RecordRun(ORIGIN)
    assert run.end == ORIGIN
    assert run.last is None
    assert run.holds(ORIGIN)


def test_a_chunk_has_at_least_one_record_and_stops_at_its_limit() -> None:
    records = run_of(1, 1, 4)
    run, size = RecordRun(ORIGIN, records), len(records[0].encoded)
    assert run.chunk(2, 1) == records[1:2]
    assert run.chunk(1, 2 * size) == records[:2]
    assert run.chunk(3, 100 * size) == records[2:]


def test_shrinking_frees_an_eighth_and_stops_below_what_is_needed() -> None:
    run = RecordRun(ORIGIN, run_of(1, 1, 16))
    limit = run.size_bytes - 1
    run.shrink(limit, below=16)
    assert run.size_bytes <= limit - limit // 8
    run.shrink(0, below=10)
    assert run.start == at(1, 9)


def test_size_after_says_where_something_is_missing() -> None:
    run = RecordRun(at(1, 2), run_of(1, 3, 5))
    assert run.size_after(2) == run.size_bytes
    assert run.size_after(5) == 0
    assert run.size_after(1) is None


def test_a_seal_at_the_end_of_a_record_begins_a_generation() -> None:
    seal = record(at(1, 1), ORIGIN, Operation(OperationKind.SEAL))
    assert generation_after(seal) == 2
    assert generation_after(run_of(1, 1, 1)[0]) == 1


def test_of_two_positions_of_one_log_the_sequence_decides() -> None:
    assert earlier(at(1, 5), at(2, 6)) == at(1, 5)
    assert earlier(at(2, 6), at(1, 5)) == at(1, 5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "truncate", "forget"]), st.integers(0, 6)), max_size=30))
def test_as_a_list_with_a_start(steps: list[tuple[str, int]]) -> None:
    run, plain, start, epoch = RecordRun(ORIGIN), [ORIGIN], 0, 1
    for what, count in steps:
        inside = min(len(plain) - 1, count)
        if what == "append":
            for new in run_of(epoch, plain[-1].sequence + 1, plain[-1].sequence + count, plain[-1]) if count else ():
                run.append(new)
                plain.append(new.position)
        elif what == "truncate":
            run.truncate(start + inside)
            del plain[inside + 1 :]
            epoch += 1
        else:
            run.forget(plain[inside])
            del plain[:inside]
            start += inside
        assert [run.position_at(start + index) for index in range(len(plain))] == plain
        assert read_all_of(run.between(start, start + len(plain) - 1)) == plain[1:]
        assert run.size_bytes == sum(len(r.encoded) for r in run.between(start, start + len(plain) - 1))
