"""The environment itself: reads wait neither for the copy of a file nor for the old one to be given back."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.storage import tables as tables_module
from blockstore.storage.tables import INITIAL_MAP_BYTES, Tables
from blockstore.units import MIB

LIMIT_S = 20.0
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
    reader.join(LIMIT_S / 10)
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
