"""The environment itself: what reads wait for, and what a failed write means.

Reads wait neither for the copy of a file nor for the old one to be given back. A full disk is told from a failing one.
"""

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from blockstore.errors import NoSpace
from blockstore.storage import tables as tables_module
from blockstore.storage.tables import INITIAL_MAP_BYTES, StorageFailed, Tables, Writing
from blockstore.units import MIB
from tests.file_limits import file_size_limit

LIMIT_S = 60.0
KEY = b"k" * 8


class Stalling:
    """An environment one of whose calls waits until it may go on, as on a slow disk."""

    def __init__(self, environment: Any, call: str) -> None:
        self._environment = environment
        self._call = call
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return self._stall if name == self._call else getattr(self._environment, name)

    def _stall(self, *arguments: Any, **named: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(LIMIT_S)
        return getattr(self._environment, self._call)(*arguments, **named)


def make(path: Path) -> Tables:
    tables = Tables(path, create=True)
    put(tables, KEY, b"value")
    return tables


def put(tables: Tables, key: bytes, value: bytes) -> None:
    tables.change(lambda transaction: transaction.put(key, value, db=tables.data))


def get(tables: Tables) -> bytes:
    with tables.reading() as transaction:
        return bytes(transaction.get(KEY, b"", db=tables.data))


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def reads_go_on(tables: Tables) -> bool:
    """Whether a read ends; where it waits for what stalls, that lasts for longer than this."""
    reader = in_thread(lambda: get(tables))
    reader.join(LIMIT_S / 2)
    return not reader.is_alive()


def test_reads_go_on_while_a_change_waits_for_a_copy_to_end_before_the_map_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_module, "COPY_GROWTH_BYTES", MIB)
    tables = make(tmp_path / "tables")
    stalling = tables._environment = Stalling(tables._environment, "copy")  # type: ignore[assignment]
    copier = in_thread(lambda: tables.copy_compacted(tmp_path / "copy"))
    assert stalling.entered.wait(LIMIT_S)
    map_bytes = tables._environment.info()["map_size"]
    changer = in_thread(lambda: put(tables, b"large", bytes(map_bytes)))
    changer.join(0.5)
    assert changer.is_alive(), "the map is full, and must not grow under the copy"
    assert reads_go_on(tables)
    stalling.go_on.set()
    for thread in (copier, changer):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert tables._environment.info()["map_size"] > map_bytes == INITIAL_MAP_BYTES
    assert get(tables) == b"value"
    tables.close()


def test_reads_go_on_while_the_file_that_was_replaced_is_given_back(tmp_path: Path) -> None:
    tables, fresh = make(tmp_path / "tables"), make(tmp_path / "fresh")
    put(fresh, KEY, b"new value")
    stalling = tables._environment = Stalling(tables._environment, "close")  # type: ignore[assignment]
    replacing = in_thread(lambda: tables.replace_by(fresh))
    assert stalling.entered.wait(LIMIT_S)
    assert reads_go_on(tables)
    assert get(tables) == b"new value"
    stalling.go_on.set()
    replacing.join(LIMIT_S)
    assert not (tmp_path / "fresh").exists()
    put(tables, b"more", bytes(MIB))
    tables.close()
    again = Tables(tmp_path / "tables", create=False)
    assert get(again) == b"new value"
    again.close()


@pytest.mark.parametrize("room_bytes", [0, 5000, 41060])
def test_a_write_that_is_cut_short_is_no_room_and_goes_through_later(tmp_path: Path, room_bytes: int) -> None:
    """LMDB says EIO of one that was begun, which a dying disk says as well."""
    tables = make(tmp_path / "tables")
    with file_size_limit((tmp_path / "tables").stat().st_size + room_bytes), pytest.raises(NoSpace):
        put(tables, b"large", bytes(MIB))
    assert get(tables) == b"value"
    put(tables, b"large", bytes(MIB))
    tables.close()


def test_room_that_is_made_lets_the_change_through(tmp_path: Path) -> None:
    asked = []

    def make_room() -> bool:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
        asked.append(1)
        return True

    tables = make(tmp_path / "tables")
    tables.make_room = make_room
    with file_size_limit((tmp_path / "tables").stat().st_size + 5000):
        put(tables, b"large", bytes(MIB))
    assert asked == [1]
    tables.close()


def failing(code: int) -> lmdb.Error:
    """What LMDB raises of a write or sync that failed so."""
    error = lmdb.Error(f"mdb_txn_commit: {os.strerror(code)}")
    error.code = code  # type: ignore[misc]
    return error


def change_fails(tables: Tables, code: int) -> None:
    def change(transaction: Writing) -> None:
        raise failing(code)

    tables.change(change)


def test_an_error_of_the_disk_is_never_taken_for_a_full_one(tmp_path: Path) -> None:
    tables = make(tmp_path / "tables")
    size = (tmp_path / "tables").stat().st_size
    with pytest.raises(StorageFailed):
        change_fails(tables, errno.EIO)
    assert (tmp_path / "tables").stat().st_size == size
    with pytest.raises(StorageFailed):
        put(tables, b"any", b"thing")
    tables.close()


def test_a_failed_sync_is_one_also_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells every descriptor that was open: also the one that is asked after LMDB's own failed."""

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tables = make(tmp_path / "tables")
    with monkeypatch.context() as patched, file_size_limit((tmp_path / "tables").stat().st_size):
        patched.setattr(os, "fsync", fails)
        with pytest.raises(StorageFailed):
            change_fails(tables, errno.EIO)
    tables.close()


def test_a_copy_tells_what_keeps_it_from_its_end(tmp_path: Path) -> None:
    tables = make(tmp_path / "tables")
    put(tables, b"large", bytes(MIB))
    with file_size_limit(MIB // 2), pytest.raises(NoSpace):
        tables.copy_compacted(tmp_path / "first")
    put(tables, b"more", bytes(MIB))
    with pytest.raises(StorageFailed):
        tables.copy_compacted(tmp_path / "nowhere" / "second")
    tables.close()
