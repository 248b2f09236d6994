"""One suite that every object store passes: a directory, memory, a real S3 server, and each behind the wrappers."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt, InvalidRequest, NotFound
from blockstore.units import KIB, MIB
from snapshotd.measured_store import StoreRequests
from snapshotd.object_store import Data, ObjectInfo, ObjectStore, check_folder, check_key
from snapshotd.store_settings import StoreSettings
from snapshotd.stores import open_store
from snapshotd.throttle import Throttled, TokenBucket
from tests.s3_server import S3Server

Body = Callable[[ObjectStore], Awaitable[None]]
Run = Callable[[Body], None]


def open_and(settings: StoreSettings, body: Body, *, throttled: bool = False) -> None:
    """Run `body` with the store of `settings`. throttled: with all wrappers that there are around it."""

    async def main() -> None:
        store = await open_store(settings, StoreRequests() if throttled else None)
        try:
            await body(Throttled(store, up=TokenBucket(), down=TokenBucket(1e9)) if throttled else store)
        finally:
            await store.close()

    asyncio.run(main())


@pytest.fixture(params=["memory", "directory", "s3", "throttled"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs a test's body with a store of each kind, empty."""
    kind = request.param
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3")
        where = server.settings()
    else:
        where = StoreSettings("memory://" if kind == "memory" else str(tmp_path / "store"))
    return lambda body: open_and(where, body, throttled=kind == "throttled")


async def listed(store: ObjectStore, prefix: str = "", after: str = "") -> list[ObjectInfo]:
    return [info async for info in store.list(prefix, after=after)]


async def keys_of(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [info.key for info in await listed(store, prefix, after)]


def test_what_was_put_is_there(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        assert await store.put("packs/ab/one", b"first") is True
        assert await store.get("packs/ab/one") == b"first"
        assert await store.put("packs/ab/one", b"second, and longer") is True
        assert await store.get("packs/ab/one") == b"second, and longer"

    run(body)


def test_an_opened_store_has_left_nothing(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        assert await listed(store) == []

    run(body)


def test_several_buffers_are_one_object(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        await store.put("x", [b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3], b""])
        assert await store.get("x") == b"abcdef"
        assert await listed(store) == [ObjectInfo("x", 6)]

    run(body)


def test_an_empty_object(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        nothing: tuple[Data, ...] = (b"", [])
        for data in nothing:
            await store.put("empty", data)
            assert await store.get("empty") == b""
            assert await listed(store) == [ObjectInfo("empty", 0)]
            with pytest.raises(Corrupt):
                await store.get_range("empty", 0, 1)

    run(body)


def test_what_was_never_put_is_not_found(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        await store.put("folder/there", b"1")
        for key in ("nothing", "folder/nothing", "folder", "folder/there/below"):
            with pytest.raises(NotFound, match=key):
                await store.get(key)
            with pytest.raises(NotFound, match=key):
                await store.get_range(key, 0, 1)

    run(body)


def test_ranges(run: Run) -> None:
    content = os.urandom(100 * KIB)

    async def body(store: ObjectStore) -> None:
        await store.put("x", content)
        for start, length in ((0, 1), (0, len(content)), (70_000, 5000), (len(content) - 1, 1), (len(content) - 9, 9)):
            assert await store.get_range("x", start, length) == content[start : start + length]

    run(body)


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 1), (1 << 40, 5)])
def test_a_range_beyond_the_end_is_corrupt(run: Run, start: int, length: int) -> None:
    async def body(store: ObjectStore) -> None:
        await store.put("x", b"0123456789")
        with pytest.raises(Corrupt, match="x"):
            await store.get_range("x", start, length)

    run(body)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, -1)])
def test_a_range_that_nobody_can_mean(run: Run, start: int, length: int) -> None:
    async def body(store: ObjectStore) -> None:
        await store.put("x", b"0123456789")
        with pytest.raises(ValueError, match="no range"):
            await store.get_range("x", start, length)

    run(body)


