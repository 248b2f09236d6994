"""The drawing of the lineage."""

from blockstore.cli.lineage import lineage
from blockstore.rpc import snapshot_pb2 as pb


def drawing(*snapshots: tuple[str, str, str]) -> list[str]:
    """Of (id, volume, parent), in the order of time: each row, and its depth."""
    messages = [
        pb.Snapshot(id=each, volume=volume, parent=parent, created_at_ms=number)
        for number, (each, volume, parent) in enumerate(snapshots)
    ]
    return [f"{row.drawing}{row.snapshot.id} {row.depth}" for row in lineage(messages)]


def test_nothing() -> None:
    assert drawing() == []


def test_one_volume_is_one_line() -> None:
    assert drawing(("a", "db", ""), ("b", "db", "a"), ("c", "db", "b")) == ["┌ a 0", "├ b 0", "└ c 0"]


def test_restored_volumes_branch_off() -> None:
    assert drawing(
        ("1", "db", ""), ("2", "copy", "1"), ("3", "copy", "2"), ("4", "db", "1"), ("5", "another", ""), ("6", "x", "3")
    ) == ["┌ 1 0", "├─┬ 2 1", "│ ├ 3 1", "│ └── 6 2", "└ 4 0", "─ 5 0"]


def test_branches_without_an_end_of_the_line() -> None:
    assert drawing(("1", "db", ""), ("2", "x", "1"), ("3", "y", "1")) == ["┌ 1 0", "├── 2 1", "└── 3 1"]


def test_one_whose_parent_is_gone_begins_a_line() -> None:
    assert drawing(("2", "db", "1"), ("3", "db", "2")) == ["┌ 2 0", "└ 3 0"]


def test_two_of_the_same_volume_upon_one() -> None:
    assert drawing(("1", "db", ""), ("2", "db", "1"), ("3", "db", "1")) == ["┌ 1 0", "├── 3 1", "└ 2 0"]


def test_chains_longer_than_the_stack() -> None:
    clones = [(f"{n:05}", f"volume {n}", f"{n - 1:05}") for n in range(5000)]
    rows = drawing(*clones)
    assert len(rows) == 5000
    assert rows[-1].endswith("04999 4999")
