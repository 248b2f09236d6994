"""What a process must be told to reach the object store and to open the repository in it.

There is no credential in here, so that settings may be printed: those of S3 come by the usual chain
(snapshotd.s3_credentials), a passphrase from a file. The daemon's own settings are mapped to these.
"""

from dataclasses import dataclass
from pathlib import Path

from blockstore.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """url: a directory (a path, or file:///path), s3://bucket/prefix, or memory://.

    s3_endpoint: such as https://minio.example:9000; empty for what the environment or the profile names, else
    Amazon's own. s3_region: likewise, and us-east-1 where nobody names one. s3_virtual_hosted: the bucket is part of
    the host's name, which the endpoint then contains; else of the path. s3_allow_http: to a loopback address plain
    HTTP goes without it.

    request_timeout_s: for the answer to one request; a body gets time on top, by its size. retries: after the first
    try. retry_limit_s: after it no try of a call begins; it fails with QuorumUnavailable then.
    open_limit_s: the same while a store is opened, where somebody waits who may have written the wrong address.

    keyring: the file with the keys that wrap data keys. passphrase_file: instead of it; see
    snapshotd.passphrase_keyring.
    """

    url: str
    s3_endpoint: str = ""
    s3_region: str = ""
    s3_virtual_hosted: bool = False
    s3_allow_http: bool = False
    request_timeout_s: float = 30.0
    retries: int = 8
    retry_limit_s: float = 120.0
    open_limit_s: float = 15.0
    keyring: Path | None = None
    passphrase_file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "retry_limit_s", "open_limit_s"):
            if not 0 < getattr(self, name) < 86_400:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: it must be above 0 s and below a day")
        if not 0 <= self.retries <= 100:
            raise InvalidRequest(f"retries is {self.retries}: it must be from 0 to 100")
        if self.keyring is not None and self.passphrase_file is not None:
            raise InvalidRequest("both a keyring and a passphrase file are given: choose one")
