"""The crash tests' clients against nbdkit on a file: a server that is killed loses nothing, an old copy shows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockstore.config import split_address
from tests.crash import fio
from tests.crash.model import SECTOR_SIZE, Wrong
from tests.crash.workload import Workload
from tests.daemons import Daemon, listens, wait_for
from tests.loopback import free_address
from tests.programs import find_program, require_programs

SIZE = 8 << 20
SECTORS = range(SIZE // SECTOR_SIZE)


class FileServer(Daemon):
    """nbdkit on a file, at one address for all its runs. A request happens at once and as a whole."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.image.write_bytes(bytes(SIZE))
        self.host, self.port = split_address(free_address())
        self.uri = f"nbd://{self.host}:{self.port}/any"
        program = str(find_program("nbdkit"))
        # One request at a time: a read of a file beside a write to it may show half a block of each.
        served = ["--filter=noparallel", "file", str(self.image), "serialize=all-requests"]
        command = [program, "-f", "-i", self.host, "-p", str(self.port), *served]
        super().__init__("nbdkit", command, directory / "nothing", directory / "nbdkit.log")

    def start(self) -> None:
        super().start()
        wait_for("nbdkit to listen", lambda: listens(self.host, self.port, self.pid))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    require_programs("nbdkit", "fio")
    started = FileServer(tmp_path)
    started.start()
    yield started
    started.kill()


def overwrite(image: Path, content: bytes | bytearray) -> None:
    """In place: the server has the file open, and its size stays."""
    with image.open("r+b") as file:
        file.write(content)


def test_a_server_that_loses_nothing_passes(server: FileServer) -> None:
    with Workload(lambda: server.uri, SECTORS) as load:
        for _ in range(3):
            load.wait_progress(200)
            server.kill()
            server.start()
        load.wait_progress(200)
    load.verify(server.uri)


def test_an_old_copy_put_back_is_found(server: FileServer) -> None:
    with Workload(lambda: server.uri, SECTORS) as load:
        load.wait_progress(200)
        old = server.image.read_bytes()
        load.wait_progress(2000)
    load.verify(server.uri)
    overwrite(server.image, old)
    with pytest.raises(Wrong):
        load.verify(server.uri)


def test_a_read_that_is_wrong_ends_the_load(server: FileServer) -> None:
    load = Workload(lambda: server.uri, SECTORS)

    def spoil() -> None:
        with load:
            load.wait_progress(50)
            overwrite(server.image, b"x" * SIZE)
            load.wait_progress(1_000_000)

    with pytest.raises(ExceptionGroup) as failure:
        spoil()
    assert failure.group_contains(Wrong)


def test_fio_finds_a_block_that_changed(server: FileServer, tmp_path: Path) -> None:
    fio.verify(server.uri, tmp_path, offset=1 << 20, size=1 << 20, seed=1)
    fio.verify(server.uri, tmp_path, offset=1 << 20, size=1 << 20, seed=1, only=True)
    content = bytearray(server.image.read_bytes())
    content[(1 << 20) + 5000] ^= 1
    overwrite(server.image, content)
    with pytest.raises(AssertionError, match="verify"):
        fio.verify(server.uri, tmp_path, offset=1 << 20, size=1 << 20, seed=1, only=True)
