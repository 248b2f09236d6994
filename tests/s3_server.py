"""A real S3 server to test against: the one that CAIRN_TEST_S3_* name, else MinIO or radosgw in own processes.

    CAIRN_TEST_S3_ENDPOINT, _BUCKET, _ACCESS_KEY, _SECRET_KEY, _REGION (us-east-1 where it is not given)

MinIO is what .ci/minio builds; radosgw (tests/radosgw.py) is what .ci/debian-packages installs where that fails.
Nothing that only one server has is used, but for its start: a directory in MinIO's is a bucket. Each test takes a
prefix of its own.
"""

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from snapshotd.store_settings import StoreSettings
from tests import radosgw
from tests.loopback import free_address
from tests.programs import find_program, require_found
from tests.radosgw import RadosGateway, serves_s3

REGION: Final = "us-east-1"
_START_LIMIT_S: Final = 60.0
_STOP_LIMIT_S: Final = 20.0
_BUILD: Final = Path(__file__).parent.parent / ".ci" / "minio"


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and who may use it. minds_region: it refuses what is signed for another region."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    region: str = REGION
    minds_region: bool = True

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs besides its settings."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def settings(self, prefix: str = "", **others: Any) -> StoreSettings:
        """A store at `prefix`, or at one that nobody else has."""
        url = f"s3://{self.bucket}/{prefix or f'test-{secrets.token_hex(8)}/store'}"
        return StoreSettings(**{"url": url, "s3_endpoint": self.endpoint, "s3_region": self.region, **others})


class OwnServer(Protocol):
    """One that can be stopped and started again, at the same address and with the same data. address: HOST:PORT."""

    @property
    def address(self) -> str: ...

    @property
    def server(self) -> S3Server: ...

    def start(self) -> None: ...

    def stop(self) -> None:
        """End it, as a power cut would."""

    def end(self) -> None:
        """Of all its processes."""


def _s3_server(address: str, *, minds_region: bool) -> S3Server:
    key = secrets.token_hex(16)
    return S3Server(f"http://{address}", "cairn-test", "cairn-test-user", key, minds_region=minds_region)


class MinioServer:
    """MinIO."""

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self._address = free_address()
        self._process: subprocess.Popen[bytes] | None = None
        self.server = _s3_server(self._address, minds_region=True)
        (directory / "data" / self.server.bucket).mkdir(parents=True)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._address

    def start(self) -> None:
        environment = {
            "HOME": str(self._directory),
            "MINIO_ROOT_USER": self.server.access_key,
            "MINIO_ROOT_PASSWORD": self.server.secret_key,
            "MINIO_SITE_REGION": REGION,
            "MINIO_BROWSER": "off",
        }
        command = [str(self._program), "server", str(self._directory / "data"), "--address", self._address, "--quiet"]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._wait_until_serving(self._process)

    def end(self) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_LIMIT_S)
            self._process = None

    def _wait_until_serving(self, process: subprocess.Popen[bytes]) -> None:
        ends = time.monotonic() + _START_LIMIT_S
        while not serves_s3(self._address):
            if process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"MinIO does not serve: {(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)


@contextmanager
def running_server(directory: Path) -> Iterator[S3Server]:
    """The given server, or one with its data in `directory`."""
    given = os.environ.get("CAIRN_TEST_S3_ENDPOINT")
    if given:
        yield S3Server(
            given,
            os.environ["CAIRN_TEST_S3_BUCKET"],
            os.environ["CAIRN_TEST_S3_ACCESS_KEY"],
            os.environ["CAIRN_TEST_S3_SECRET_KEY"],
            os.environ.get("CAIRN_TEST_S3_REGION", REGION),
        )
        return
    with running_own_server(directory) as own:
        yield own.server


@contextmanager
def running_own_server(directory: Path) -> Iterator[OwnServer]:
    """One to be stopped and started. Skips the test, or fails it in CI, where no server is installed."""
    own = _own_server(directory)
    try:
        own.start()
        yield own
    finally:
        own.end()


def _own_server(directory: Path) -> OwnServer:
    minio = Path(subprocess.run([_BUILD, "--path"], check=True, capture_output=True, text=True).stdout.strip())
    if minio.exists():
        return MinioServer(minio, directory)
    if not all(map(find_program, radosgw.PROGRAMS)):
        require_found(["an S3 server (MinIO, or Debian's radosgw)"])
    return _Radosgw(directory)


class _Radosgw(RadosGateway):
    """radosgw."""

    def __init__(self, directory: Path) -> None:
        address = free_address()
        self.server = server = _s3_server(address, minds_region=False)
        keys = {"access_key": server.access_key, "secret_key": server.secret_key}
        super().__init__(directory, address, bucket=server.bucket, region=REGION, **keys)
