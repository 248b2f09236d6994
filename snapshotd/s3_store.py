"""An object store on S3: Amazon's, MinIO, Ceph and the like, by obstore.

Nothing is used that servers are known to differ in: objects are put whole (in parts where they are large), read
whole or by range, deleted one by one and listed in the order of their keys. Every request is signed with the hash
of its body, so a body that was damaged on its way is refused. What is read is checked by whoever reads, by its name
or its seal; here only its length.

obstore neither retries nor limits a request, but for one that stalls: snapshotd.retrying does. Errors are raised
without their cause, whose text may hold an access key.
"""

import re
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store as ObstoreS3

from blockstore.errors import Corrupt, InvalidRequest, QuorumUnavailable
from blockstore.units import MIB
from snapshotd import s3_credentials
from snapshotd.object_store import (
    MAX_OBJECT_BYTES,
    Data,
    ObjectInfo,
    check_folder,
    check_key,
    check_range,
    joined,
    size_of,
)
from snapshotd.s3_answers import error_of, refusal_of
from snapshotd.s3_credentials import CredentialProvider
from snapshotd.store_settings import StoreSettings

#: Packs (16 MiB) go as one request: that costs a quarter of four parts, and a crash leaves no parts behind.
_LARGEST_SINGLE_PUT: Final = 32 * MIB
_PART_BYTES: Final = 8 * MIB
_PARTS_AT_ONCE: Final = 4
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_LOOPBACK: Final = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1")
#: Longer than any request that snapshotd.retrying lets run.
_CLIENT_TIMEOUT: Final = timedelta(hours=1)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is. folder: "" or with a "/" at the end; endpoint: "" for Amazon's."""

    bucket: str
    folder: str
    endpoint: str
    region: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.folder}" + (f" ({self.endpoint})" if self.endpoint else "")


class S3Store:
    """Objects in a bucket, below a prefix. `conditional_put` is false until `snapshotd.stores` has tried it."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises InvalidRequest for an address that can be none, or a profile that is missing."""
        address = _address_of(settings)
        self.url = str(address)
        self.conditional_put = False
        self._folder = address.folder
        provider = s3_credentials.provider_of()
        self._store = _client_of(address, settings, provider)
        self._where = f"in {self.url}"
        if provider is None and not s3_credentials.is_in_environment():
            self._where += " (with the instance's own, as there is no credential in the environment or in ~/.aws)"

    async def get(self, key: str) -> bytes:
        path, what = self._folder + check_key(key), f"cannot read {key} {self._where}"
        result = await _told(self._store.get_async(path), what, key)
        size = result.meta["size"]
        if size > MAX_OBJECT_BYTES:
            raise Corrupt(f"{key} in {self.url} has {size} bytes: nothing larger than {MAX_OBJECT_BYTES} is written")
        data = (await _told(result.bytes_async(), what, key)).to_bytes()
        if len(data) != size:
            raise QuorumUnavailable(f"{what}: {len(data)} of its {size} bytes came")
        return data

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        path, what = self._folder + check_key(key), f"cannot read {length} bytes from {start} of {key} {self._where}"
        data = (await _told(self._store.get_range_async(path, start=start, length=length), what, key)).to_bytes()
        if len(data) != length:
            raise Corrupt(f"{what}: it ends after {len(data)} of them")
        return data

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        path, what = self._folder + check_key(key), f"cannot write {key} {self._where}"
        options: dict[str, Any] = {"use_multipart": False}
        if if_absent:
            options["mode"] = "create"
        elif size_of(data) > _LARGEST_SINGLE_PUT:
            options = {"use_multipart": True, "chunk_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
        try:
            await _told(self._store.put_async(path, joined(data), **options), what)
        except AlreadyExistsError:
            return False
        return True

    async def delete(self, key: str) -> None:
        path = self._folder + check_key(key)
        try:
            await _told(self._store.delete_async(path), f"cannot delete {key} {self._where}")
        except FileNotFoundError:
            return  # some servers say so

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        what = f"cannot list {prefix or 'objects'} {self._where}"
        stream = aiter(
            self._store.list(self._folder + check_folder(prefix), offset=self._folder + after if after else None)
        )
        last = after
        while found := await _next_of(stream, what):
            for meta in found:
                key = meta["path"].removeprefix(self._folder)
                if key <= last:
                    raise InvalidRequest(f"{what}: {key} comes after {last}, and S3 lists in the order of keys")
                last = key
                yield ObjectInfo(key, meta["size"])

    async def close(self) -> None:
        """obstore closes its connections when it is dropped."""


async def _next_of(stream: AsyncIterator[Any], what: str) -> Any:
    try:
        return await _told(anext(stream), what)
    except StopAsyncIteration:
        return ()


async def _told(request: Awaitable[T], what: str, key: str | None = None) -> T:
    """The result; refusals in the words of Cairn. key: of an object that is read, and may be missing."""
    try:
        return await request
    except AlreadyExistsError:
        raise
    except (BaseError, FileNotFoundError) as error:
        text = str(error)
    raise error_of(refusal_of(text), what, key=key)


def _address_of(settings: StoreSettings) -> Address:
    parts = urlsplit(settings.url)
    profile = s3_credentials.read_profile()
    endpoint = settings.s3_endpoint or s3_credentials.endpoint_in_environment() or (profile.endpoint if profile else "")
    region = settings.s3_region or s3_credentials.region_in_environment() or (profile.region if profile else "")
    if "@" in parts.netloc or "@" in endpoint:  # and it is not repeated
        raise InvalidRequest("the address of the object store holds a credential: give it in the environment or ~/.aws")
    if not _BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
        raise InvalidRequest(f"{settings.url!r} is no address in S3: write it as s3://bucket/prefix")
    _check_endpoint(endpoint, settings.s3_allow_http)
    return Address(parts.netloc, check_folder(parts.path.strip("/")), endpoint.rstrip("/"), region or "us-east-1")


def _check_endpoint(endpoint: str, allow_http: bool) -> None:
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{endpoint!r} is no endpoint of S3: write it as https://host:port")
    if parts.scheme == "http" and not (allow_http or _LOOPBACK.fullmatch(parts.hostname)):
        raise InvalidRequest(f"the endpoint {endpoint} is not encrypted: use https, or allow http where that is fine")


def _client_of(address: Address, settings: StoreSettings, provider: CredentialProvider | None) -> ObstoreS3:
    where: dict[str, Any] = {}
    if address.endpoint:
        where = {"endpoint": address.endpoint, "aws_endpoint_url_s3": address.endpoint}
    if provider is not None:
        where["credential_provider"] = provider
    patience = timedelta(seconds=settings.request_timeout_s)
    return ObstoreS3(
        address.bucket,
        region=address.region,
        virtual_hosted_style_request=settings.s3_virtual_hosted,
        conditional_put="etag",
        disable_bulk_delete=True,
        client_options={
            "allow_http": address.endpoint.startswith("http:"),
            "connect_timeout": patience,
            "read_timeout": patience,
            "timeout": _CLIENT_TIMEOUT,
        },
        retry_config={"max_retries": 0},
        **where,
    )
