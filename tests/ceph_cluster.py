"""Ceph on this machine, as Debian packages it: a monitor, a manager where it is installed, and storage daemons.

    ceph = CephCluster(tmp_path / "ceph", "127.3.2.1", disks=3, replicas=3)
    ceph.start()
    ceph.run("ceph", "osd", "pool", "create", "images", "32")
    ceph.end()

All lies in one directory, all processes listen at one loopback address that no other process has, and nobody has to
say who he is. A disk is a file with holes (BlueStore), so what is stored is on the disk of the directory.
"""

import subprocess
import uuid
from pathlib import Path
from typing import Final

from blockstore.units import GIB, MIB
from tests.daemons import Daemon, wait_for
from tests.programs import find_program

PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-osd", "monmaptool")
_LIMIT_S: Final = 90.0
_MONITOR_PORT: Final = 6789
_CONFIG: Final = """
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v1:{monitor}]
public_network = 127.0.0.0/8
public_addr = {host}
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = {replicas}
osd_pool_default_min_size = {least}
osd_pool_default_pg_num = 4
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
# Without these two the storage daemon ends at some starts: "wrong fsid".
osd_class_update_on_start = false
osd_crush_update_on_start = false
osd_objectstore = bluestore
bluestore_block_path =
bluestore_block_create = true
bluestore_block_size = {disk_bytes}
osd_memory_target = {memory_bytes}
mon_data = {directory}/mon
mgr_data = {directory}/mgr
osd_data = {directory}/osd-$id
run_dir = {directory}/run
pid_file =
# A socket's path may be no longer than 107 bytes, and nobody asks there.
admin_socket =
log_file = {directory}/log/$name.log
mon_cluster_log_file = {directory}/log/cluster.log
[client]
keyring = {directory}/none
"""


class CephCluster:
    """config: the file that every program of Ceph takes. daemons: those that were made, by name.

    memory_bytes, disk_bytes: of each storage daemon. more: what else its configuration has.
    """

    def __init__(
        self,
        directory: Path,
        host: str,
        *,
        disks: int = 1,
        replicas: int = 1,
        memory_bytes: int = 896 * MIB,  # less is refused
        disk_bytes: int = 8 * GIB,
        more: str = "",
    ) -> None:
        self.config = directory / "ceph.conf"
        self.daemons: dict[str, Daemon] = {}
        self._directory = directory
        self._disks = disks
        self._id = str(uuid.uuid4())
        self._monitor = f"{host}:{_MONITOR_PORT}"
        settings = _CONFIG.format(
            fsid=self._id,
            monitor=self._monitor,
            host=host,
            replicas=replicas,
            least=replicas // 2 + 1,
            disk_bytes=disk_bytes,
            memory_bytes=memory_bytes,
            directory=directory,
        )
        self._settings = settings + more

    def start(self) -> None:
        """Raises AssertionError or TimeoutError, which say where the logs are; `end` what has started then too."""
        for name in ("mon", "mgr", "run", "log", *(f"osd-{number}" for number in range(self._disks))):
            (self._directory / name).mkdir(parents=True)
        self.config.write_text(self._settings)
        monmap = str(self._directory / "monmap")
        self._run("monmaptool", "--create", "--fsid", self._id, "--addv", "a", f"[v1:{self._monitor}]", monmap)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self.daemon("mon", "ceph-mon", "-i", "a").start()
        wait_for("the monitor to answer", lambda: b"quorum" in self._asked("mon", "stat"), _LIMIT_S)
        if find_program("ceph-mgr"):
            self.daemon("mgr", "ceph-mgr", "-i", "a").start()
        for number in range(self._disks):
            self._start_disk(str(number))
        wait_for(f"{self._disks} storage daemons to be up, see {self._directory / 'log'}", self._are_up, _LIMIT_S)
        for number in range(self._disks):
            self.run("ceph", "osd", "crush", "add", f"osd.{number}", "1.0", "host=localhost", "root=default")

    def _start_disk(self, number: str) -> None:
        disk = str(uuid.uuid4())
        self.run("ceph", "osd", "new", disk)
        self.run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", disk)
        self.daemon(f"osd-{number}", "ceph-osd", "-i", number).start()

    def end(self) -> None:
        """Of all daemons, those first that need the others: they hang when these are gone."""
        for each in reversed(self.daemons.values()):
            each.kill()

    def daemon(self, name: str, program: str, *arguments: str) -> Daemon:
        """One more, not started yet; it ends with the cluster."""
        command = [str(find_program(program)), "-c", str(self.config), "-f", *arguments]
        self.daemons[name] = Daemon(name, command, self._directory / "none", self._directory / "log" / f"{name}.out")
        return self.daemons[name]

    def run(self, program: str, *arguments: str) -> bytes:
        """What it prints. Raises AssertionError, with what it says of the error."""
        return self._run(program, "-c", str(self.config), *arguments)

    def _are_up(self) -> bool:
        return f" {self._disks} up".encode() in self._asked("osd", "stat")

    def _asked(self, *question: str) -> bytes:
        """What the monitor says; one that has just started refuses questions at times, and that is nothing."""
        ended = [each for each in self.daemons.values() if not each.running]
        assert not ended, f"{ended[0].name} ended:\n{ended[0].tail()}"
        command = [str(find_program("ceph")), "-c", str(self.config), *question]
        return subprocess.run(command, capture_output=True, check=False, timeout=_LIMIT_S).stdout

    def _run(self, program: str, *arguments: str) -> bytes:
        done = subprocess.run(
            [str(find_program(program)), *arguments], capture_output=True, check=False, timeout=_LIMIT_S
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr.decode()[-2000:]}"
        return done.stdout
