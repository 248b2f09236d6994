"""`cairn attach` on a real Linux kernel: a file system goes on while front-ends end, hang and restart; and TLS."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

from blockstore.config import Tls, split_address
from blockstore.pki.uses import Use
from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.linux_host.guest import HOST, require_kernel, running, script
from tests.linux_host.kernel import Kernel, Series
from tests.linux_host.machine import Machine
from tests.linux_host.python_disk import SHELL, make_python_disk
from tests.linux_host.reached_by_guests import FRONT_END_FOR_GUESTS, ReachedByGuests
from tests.tls_serving import Authority

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(600)]

SIZE = 256 * MIB
TLS_SIZE = 48 * MIB
#: A quiet machine takes a quarter of it.
LIMIT_S = 420


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Debian 12's."""
    return require_kernel(Series.LINUX_6_1)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python and cairn for the guest."""
    return make_python_disk(tmp_path_factory.mktemp("disk"))


def synced(attached: Machine) -> list[float]:
    """When each file was synced, in seconds of the guest's uptime."""
    return [float(each) for each in attached.said(r"SYNCED \d+ at ([0-9.]+)")]


def longest_pause_s(attached: Machine, since: int) -> float:
    """From one synced file to the next, from the file of that number on."""
    return max(after - before for before, after in pairwise(synced(attached)[since - 1 :]))


def goes_on(attached: Machine, more: int = 8) -> int:
    """Waits until it has synced some more files; how many it has."""
    count = len(synced(attached)) + more
    attached.wait_for(rf"SYNCED {count}\b")
    return count


def holder(cluster: Cluster, volume: str) -> int:
    """The front-end that control says has it."""
    where = cluster.volume(volume).attachment.front_end
    ids = [(each.directory / "id").read_text().strip() for each in cluster.front_ends]
    return ids.index(where)


def test_a_file_system_outlives_front_ends(kernel: Kernel, disk: Path, tmp_path: Path) -> None:
    with ReachedByGuests(tmp_path, front_ends=3) as cluster:
        volume = cluster.create(SIZE)
        where = f"nbd://{cluster.control_address}/{volume}"
        pauses = {}
        with running(
            kernel,
            SHELL + script("attached", "whole", OPTIONS="", WRITERS=1),
            tmp_path / "guest",
            where,
            LIMIT_S,
            disk=disk,
        ) as attached:
            count = goes_on(attached)
            pauses["none"] = longest_pause_s(attached, 1)

            first = cluster.front_ends[holder(cluster, volume)]
            first.kill()
            cluster.start(first)
            count, since = goes_on(attached), count
            pauses["restarted"] = longest_pause_s(attached, since)

            gone = holder(cluster, volume)
            cluster.front_ends[gone].kill()
            wait_for("it to be moved", lambda: holder(cluster, volume) != gone, LIMIT_S)
            count, since = goes_on(attached), count
            pauses["killed for good"] = longest_pause_s(attached, since)

            attached.tell("resume")
            attached.wait_for("RESUMED")
            count = goes_on(attached)

            hung = holder(cluster, volume)
            cluster.front_ends[hung].pause()
            wait_for("it to be moved", lambda: holder(cluster, volume) != hung, LIMIT_S)
            count, since = goes_on(attached), count
            pauses["hung"] = longest_pause_s(attached, since)
            cluster.front_ends[hung].resume()
            goes_on(attached)
            attached.tell("end")
        result = attached.end()
        print(result, pauses)
        assert result.status == 0, str(result)
        assert "CLEAN" in result.output


def test_a_file_system_on_several_links_outlives_front_ends(disk: Path, tmp_path: Path) -> None:
    """Linux moves requests between them by itself; the guest's processors use three."""
    with ReachedByGuests(tmp_path, front_ends=2) as cluster:
        volume = cluster.create(SIZE)
        where = f"nbd://{cluster.control_address}/{volume}"
        text = SHELL + script("attached", "whole", OPTIONS="'--connections 3'", WRITERS=3)
        pauses = {}
        guest = running(
            require_kernel(Series.LINUX_6_1), text, tmp_path / "guest", where, LIMIT_S, disk=disk, processors=4
        )
        with guest as attached:
            count = goes_on(attached, 4)
            pauses["none"] = longest_pause_s(attached, 1)
            wait_for("all links", lambda: cluster.health(volume).clients == 3, LIMIT_S)

            first = cluster.front_ends[holder(cluster, volume)]
            first.kill()
            cluster.start(first)
            count, since = goes_on(attached, 4), count
            pauses["restarted"] = longest_pause_s(attached, since)

            hung = holder(cluster, volume)
            cluster.front_ends[hung].pause()
            wait_for("it to be moved", lambda: holder(cluster, volume) != hung, LIMIT_S)
            count, since = goes_on(attached, 4), count
            pauses["hung"] = longest_pause_s(attached, since)
            cluster.front_ends[hung].resume()
            wait_for("all links", lambda: cluster.health(volume).clients == 3, LIMIT_S)
            attached.tell("end")
        result = attached.end()
        print(result, pauses)
        assert result.status == 0, str(result)
        assert "CLEAN" in result.output


def files_of(place: Path) -> str:
    """Lines of a script that make a client's directory in the guest."""
    texts = "".join(f"cat >/tmp/pki/{each.name} <<'PEM'\n{each.read_text()}PEM\n" for each in place.iterdir())
    return f"mkdir /tmp/pki\n{texts}"


def test_a_device_by_kernel_tls(disk: Path, tmp_path: Path) -> None:
    """Over two links; and a read-only one over one, at last."""
    kernel = require_kernel(Series.LINUX_6_12)
    authority = Authority(tmp_path / "pki")
    server = authority.issue(Use.SERVER, "fe", (HOST,))
    settings = dataclasses.replace(
        FRONT_END_FOR_GUESTS,
        tls=Tls.REQUIRE,
        tls_cert=server.certificate,
        tls_key=server.key,
        tls_ca=server.directory / "ca-cert.pem",
    )
    (tmp_path / "cluster").mkdir()
    with ReachedByGuests(tmp_path / "cluster", front_end_settings=settings) as cluster:
        volume = cluster.create(TLS_SIZE)
        (front_end,) = cluster.front_ends
        cluster.attach(cluster.create(16 * MIB, name="other"))
        port = split_address(front_end.read_address("nbd_address"))[1]
        where = f"nbd://{cluster.control_address}/{volume}"
        text = (
            SHELL + files_of(authority.client("guest-1")) + script("attached_tls", SIZE=TLS_SIZE, NBD_CLIENT_PORT=port)
        )
        with running(kernel, text, tmp_path / "guest", where, LIMIT_S, disk=disk, processors=3) as attached:
            attached.wait_for("WRITTEN")
            wait_for("all links", lambda: cluster.health(volume).clients == 2, LIMIT_S)
            front_end.kill()
            cluster.start(front_end)
            attached.tell("again")
            attached.wait_for("AGAIN")
            cluster.call("ResizeVolume", control_pb2.ResizeVolumeRequest(volume=volume, size_bytes=2 * TLS_SIZE))
            attached.tell("grown")
        result = attached.end()
        print(result)
        assert result.status == 0, str(result)
        assert "READ-ONLY" in result.output
        assert "CLEAN" in result.output
