"""Real clients against the server with a volume in memory, over TCP and over a unix socket."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop import clients

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
_END_LIMIT_S = 60


@contextmanager
def serving(*arguments: str) -> Iterator[list[str]]:
    """The server as a program of its own; its URIs. Afterwards it must end by itself, with status 0."""
    command = [sys.executable, "-m", "tests.memory_nbd", *arguments]
    listeners = sum(argument in ("--tcp", "--unix") for argument in arguments)
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield [server.stdout.readline().strip() for _ in range(listeners)]
        server.terminate()
        assert server.wait(_END_LIMIT_S) == 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.fixture(scope="module", params=["tcp", "unix"])
def root(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URI of a server without an export's name."""
    with tempfile.TemporaryDirectory() as directory:  # a unix socket's path has to be short
        where = ["--tcp", "127.0.0.1:0"] if request.param == "tcp" else ["--unix", f"{directory}/nbd"]
        with serving("--size", "256M", "--export", "disk", "--export", "second", *where) as (uri,):
            yield uri


@pytest.fixture
def uri(root: str) -> str:
    """The URI of an export."""
    return root.replace("nbd+unix:///", "nbd+unix:///disk") if "unix" in root else f"{root}/disk"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clients.make_file_system(tmp_path_factory.mktemp("image") / "ext4.img")


def test_what_the_export_says(uri: str) -> None:
    assert clients.nbdinfo(uri)["export-size"] == 256 << 20
    assert clients.nbdinfo(uri)["description"] == "in memory"
    assert clients.qemu_img_info(uri)["format"] == "raw"


def test_all_exports_are_listed(uri: str) -> None:
    assert clients.list_exports(uri) == {"disk", "second"}


def test_a_read_only_export_stays_as_it_is() -> None:
    with serving("--size", "1M", "--read-only", "--tcp", "127.0.0.1:0") as (root,):
        told = clients.run("nbdinfo", "--json", f"{root}/disk")
        assert '"is_read_only": true' in told
        with pytest.raises(AssertionError, match="Permission denied"):
            clients.run("qemu-io", "-f", "raw", "-c", "write 0 512", f"{root}/disk")


def test_an_unknown_export_is_refused_by_its_name(root: str, uri: str) -> None:
    with pytest.raises(AssertionError, match="nobody"):
        clients.run("nbdinfo", uri.replace("disk", "nobody"))


def test_qemu_io(uri: str) -> None:
    clients.qemu_io(uri)


def test_a_pattern_that_is_not_there_is_found(uri: str) -> None:
    """Else qemu-io would pass whatever it reads."""
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        clients.run_qemu_io(uri, ["write -P 1 0 512", "read -P 2 0 512"])


def test_libnbd_binding(uri: str) -> None:
    clients.libnbd_binding(uri)


def test_nbdcopy_in_and_out(uri: str, image: Path, tmp_path: Path) -> None:
    clients.nbdcopy_in_and_out(uri, image, tmp_path)


def test_qemu_img_in_and_out(uri: str, image: Path, tmp_path: Path) -> None:
    clients.qemu_img_in_and_out(uri, image, tmp_path)


def test_qemu_img_bench(uri: str) -> None:
    clients.qemu_img_bench(uri)


@pytest.mark.parametrize("depth", [1, 64])
def test_fio_verify(uri: str, tmp_path: Path, depth: int) -> None:
    clients.fio_verify(uri, tmp_path, depth)


@pytest.mark.parametrize("block_size", ["512", "3k", "4k", "1M"])
def test_fio_verify_blocks(uri: str, tmp_path: Path, block_size: str) -> None:
    clients.fio_verify_blocks(uri, tmp_path, block_size, 64)


def test_fio_verify_mixed(uri: str, tmp_path: Path) -> None:
    clients.fio_verify_mixed(uri, tmp_path, 64)


@pytest.mark.parametrize("depth", [1, 64])
def test_fio_verify_trim(uri: str, tmp_path: Path, depth: int) -> None:
    clients.fio_verify_trim(uri, tmp_path, depth)
