"""Ceph's S3 gateway with what it needs behind it: a monitor and a storage daemon, as Debian packages them.

Where MinIO cannot be built, the tests run against this. All lies in one directory, and all processes listen at one
loopback address of their own; access is by the gateway's key only. `stop` ends the gateway, which keeps nothing, as a
power cut would: to its clients the store is away, and comes back with all that it had.
"""

import http.client
import subprocess
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from blockstore.config import split_address
from tests.daemons import wait_for
from tests.programs import find_program

PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_LIMIT_S: Final = 90.0
_STOP_LIMIT_S: Final = 20.0
_MONITOR_PORT: Final = 6789
#: Grows as it is needed: a file with holes.
_DISK_BYTES: Final = 8 << 30
_MEMORY_BYTES: Final = 896 << 20  # less is refused
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
osd_pool_default_size = 1
osd_pool_default_min_size = 1
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
osd_data = {directory}/osd
run_dir = {directory}/run
pid_file =
admin_socket = {directory}/run/$name.asok
log_file = {directory}/log/$name.log
mon_cluster_log_file = {directory}/log/cluster.log
[client]
keyring = {directory}/none
[client.rgw.a]
rgw_frontends = beast endpoint={gateway}
rgw_data = {directory}/rgw
rgw_run_sync_thread = false
"""


def serves_s3(address: str) -> bool:
    """Whether it answers as an S3 server does to a stranger, and not with 503, which it says while it starts."""
    connection = http.client.HTTPConnection(*split_address(address), timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status in (200, 403)
    except OSError:
        return False
    finally:
        connection.close()


class RadosGateway:
    """A throw-away cluster of one disk; the gateway at `address`, the bucket made at the first start."""

    def __init__(
        self, directory: Path, address: str, *, bucket: str, access_key: str, secret_key: str, region: str
    ) -> None:
        self.address = address
        self._directory = directory / "ceph"
        self._bucket, self._region = bucket, region
        self._keys = (access_key, secret_key)
        self._gateway: subprocess.Popen[bytes] | None = None
        self._behind: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises AssertionError, TimeoutError or CalledProcessError, with where its logs are."""
        is_first = not self._behind
        if is_first:
            self._start_behind()
        self._gateway = self._daemon("radosgw", "-n", "client.rgw.a")
        wait_for("the gateway to serve", self._is_serving, _LIMIT_S)
        if is_first:
            access_key, secret_key = self._keys
            name = ("--uid=cairn", "--display-name=cairn")
            self._run(
                "radosgw-admin", "user", "create", *name, f"--access-key={access_key}", f"--secret-key={secret_key}"
            )
            self._make_bucket()

    def stop(self) -> None:
        if self._gateway is not None:
            _kill(self._gateway)
            self._gateway = None

    def end(self) -> None:
        """Of all processes, the gateway first: it hangs when the others are gone."""
        self.stop()
        for process in reversed(self._behind):
            _kill(process)
        self._behind.clear()

    def _start_behind(self) -> None:
        for name in ("mon", "osd", "run", "log"):
            (self._directory / name).mkdir(parents=True)
        fsid, (host, _) = str(uuid.uuid4()), split_address(self.address)
        # No other process has that address.
        monitor = f"{host}:{_MONITOR_PORT}"
        config = _CONFIG.format(
            fsid=fsid,
            monitor=monitor,
            host=host,
            gateway=self.address,
            directory=self._directory,
            disk_bytes=_DISK_BYTES,
            memory_bytes=_MEMORY_BYTES,
        )
        self._config.write_text(config)
        monmap = str(self._directory / "monmap")
        self._run_bare("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:{monitor}]", monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._behind.append(self._daemon("ceph-mon", "-i", "a"))
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._behind.append(self._daemon("ceph-osd", "-i", "0"))
        wait_for("the storage daemon to be up", self._is_up, _LIMIT_S)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")

    @property
    def _config(self) -> Path:
        return self._directory / "ceph.conf"

    def _is_up(self) -> bool:
        """A monitor that has just started refuses the question at times."""
        asked = [str(find_program("ceph")), "-c", str(self._config), "osd", "stat"]
        return b" 1 up" in subprocess.run(asked, capture_output=True, check=False, timeout=_LIMIT_S).stdout

    def _run(self, program: str, *arguments: str) -> bytes:
        return self._run_bare(program, "-c", str(self._config), *arguments)

    def _run_bare(self, program: str, *arguments: str) -> bytes:
        done = subprocess.run(
            [str(find_program(program)), *arguments], capture_output=True, check=False, timeout=_LIMIT_S
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr.decode()[-2000:]}"
        return done.stdout

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(find_program(program)), "-c", str(self._config), "-f", *arguments]
        with open(self._directory / "log" / f"{program}.out", "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _is_serving(self) -> bool:
        """It answers a stranger's question for his buckets, once it serves."""
        ended = [each.args for each in (*self._behind, self._gateway) if each is not None and each.poll() is not None]
        assert not ended, f"{ended} ended: see {self._directory / 'log'}"
        return serves_s3(self.address)

    def _make_bucket(self) -> None:
        access_key, secret_key = self._keys
        store = S3Store(
            self._bucket,
            endpoint=f"http://{self.address}",
            access_key_id=access_key,
            secret_access_key=secret_key,
            region=self._region,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        url = urlsplit(obstore.sign(store, "PUT", "", timedelta(minutes=5)))
        connection = http.client.HTTPConnection(*split_address(self.address), timeout=_LIMIT_S)
        connection.request("PUT", f"{url.path}?{url.query}")
        answer = connection.getresponse()
        assert answer.status == 200, f"the bucket is not made: {answer.status} {answer.read()!r}"
        connection.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(_STOP_LIMIT_S)
