"""A real S3 server that is cut off, slow, busy, stopped, or not the one that was meant."""

import asyncio
import os
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import CairnError, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.units import MIB
from snapshotd.object_store import Data, ObjectStore
from snapshotd.store_probe import has_one_winner
from snapshotd.stores import open_store
from snapshotd.throttle import Throttled
from tests.conftest import forget_s3
from tests.http_faults import (
    Fault,
    FaultyServer,
    internal_error,
    lost,
    slow_down,
    too_many_requests,
    truncated,
)
from tests.loopback import free_address
from tests.proxy import Proxy
from tests.s3_server import OwnServer, S3Server, running_own_server

#: Enough tries also on a machine that is busy with other tests, none of which ends before its answer comes.
PATIENT: dict[str, Any] = {"request_timeout_s": 30.0, "retry_limit_s": 60.0, "open_limit_s": 60.0, "retries": 50}
#: Tries that end soon, where there may be no answer.
QUICK: dict[str, Any] = {**PATIENT, "request_timeout_s": 1.0}
ANSWERS = (slow_down, too_many_requests, internal_error, lost)


@asynccontextmanager
async def faulty_store(s3: S3Server, **settings: Any) -> AsyncIterator[tuple[ObjectStore, FaultyServer]]:
    """A store with a server in between that can misbehave; it has not so far."""
    target = s3.endpoint.removeprefix("http://")
    async with FaultyServer(target) as between:
        store = await open_store(replace(s3, endpoint=f"http://{between.address}").settings(**{**PATIENT, **settings}))
        try:
            yield store, between
        finally:
            await store.close()


@pytest.mark.parametrize("fault", ANSWERS)
def test_every_call_is_tried_again(s3: S3Server, fault: Fault) -> None:
    async def main() -> None:
        async with faulty_store(s3) as (store, between):
            between.faults = [fault, fault]
            assert await store.put("a/x", b"content") is True
            between.faults = [fault, fault]
            assert await store.get("a/x") == b"content"
            between.faults = [fault, fault]
            assert await store.get_range("a/x", 1, 3) == b"ont"
            between.faults = [fault, fault]
            assert [info.key async for info in store.list("a")] == ["a/x"]
            between.faults = [fault, fault]
            await store.delete("a/x")
            assert between.faults == []
            between.faults = [fault, fault]
            with pytest.raises(NotFound):
                await store.get("a/x")

    asyncio.run(main())


def test_half_a_body_is_no_object(s3: S3Server) -> None:
    async def main() -> None:
        async with faulty_store(s3) as (store, between):
            content = os.urandom(3 * MIB)
            await store.put("x", content)
            between.faults = [truncated, truncated]
            assert await store.get("x") == content
            between.faults = [truncated, truncated]
            assert await store.get_range("x", 5, MIB) == content[5 : MIB + 5]
            between.faults = [truncated, truncated]
            assert [info.size async for info in store.list()] == [len(content)]

    asyncio.run(main())


def test_a_conditional_put_whose_answer_was_lost_was_still_first(s3: S3Server) -> None:
    async def main() -> None:
        async with faulty_store(s3) as (store, between):
            between.faults = [lost]
            assert await store.put("x", b"mine", if_absent=True) is True
            between.faults = [lost]
            assert await store.put("x", b"another's", if_absent=True) is False
            assert await store.get("x") == b"mine"

    asyncio.run(main())


def test_retries_end(s3: S3Server) -> None:
    async def main() -> None:
        async with faulty_store(s3, retry_limit_s=3.0) as (store, between):
            for _ in range(5):  # a machine that stands still for most of the limit has no time for more tries
                between.faults = [slow_down] * 1000
                began, before = time.monotonic(), between.requests
                with pytest.raises(QuorumUnavailable, match=r"get x was tried [0-9]+ times .* SlowDown"):
                    await store.get("x")
                assert time.monotonic() - began < 30
                tries = between.requests - before
                assert tries <= PATIENT["retries"] + 1
                if tries > 3:
                    break
            assert tries > 3

    asyncio.run(main())


