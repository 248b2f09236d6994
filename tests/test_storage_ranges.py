"""RangeMap against a dict of blocks."""

from hypothesis import given
from hypothesis import strategies as st

from blockstore.storage.ranges import RangeMap

LENGTH = 30
RANGES = st.tuples(st.integers(0, LENGTH - 1), st.integers(1, LENGTH)).map(lambda r: (r[0], min(r[0] + r[1], LENGTH)))


@given(st.lists(st.tuples(RANGES, st.booleans())), RANGES)
def test_the_last_range_over_a_block_counts(
    changes: list[tuple[tuple[int, int], bool]], window: tuple[int, int]
) -> None:
    """Of those that were put; one that was cut leaves nothing."""
    ranges, model = RangeMap[int](), dict[int, int]()
    for sequence, ((start, end), is_put) in enumerate(changes, 1):
        if is_put:
            ranges.put(start, end, sequence)
            model.update(dict.fromkeys(range(start, end), sequence))
        else:
            ranges.cut(start, end)
            model = {number: value for number, value in model.items() if not start <= number < end}
    assert [ranges.find(number) for number in range(LENGTH)] == [model.get(number) for number in range(LENGTH)]
    assert {n: s for start, end, s in ranges for n in range(start, end)} == model
    inside = [(n, s) for start, end, s in ranges.between(*window) for n in range(start, end)]
    assert inside == [(n, model[n]) for n in range(*window) if n in model]
    assert len(ranges) <= 2 * len(changes) + 1


def test_a_volume_long_range_is_one_entry() -> None:
    ranges = RangeMap[int]()
    ranges.put(0, 1 << 34, 1)
    assert len(ranges) == 1
    ranges.put(5, 6, 2)
    assert [ranges.find(n) for n in (0, 5, 6, (1 << 34) - 1, 1 << 34)] == [1, 2, 1, 1, None]
