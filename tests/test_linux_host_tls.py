"""TLS on a real Linux kernel: `cairn attach` by kernel TLS, with everything that a link without TLS can."""

import dataclasses
from pathlib import Path

import pytest

from blockstore.config import Tls
from blockstore.pki.uses import Use
from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.linux_host import guest
from tests.linux_host.beside import running, script
from tests.linux_host.kernel import Kernel, fetch_kernel, missing_programs
from tests.linux_host.python_disk import SHELL, make_python_disk
from tests.programs import require_found, require_programs
from tests.tls_serving import Authority

# It also fetches the kernel's package.
pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(480)]

SIZE = 96 * MIB
LIMIT_S = 300
#: This machine, as the guest reaches it.
HOST = "10.0.2.2"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    require_found(missing_programs())
    require_programs(*guest.NEEDED)
    return fetch_kernel(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python_disk(tmp_path_factory.mktemp("disk"))


def files_of(place: Path) -> str:
    """Lines of a script that make a client's directory in the guest."""
    texts = "".join(f"cat >/tmp/pki/{each.name} <<'PEM'\n{each.read_text()}PEM\n" for each in place.iterdir())
    return f"mkdir /tmp/pki\n{texts}"


def test_a_device_by_kernel_tls(kernel: Kernel, disk: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    server = authority.issue(Use.SERVER, "fe", (HOST,))
    settings = dataclasses.replace(
        FRONT_END,
        nbd_advertise=f"{HOST}:0",
        tls=Tls.REQUIRE,
        tls_cert=server.certificate,
        tls_key=server.key,
        tls_ca=server.directory / "ca-cert.pem",
    )
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", front_end_settings=settings, control_settings=CONTROL) as cluster:
        volume = cluster.create(SIZE)
        where = f"nbd://{cluster.control_address}/{volume}"
        text = SHELL + files_of(authority.client("guest-1")) + script("attached_tls", SIZE=SIZE)
        with running(kernel, text, tmp_path / "guest", where, LIMIT_S, disk=disk) as attached:
            attached.wait_for("WRITTEN")
            (front_end,) = cluster.front_ends
            front_end.kill()
            cluster.start(front_end)
            attached.tell("again")
            attached.wait_for("AGAIN")
            cluster.call("ResizeVolume", control_pb2.ResizeVolumeRequest(volume=volume, size_bytes=2 * SIZE))
            attached.tell("grown")
        result = attached.end()
        print(result)
        assert result.status == 0, str(result)
        assert "CLEAN" in result.output