def test_delete(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        await store.put("a/x", b"1")
        await store.put("a/y", b"2")
        for _ in range(2):
            await store.delete("a/x")
            assert await keys_of(store) == ["a/y"]
        await store.delete("never/was")
        with pytest.raises(NotFound):
            await store.get("a/x")
        assert await store.put("a/x", b"3", if_absent=True) is True

    run(body)


def test_a_listing_is_of_one_folder_and_in_order(run: Run) -> None:
    keys = ["a/x", "a-b/x", "a.b", "a/b/c", "ab/x", "Z", "z/1", "z/10", "z/2", "b"]

    async def body(store: ObjectStore) -> None:
        await asyncio.gather(*(store.put(key, key.encode()) for key in keys))
        assert await listed(store) == [ObjectInfo(key, len(key)) for key in sorted(keys)]
        for folder in ("a", "a/"):
            assert await keys_of(store, folder) == ["a/b/c", "a/x"]
        assert await keys_of(store, "a/b/") == ["a/b/c"]
        assert await keys_of(store, "z") == ["z/1", "z/10", "z/2"]
        for nothing in ("y", "a/x", "a/b/c/d"):
            assert await keys_of(store, nothing) == []

    run(body)


def test_a_listing_goes_on_behind_any_key(run: Run) -> None:
    keys = sorted(["a/x", "a-b/x", "a/b/c", "ab/x", "b"])

    async def body(store: ObjectStore) -> None:
        await asyncio.gather(*(store.put(key, b"") for key in keys))
        for after in [*keys, "a", "a/b", "a0", "zz", "a/b/c0"]:
            assert await keys_of(store, after=after) == [key for key in keys if key > after]
        assert await keys_of(store, "a", after="a/b/c") == ["a/x"]
        assert await keys_of(store, "a", after="ab") == []

    run(body)


def test_a_listing_of_more_than_one_page(run: Run) -> None:
    keys = [f"packs/{number % 256:02x}/{number:05d}" for number in range(2100)]

    async def body(store: ObjectStore) -> None:
        for begin in range(0, len(keys), 100):
            await asyncio.gather(*(store.put(key, b"x") for key in keys[begin : begin + 100]))
        assert await keys_of(store, "packs") == sorted(keys)

    run(body)


def test_a_listing_while_objects_come_and_go(run: Run) -> None:
    stays = [f"x/{number:04d}" for number in range(0, 1200, 2)]

    async def churn(store: ObjectStore) -> None:
        for number in range(1, 101, 2):
            await store.put(f"x/{number:04d}", b"")
            await store.delete(f"x/{number:04d}")

    async def body(store: ObjectStore) -> None:
        for begin in range(0, len(stays), 100):
            await asyncio.gather(*(store.put(key, b"") for key in stays[begin : begin + 100]))
        churning = asyncio.ensure_future(churn(store))
        found = await keys_of(store, "x")
        await churning
        assert set(stays) <= set(found)
        assert found == sorted(set(found))

    run(body)


def test_a_listing_may_be_left(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        await asyncio.gather(*(store.put(f"x/{number}", b"") for number in range(5)))
        async for info in store.list("x"):
            assert info.key == "x/0"
            break
        assert len(await keys_of(store, "x")) == 5

    run(body)


def test_if_absent_leaves_what_is_there(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        assert await store.put("x", b"first", if_absent=True) is True
        assert await store.put("x", b"second", if_absent=True) is False
        assert await store.get("x") == b"first"

    run(body)


def test_of_many_at_once_one_is_first(run: Run) -> None:
    async def race(store: ObjectStore, key: str) -> None:
        told = await asyncio.gather(*(store.put(key, b"%d" % number, if_absent=True) for number in range(12)))
        assert told.count(True) == 1
        assert await store.get(key) == b"%d" % told.index(True)

    async def body(store: ObjectStore) -> None:
        assert store.conditional_put is True
        for number in range(25):
            await race(store, f"race/{number}")

    run(body)


def test_a_large_object(run: Run) -> None:
    content = os.urandom(MIB) * 40  # above what S3 gets in one request

    async def body(store: ObjectStore) -> None:
        await store.put("large", [content[: 13 * MIB], content[13 * MIB :]])
        assert await store.get("large") == content
        assert await store.get_range("large", 32 * MIB - 7, 5000) == content[32 * MIB - 7 :][:5000]
        assert await listed(store) == [ObjectInfo("large", len(content))]

    run(body)


def test_an_object_is_seen_whole_or_not_at_all(run: Run) -> None:
    versions = [bytes([number]) * 300_000 for number in range(20)]

    async def body(store: ObjectStore) -> None:
        await store.put("x", versions[0])
        writing = asyncio.ensure_future(_put_all(store, versions))
        while not writing.done():
            assert await store.get("x") in versions
            await asyncio.sleep(0)
        await writing
        assert await store.get("x") == versions[-1]

    async def _put_all(store: ObjectStore, versions: list[bytes]) -> None:
        for version in versions:
            await store.put("x", version)

    run(body)


def test_concurrent_use(run: Run) -> None:
    async def one(store: ObjectStore, number: int) -> None:
        content = os.urandom(number * 100)
        await store.put(f"c/{number}", content)
        assert await store.get(f"c/{number}") == content
        if number:
            assert await store.get_range(f"c/{number}", number, number) == content[number : 2 * number]
        await store.delete(f"c/{number}")

    async def body(store: ObjectStore) -> None:
        await asyncio.gather(*(one(store, number) for number in range(200)))
        assert await listed(store) == []

    run(body)


def test_a_cancelled_call_does_no_harm(run: Run) -> None:
    """It happened or it did not; the store goes on, and holds no part of an object."""

    async def body(store: ObjectStore) -> None:
        content = os.urandom(2 * MIB)
        for number in range(20):
            task = asyncio.ensure_future(store.put(f"x/{number}", content))
            await asyncio.sleep(0.0005 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await store.put("y", b"after")
        assert await store.get("y") == b"after"
        for info in await listed(store, "x"):
            assert await store.get(info.key) == content

    run(body)


GOOD_KEYS = ["a", "A-b_c.d", "snapshots/snap-0123456789abcdef0", "x" * 128, "_", "a..b/c--d", "0/1/2/3/4/5/6/7"]
BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    ".",
    "a/.b",
    "-a",
    "a b",
    "a\0",
    "ü",
    "a\n",
    "x" * 129,
    "a/" * 300 + "a",
]


def test_unusual_keys(run: Run) -> None:
    async def body(store: ObjectStore) -> None:
        for key in GOOD_KEYS:
            await store.put(f"k/{key}" if key == "a" else key, key.encode())
        for key in GOOD_KEYS[1:]:
            assert await store.get(key) == key.encode()
        assert len(await listed(store)) == len(GOOD_KEYS)

    run(body)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_what_is_no_key_is_refused(run: Run, key: str) -> None:
    async def body(store: ObjectStore) -> None:
        for call in (store.get(key), store.get_range(key, 0, 1), store.put(key, b""), store.delete(key)):
            with pytest.raises(InvalidRequest, match="no key"):
                await call
        if key.strip("/") != "a" and key:
            with pytest.raises(InvalidRequest, match="no key"):
                await listed(store, key)

    run(body)


@given(st.text())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_key_stays_below_its_folder(key: str) -> None:
    try:
        assert check_key(key) == key
    except InvalidRequest:
        return
    assert Path("/a/store", key).resolve().is_relative_to("/a/store")
    assert check_folder(key) == check_folder(key + "/") == key + "/"


@pytest.mark.parametrize(
    "url",
    [
        "http://host/x",
        "file://other/x",
        "ftp:x",
        "s3://",
        "s3://x",
        "s3://a_bucket/../x",
        "s3://bucket/a b",
        "s3://bucket?x",
    ],
)
def test_what_is_no_address_is_refused(url: str, s3: S3Server) -> None:
    with pytest.raises(InvalidRequest):
        asyncio.run(open_store(replace(s3.settings(), url=url)))
