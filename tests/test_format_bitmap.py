"""Bitmaps of blocks against sets of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd import bitmap

_NUMBERS = st.integers(1, 400).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1))))


@given(_NUMBERS)
def test_a_bitmap_is_a_set_of_numbers(case: tuple[int, set[int]]) -> None:
    count, numbers = case
    bits = bitmap.from_numbers(numbers, count)
    assert len(bits) == -(-count // 8)
    assert list(bitmap.numbers(bits)) == sorted(numbers)
    assert {number for number in range(8 * len(bits)) if bits[number // 8] & 1 << number % 8} == numbers


@given(_NUMBERS)
def test_runs_are_the_set_bits_and_do_not_touch(case: tuple[int, set[int]]) -> None:
    count, numbers = case
    runs = list(bitmap.runs(bitmap.from_numbers(numbers, count)))
    assert [number for start, length in runs for number in range(start, start + length)] == sorted(numbers)
    ends = [start + length for start, length in runs]
    assert all(end < start for end, (start, _) in zip(ends, runs[1:], strict=False))
    assert bitmap.from_runs(runs, count) == bitmap.from_numbers(numbers, count)


def test_the_order_of_bits_is_the_one_of_the_protocol() -> None:
    assert bitmap.from_numbers([0, 9], 16) == b"\x01\x02"


@pytest.mark.parametrize("number", [-1, 8])
def test_a_number_outside_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="outside a bitmap of 8 bits"):
        bitmap.from_numbers([number], 8)
    with pytest.raises(ValueError, match="outside a bitmap of 8 bits"):
        bitmap.from_runs([(number, 1)], 8)
