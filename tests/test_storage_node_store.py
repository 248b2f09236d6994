"""A node's data directory across starts, crashes and other processes; and its reserve."""

from pathlib import Path

import pytest

from blockstore.domain import check_id
from blockstore.errors import AlreadyExists, Conflict, Corrupt, InvalidRequest, NotFound
from blockstore.log import LogImage
from blockstore.storage.node_store import NodeStore
from blockstore.storage.space import SpaceGuard
from blockstore.units import BLOCK_SIZE, MIB
from tests.storage_model import Log, address, apply, block, write

REPLICA = address(1).replica


def test_a_node_keeps_its_id_and_its_replicas(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path / "new" / "node")
    check_id("node", store.node)
    assert store.journal_directory.is_dir()
    replica, log = store.create_replica(address(1), LogImage(), mark=3), Log()
    apply(replica, log, [log.record(write(4, block(1)))])
    replica.close()
    store.close()
    again = NodeStore.open(tmp_path / "new" / "node")
    assert (again.node, again.replicas()) == (store.node, (REPLICA,))
    assert again.open_replica(REPLICA).read(4, 1) == block(1)


def test_a_directory_belongs_to_one_process(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    with pytest.raises(Conflict):
        NodeStore.open(tmp_path)
    store.close()
    NodeStore.open(tmp_path).close()


def test_a_place_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "node"):
        with pytest.raises(InvalidRequest, match="cannot be a directory"):
            NodeStore.open(path)


def test_replicas_are_made_once_and_deleted_for_good(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    store.create_replica(address(1), LogImage()).close()
    with pytest.raises(AlreadyExists):
        store.create_replica(address(1), LogImage())
    store.delete_replica(REPLICA)
    assert store.replicas() == ()
    assert list((tmp_path / "replicas").iterdir()) == []
    for call in (store.delete_replica, store.open_replica, store.mark_suspect, store.is_suspect):
        with pytest.raises(NotFound):
            call(REPLICA)
    with pytest.raises(InvalidRequest):
        store.open_replica("../../etc")  # type: ignore[arg-type]


def test_a_node_with_replicas_gets_no_other_id(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    store.create_replica(address(1), LogImage()).close()
    store.close()
    (tmp_path / "node").rename(tmp_path / "aside")
    with pytest.raises(Corrupt, match="id"):
        NodeStore.open(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "node")
    assert NodeStore.open(tmp_path).node == store.node


def test_tables_that_were_taken_away_are_made_anew_and_suspect(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    for digit in (1, 2):
        store.create_replica(address(digit), LogImage()).close()
    assert not store.lacks_tables(REPLICA)
    (tmp_path / "replicas" / REPLICA / "tables.mdb").rename(tmp_path / "aside")
    assert store.lacks_tables(REPLICA)
    anew = store.make_anew(REPLICA, mark=7)
    assert (anew.address, anew.mark, anew.image) == (address(1), 7, LogImage())
    assert store.is_suspect(REPLICA)
    anew.close()
    other = tmp_path / "replicas" / address(2).replica
    (other / "tables.mdb").unlink()
    for text in ("", f"{address(1).volume} 0 {REPLICA}"):
        (other / "address").write_text(text)
        with pytest.raises(Corrupt, match=r"whose they were|belongs to"):
            store.make_anew(address(2).replica, mark=7)
    assert not store.is_suspect(address(2).replica)


def test_what_is_left_of_a_broken_replica_stays_under_another_name(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    replicas = tmp_path / "replicas"
    for content in (b"first", b"second"):
        store.create_replica(address(1), LogImage()).close()
        (replicas / REPLICA / "tables.mdb").write_bytes(content)
        store.leave_out(REPLICA)
        assert store.replicas() == ()
    store.close()
    again = NodeStore.open(tmp_path)
    first, second = replicas / f"{REPLICA}.broken", replicas / f"{REPLICA}.broken-2"
    assert again.broken() == {first: REPLICA, second: REPLICA}
    assert [(each / "tables.mdb").read_bytes() for each in (first, second)] == [b"first", b"second"]
    with pytest.raises(NotFound):
        again.open_replica(REPLICA)
    first.rename(tmp_path / "elsewhere")
    assert again.broken() == {second: REPLICA}
    again.close()


def test_what_a_crash_left_half_made_goes_at_the_next_start(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    for digit in (1, 2, 3):
        store.create_replica(address(digit), LogImage()).close()
    store.close()
    replicas = tmp_path / "replicas"
    (replicas / address(1).replica).rename(replicas / f"{address(1).replica}.deleted")
    (replicas / address(2).replica).rename(replicas / f"{address(2).replica}.new")
    again = NodeStore.open(tmp_path)
    assert again.replicas() == (address(3).replica,)
    assert [path.name for path in replicas.iterdir()] == [address(3).replica]


def test_a_restored_volumes_replica_that_lost_its_tables_still_knows_its_source(tmp_path: Path) -> None:
    """Where peers give it the log from its beginning, no copy tells."""
    store = NodeStore.open(tmp_path)
    store.create_replica(address(1), LogImage(), source=b"snap-1").close()
    (tmp_path / "replicas" / REPLICA / "tables.mdb").unlink()
    anew = store.make_anew(REPLICA, mark=7)
    assert (anew.has_source, anew.origin) == (True, b"snap-1")
    anew.close()


def test_a_suspect_stays_one_until_cleared(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    store.create_replica(address(1), LogImage()).close()
    assert not store.is_suspect(REPLICA)
    store.mark_suspect(REPLICA)
    store.close()
    store = NodeStore.open(tmp_path)
    assert store.is_suspect(REPLICA)
    store.clear_suspect(REPLICA)
    assert not store.is_suspect(REPLICA)


def test_tables_that_were_put_in_another_place_are_refused(tmp_path: Path) -> None:
    store = NodeStore.open(tmp_path)
    store.create_replica(address(1), LogImage()).close()
    (tmp_path / "replicas" / address(1).replica).rename(tmp_path / "replicas" / address(2).replica)
    with pytest.raises(Conflict):
        store.open_replica(address(2).replica)


def test_the_reserve_gives_way_once_and_comes_back(tmp_path: Path) -> None:
    free = [10 * MIB]
    guard = SpaceGuard(tmp_path, MIB, lambda _: free[0])
    ballast = tmp_path / "ballast"
    assert ballast.stat().st_blocks * 512 >= MIB
    assert not guard.poll()
    free[0] = MIB - BLOCK_SIZE
    assert guard.poll()
    assert guard.make_room()
    assert not ballast.exists()
    assert not guard.make_room()
    free[0] = 2 * MIB - BLOCK_SIZE
    assert guard.poll()
    assert not ballast.exists()
    free[0] = 3 * MIB
    assert guard.poll(pending_bytes=3 * MIB)
    assert not guard.poll()
    assert ballast.exists()
    assert guard.poll(pending_bytes=2 * MIB + BLOCK_SIZE)