def test_a_listing_goes_on_where_it_broke(s3: S3Server) -> None:
    keys = [f"x/{number:04d}" for number in range(2050)]

    async def main() -> None:
        async with faulty_store(s3) as (store, between):
            for begin in range(0, len(keys), 50):
                await asyncio.gather(*(store.put(key, b"") for key in keys[begin : begin + 50]))
            before = between.requests
            between.faults = [truncated, bytes, slow_down, bytes, truncated]
            assert [info.key async for info in store.list("x")] == keys
            assert between.requests - before < 12

    asyncio.run(main())


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    proxy = Proxy()
    proxy.start(s3.endpoint.removeprefix("http://"))
    yield proxy
    proxy.close()


def through(proxy: Proxy, s3: S3Server, body: Callable[[ObjectStore], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        store = await open_store(replace(s3, endpoint=f"http://{proxy.address}").settings(**{**QUICK, **settings}))
        await body(store)
        await store.close()

    asyncio.run(main())


def test_a_cable_pulled_for_a_while(proxy: Proxy, s3: S3Server) -> None:
    async def body(store: ObjectStore) -> None:
        content = os.urandom(MIB)
        await store.put("x", content)
        await asyncio.to_thread(proxy.cut)
        reading = [asyncio.ensure_future(store.get("x")) for _ in range(5)]
        writing = asyncio.ensure_future(store.put("y", content))
        done, _ = await asyncio.wait([*reading, writing], timeout=0.5)
        assert not done
        await asyncio.to_thread(proxy.restore)
        assert await asyncio.gather(*reading, writing) == [content] * 5 + [True]
        assert await store.get("y") == content

    through(proxy, s3, body)


def test_a_network_that_says_nothing(proxy: Proxy, s3: S3Server) -> None:
    """Each try ends by its own limit, and a later one succeeds."""

    async def body(store: ObjectStore) -> None:
        await store.put("x", b"content")
        await asyncio.to_thread(proxy.hold)
        reading = asyncio.ensure_future(store.get_range("x", 0, 7))
        done, _ = await asyncio.wait([reading], timeout=1.5)
        assert not done
        await asyncio.to_thread(proxy.restore)
        assert await reading == b"content"

    through(proxy, s3, body)


def test_a_network_that_says_nothing_for_too_long(proxy: Proxy, s3: S3Server) -> None:
    async def body(store: ObjectStore) -> None:
        await asyncio.to_thread(proxy.hold)
        began = time.monotonic()
        with pytest.raises(QuorumUnavailable, match="does not answer"):
            await store.put("x", b"content")
        assert 2 <= time.monotonic() - began < 30

    through(proxy, s3, body, retry_limit_s=2.5)


def test_a_server_that_stops_and_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_own_server(tmp_path) as minio:
        be(minio.server, monkeypatch)
        asyncio.run(_stop_and_start(minio))


async def _stop_and_start(minio: OwnServer) -> None:
    store = await open_store(minio.server.settings(**{**QUICK, "retries": 100}))
    content = os.urandom(5 * MIB)
    await store.put("before", content)
    await asyncio.to_thread(minio.stop)
    waiting = [asyncio.ensure_future(store.get("before")), asyncio.ensure_future(store.put("after", content))]
    done, _ = await asyncio.wait(waiting, timeout=1)
    assert not done
    await asyncio.to_thread(minio.start)
    assert await asyncio.gather(*waiting) == [content, True]
    assert await store.get("after") == content
    await store.close()


def be(server: S3Server, monkeypatch: pytest.MonkeyPatch, **credential: str) -> None:
    """Have the server's credential in the environment, with parts of it replaced."""
    forget_s3(monkeypatch)
    for name, value in {**server.environment, **credential}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("credential", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-its-secret-key"}, "SignatureDoesNotMatch: the secret key"),
        ({"AWS_ACCESS_KEY_ID": "nobody-of-that-name"}, "InvalidAccessKeyId: the access key"),
    ],
)
def test_a_wrong_credential_is_told_at_the_start(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, credential: dict[str, str], said: str
) -> None:
    be(s3, monkeypatch, **credential)
    error = opening_fails(s3, InvalidRequest)
    assert said in str(error)


@pytest.mark.parametrize(
    ("others", "kind", "said"),
    [
        ({"url": "s3://no-such-bucket-of-ours/x"}, InvalidRequest, "no such bucket: create it"),
        ({"s3_endpoint": f"http://{free_address()}"}, QuorumUnavailable, "does not answer.*Connection refused"),
        ({"s3_endpoint": "http://no-such-host.invalid", "s3_allow_http": True}, QuorumUnavailable, "lookup"),
        ({"s3_endpoint": "http://192.0.2.1:9000"}, InvalidRequest, "not encrypted: use https"),
        ({"s3_endpoint": "ftp://127.0.0.1"}, InvalidRequest, "no endpoint of S3"),
    ],
)
def test_a_wrong_place_is_told_at_the_start(
    s3: S3Server, others: dict[str, Any], kind: type[CairnError], said: str
) -> None:
    error = opening_fails(s3, kind, **others)
    with pytest.raises(kind, match=said):
        raise error


def test_a_wrong_region_is_told_at_the_start_where_the_server_minds(s3: S3Server) -> None:
    if s3.minds_region:
        assert "the region is another" in str(opening_fails(s3, InvalidRequest, s3_region="eu-north-1"))
    else:
        asyncio.run(open_store(s3.settings(s3_region="eu-north-1")))


def test_a_server_without_tls(s3: S3Server) -> None:
    error = opening_fails(s3, QuorumUnavailable, s3_endpoint=s3.endpoint.replace("http:", "https:"))
    assert "no TLS" in str(error)


def test_what_is_no_s3_server(s3: S3Server) -> None:
    async def main() -> CairnError:
        async with FaultyServer(s3.endpoint.removeprefix("http://")) as other:
            other.faults = [lambda _: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"] * 100
            with pytest.raises(InvalidRequest, match="is it an S3 server") as caught:
                await open_store(replace(s3, endpoint=f"http://{other.address}").settings(**QUICK))
            return caught.value

    assert_tells_no_credential(asyncio.run(main()), s3)


@pytest.mark.parametrize("url", ["s3://user:password@bucket/x", "s3://AKIA@bucket/x"])
def test_a_credential_in_an_address_is_refused_and_not_repeated(s3: S3Server, url: str) -> None:
    error = opening_fails(s3, InvalidRequest, url=url)
    assert "password" not in str(error)
    assert "AKIA" not in str(error)
    error = opening_fails(s3, InvalidRequest, s3_endpoint="https://user:password@host")
    assert "password" not in str(error)


def opening_fails(s3: S3Server, kind: type[CairnError], **others: Any) -> CairnError:
    """The error, which shows no part of a credential, also not in its traceback."""
    limit_s = 2.0 if kind is QuorumUnavailable else 60.0  # of what may come to be: the rest ends at the first answer
    with pytest.raises(kind) as caught:
        asyncio.run(open_store(s3.settings(**{**PATIENT, "open_limit_s": limit_s, **others})))
    assert_tells_no_credential(caught.value, s3)
    return caught.value


def assert_tells_no_credential(error: BaseException, s3: S3Server) -> None:
    told = "".join(traceback.format_exception(error))
    for name, value in {**s3.environment, **os.environ}.items():
        if name in s3.environment:
            assert value not in told, name


class HeedlessStore(Throttled):
    """A server that overwrites, whatever the condition."""

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        return await super().put(key, data)


def test_a_server_that_heeds_no_condition_is_found_out(s3: S3Server) -> None:
    async def main() -> None:
        store = await open_store(s3.settings())
        assert store.conditional_put is True
        assert await has_one_winner(HeedlessStore(store)) is False
        assert [info async for info in store.list()] == []

    asyncio.run(main())
