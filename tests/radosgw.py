"""Ceph's S3 gateway with what it needs behind it: a monitor and a storage daemon, as Debian packages them.

Where MinIO cannot be built, the tests run against this. All lies in one directory, and all processes listen at one
loopback address of their own; access is by the gateway's key only. `stop` ends the gateway, which keeps nothing, as a
power cut would: to its clients the store is away, and comes back with all that it had.
"""

import http.client
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from blockstore.config import split_address
from tests import ceph_cluster
from tests.ceph_cluster import CephCluster
from tests.daemons import Daemon, wait_for

PROGRAMS: Final = (*ceph_cluster.PROGRAMS, "radosgw", "radosgw-admin")
_LIMIT_S: Final = 90.0
_CONFIG: Final = """
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
        settings = _CONFIG.format(gateway=address, directory=self._directory)
        self._ceph = CephCluster(self._directory, split_address(address)[0], more=settings)
        self._gateway: Daemon | None = None

    def start(self) -> None:
        """Raises AssertionError or TimeoutError, with where its logs are."""
        is_first = self._gateway is None
        if self._gateway is None:
            self._ceph.start()
            self._gateway = self._ceph.daemon("radosgw", "radosgw", "-n", "client.rgw.a")
        self._gateway.start()
        wait_for("the gateway to serve", self._is_serving, _LIMIT_S)
        if is_first:
            access_key, secret_key = self._keys
            name = ("--uid=cairn", "--display-name=cairn")
            self._ceph.run(
                "radosgw-admin", "user", "create", *name, f"--access-key={access_key}", f"--secret-key={secret_key}"
            )
            self._make_bucket()

    def stop(self) -> None:
        if self._gateway is not None:
            self._gateway.kill()

    def end(self) -> None:
        """Of all processes, the gateway first."""
        self._ceph.end()

    def _is_serving(self) -> bool:
        """It answers a stranger's question for his buckets, once it serves."""
        ended = [each for each in self._ceph.daemons.values() if not each.running]
        assert not ended, f"{ended[0].name} ended:\n{ended[0].tail()}"
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
