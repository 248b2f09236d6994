"""A real Linux kernel mounts a volume: ext4 and xfs, from mkfs to fstrim."""

from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import Cluster
from tests.linux_host import guest
from tests.linux_host.kernel import Kernel, Series

pytestmark = pytest.mark.timeout(400)

#: mkfs.xfs refuses less than 300 MiB.
SIZE = 512 * MIB
#: A quiet machine takes a tenth of it.
LIMIT_S = 250


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Debian 12's."""
    return guest.require_kernel(Series.LINUX_6_1)


@pytest.mark.parametrize(("file_system", "series"), [("ext4", Series.LINUX_6_1), ("xfs", Series.LINUX_6_12)])
def test_a_file_system_on_a_volume(file_system: str, series: Series, tmp_path: Path) -> None:
    kernel = guest.require_kernel(series)
    with Cluster(tmp_path) as cluster:
        uri = cluster.attach(cluster.create(SIZE))
        result = guest.run(
            kernel, guest.script("file_system", FILE_SYSTEM=file_system), tmp_path / "guest", uri, LIMIT_S
        )
        print(result)
        assert result.status == 0, str(result)


def test_a_script_that_fails_is_told_apart_from_a_guest_that_goes_down(kernel: Kernel, tmp_path: Path) -> None:
    failed = guest.run(kernel, "echo before; exit 3; echo after", tmp_path / "failed")
    assert (failed.status, failed.output) == (3, "before\n")
    down = guest.run(kernel, "echo before; poweroff -f", tmp_path / "down")
    assert down.status is None
    assert "did not reach the script's end" in str(down)
