"""The same clients as of the server alone, against a whole cluster: three nodes, three replicas, one front-end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.interop import clients
from tests.programs import require_programs

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_programs(*clients.PROGRAMS)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster.attach(cluster.create(clients.FILE_SYSTEM_BYTES))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clients.make_file_system(tmp_path_factory.mktemp("image") / "ext4.img")


@pytest.mark.parametrize("name", clients.ALL)
def test_client(uri: str, tmp_path: Path, name: str) -> None:
    clients.ALL[name](uri, tmp_path)


def test_a_file_system_in_and_out_by_nbdcopy(uri: str, image: Path, tmp_path: Path) -> None:
    clients.nbdcopy_in_and_out(uri, image, tmp_path)


def test_a_file_system_in_and_out_by_qemu_img(uri: str, image: Path, tmp_path: Path) -> None:
    clients.qemu_img_in_and_out(uri, image, tmp_path)
