"""The clients that record a history find a server that shows what no order of the requests explains."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockstore.units import BLOCK_SIZE
from tests.faults.linearizable import NotLinearizable
from tests.faults.registers import History, RegisterLoad, content_of, value_of
from tests.programs import require_programs
from tests.test_crash_workload import FileServer

BLOCKS = 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    require_programs("nbdkit")
    started = FileServer(tmp_path)
    started.start()
    yield started
    started.kill()


def loaded(server: FileServer, history: History, count: int) -> RegisterLoad:
    with RegisterLoad(history, lambda: server.uri) as load:
        load.wait_progress(count)
    return load


def test_a_server_that_is_killed_and_loses_nothing_passes(server: FileServer) -> None:
    history = History(4, BLOCKS)
    with RegisterLoad(history, lambda: server.uri) as load:
        for _ in range(3):
            load.wait_progress(300)
            server.kill()
            server.start()
        load.wait_progress(300)
        assert load.service.longest_gap_s > 0
    history.check(server.uri)
    assert history.checked > 1200
    loaded(server, history, 300)
    history.check(server.uri)


def test_an_old_copy_put_back_is_found(server: FileServer) -> None:
    history = History(4, BLOCKS)
    loaded(server, history, 300)
    history.check(server.uri)
    old = server.image.with_name("old")
    shutil.copyfile(server.image, old)
    loaded(server, history, 300)
    server.image.write_bytes(old.read_bytes())
    with pytest.raises(NotLinearizable, match="block"):
        history.check(server.uri)


def test_a_torn_block_and_one_of_another_place_are_found() -> None:
    assert value_of(content_of(7, 3), 3) == 7
    assert value_of(bytes(BLOCK_SIZE), 3) == 0
    for wrong in (content_of(7, 3)[:2048] + content_of(8, 3)[2048:], content_of(7, 4)):
        with pytest.raises(NotLinearizable, match="block 3 shows no write as a whole"):
            value_of(wrong, 3)
