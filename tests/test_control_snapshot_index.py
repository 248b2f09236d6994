"""The index of snapshots is, after any changes, what it would be if it were made of all of them anew."""

from dataclasses import replace
from random import Random

import pytest

from blockstore.control.snapshot_index import SnapshotIndex
from blockstore.control.snapshot_records import Snapshot, SnapshotState
from blockstore.domain import SnapshotId, VolumeId

VOLUMES = [VolumeId(f"vol-{number:017x}") for number in range(3)]


def drawn(random: Random, number: int) -> Snapshot:
    """Snapshot `number`, at any time of its life; some are as old as others."""
    made = Snapshot(
        SnapshotId(f"snap-{number:017x}"),
        VOLUMES[number % 3],
        "v",
        4096,
        random.choice(list(SnapshotState)),
        number // 2,
    )
    return replace(made, generation=random.randrange(9), pinned=random.random() < 0.5)


def superseded(snapshots: list[Snapshot]) -> set[SnapshotId]:
    """As it is defined."""
    completed = [each for each in snapshots if each.state is SnapshotState.COMPLETED]
    return {
        each.id
        for each in completed
        if each.pinned and any(o.volume == each.volume and o.generation > each.generation for o in completed)
    }


@pytest.mark.parametrize("seed", range(20))
def test_it_follows_any_changes(seed: int) -> None:
    random, index, model = Random(seed), SnapshotIndex(), dict[SnapshotId, Snapshot]()
    for _ in range(300):
        if random.random() < 0.3:
            gone = SnapshotId(f"snap-{random.randrange(30):017x}")
            model.pop(gone, None)
            index.remove(gone)
        else:
            now = drawn(random, random.randrange(30))
            model[now.id] = now
            index.put(now)
        by_age = sorted(model.values(), key=lambda each: (each.created_at_ms, each.id))
        assert list(index.all) == list(SnapshotIndex(model.values()).all) == by_age
        assert index.all is index.all
        assert list(index.unfinished) == [each for each in by_age if each.state is not SnapshotState.COMPLETED]
        kept = [each for each in by_age if each.state is SnapshotState.COMPLETED and each.pinned]
        assert sorted(each.id for each in index.kept) == sorted(each.id for each in kept)
        assert {each.id for each in index.superseded()} == superseded(by_age)
        assert all(index.find(each.id) is each for each in by_age)
    assert index.find("snap-of-nobody") is None
