"""QEMU as the client of a front-end's unix socket: its programs, and a machine's drive, through a restart."""

import dataclasses
import tempfile
from pathlib import Path

import pytest

from tests.cluster import FRONT_END, Cluster
from tests.interop import clients
from tests.linux_host.guest import require_kernel, running
from tests.linux_host.kernel import Series
from tests.programs import require_programs

pytestmark = pytest.mark.timeout(400)

#: A quiet machine takes a tenth of it.
LIMIT_S = 300
_SCRIPT = """set -eu
mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
echo before >/mnt/first
sync
echo WRITTEN
read word <&3
echo "$word" >/mnt/second
sync
umount /mnt
"""


def test_qemu_over_a_unix_socket(tmp_path: Path) -> None:
    """The machine's requests wait for the new front-end; nothing is lost, and nothing fails."""
    require_programs("qemu-img", "qemu-io", "nbdinfo", "debugfs", "e2fsck")
    kernel = require_kernel(Series.LINUX_6_12)
    with tempfile.TemporaryDirectory() as short:  # a socket's path has to be
        socket = Path(short) / "nbd"
        with Cluster(tmp_path, front_end_settings=dataclasses.replace(FRONT_END, nbd_socket=socket)) as cluster:
            volume = cluster.create(clients.FILE_SYSTEM_BYTES)
            cluster.attach(volume)
            (front_end,) = cluster.front_ends
            uri = f"nbd+unix:///{volume}?socket={socket}"
            clients.qemu_img_info(uri)
            clients.qemu_io(uri)
            drive = f"file={uri},format=raw,if=virtio,file.reconnect-delay={LIMIT_S}"
            with running(kernel, _SCRIPT, tmp_path / "guest", limit_s=LIMIT_S, drive=drive) as machine:
                machine.wait_for("WRITTEN")
                front_end.kill()
                cluster.start(front_end)
                machine.tell("after")
            assert machine.end().status == 0, str(machine.end())
            image = tmp_path / "image"
            clients.run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(image))
        clients.run("e2fsck", "-fn", str(image))
        assert clients.run("debugfs", "-R", "cat /first", str(image)) == "before\n"
        assert clients.run("debugfs", "-R", "cat /second", str(image)) == "after\n"
