"""The judge of the crash tests finds what is wrong, and only that."""

import pytest

from tests.crash.model import BLOCK_SECTORS, SECTOR_SIZE, ZERO, Model, Wrong, stamp

FIRST, COUNT = 16, 8


@pytest.fixture
def model() -> Model:
    return Model(FIRST, COUNT)


def test_what_was_never_written_is_zero(model: Model) -> None:
    model.check(FIRST, bytes(COUNT * SECTOR_SIZE))
    with pytest.raises(Wrong, match="sector 16"):
        model.check(FIRST, stamp(1, FIRST))


def test_a_lost_write_is_wrong(model: Model) -> None:
    for _ in range(2):
        version = model.next_version()
        model.acknowledged(version, 17, 2)
    model.check(17, model.content(2, 17, 2))
    with pytest.raises(Wrong, match=r"sector 18 .* version 1 of sector 18, expected version 2"):
        model.check(17, model.content(2, 17, 1) + model.content(1, 18, 1))


def test_content_of_another_sector_is_wrong(model: Model) -> None:
    model.acknowledged(model.next_version(), 17, 2)
    with pytest.raises(Wrong, match="version 1 of sector 17"):
        model.check(18, stamp(1, 17))


def test_an_open_write_may_show_or_not_and_then_stays_so(model: Model) -> None:
    model.acknowledged(model.next_version(), 16, 2)
    model.unknown(model.next_version(), 16, 2)
    model.check(16, stamp(1, 16))
    model.check(17, stamp(2, 17))
    with pytest.raises(Wrong):
        model.check(16, stamp(2, 16))
    with pytest.raises(Wrong):
        model.check(17, stamp(1, 17))


def test_an_acknowledged_write_covers_open_ones(model: Model) -> None:
    model.unknown(model.next_version(), 16, 1)
    model.unknown(ZERO, 16, 1)
    model.acknowledged(model.next_version(), 16, 1)
    model.check(16, stamp(2, 16))
    for old in (ZERO, 1):
        with pytest.raises(Wrong):
            model.check(16, stamp(old, 16))


def test_a_trim_empties_whole_blocks_and_may_leave_the_edges() -> None:
    model = Model(0, 4 * BLOCK_SECTORS)
    model.acknowledged(model.next_version(), 0, 4 * BLOCK_SECTORS)
    model.trimmed(BLOCK_SECTORS - 1, 2 * BLOCK_SECTORS)
    model.check(BLOCK_SECTORS - 1, stamp(1, BLOCK_SECTORS - 1))
    model.check(2 * BLOCK_SECTORS, bytes((BLOCK_SECTORS - 1) * SECTOR_SIZE))
    model.check(BLOCK_SECTORS, bytes(BLOCK_SECTORS * SECTOR_SIZE))
    with pytest.raises(Wrong):
        model.check(BLOCK_SECTORS, stamp(1, BLOCK_SECTORS))
    model.trimmed(3 * BLOCK_SECTORS + 1, 2)
    model.check(3 * BLOCK_SECTORS, model.content(1, 3 * BLOCK_SECTORS, BLOCK_SECTORS))
