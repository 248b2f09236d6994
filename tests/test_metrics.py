"""What counts, and the page that shows it: durations against a list, HTTP as a scraper and as a stranger speaks it."""

import asyncio
import contextlib
import socket
import urllib.error
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Conflict, NotFound, QuorumUnavailable
from blockstore.metrics import BOUNDS_S, Durations, Sample, counter, gauge, histogram
from blockstore.metrics_endpoint import ADDRESS_FILE, MAX_CLIENTS, MAX_HEAD_BYTES, as_text, serving_metrics
from snapshotd.measured_store import CUT_OFF, OK, MeasuredStore, StoreRequests
from snapshotd.memory_store import MemoryStore
from tests.metrics_page import DECLARED, Page, fetch
from tests.stack import until

SEEN = counter("seen", "Seen.", "what")
SIZE = gauge("size_bytes", "Its size.")
TOOK = histogram("took", "What it took.", "what")
METRICS = (SEEN, SIZE, TOOK)


async def collect() -> Sequence[Sample]:
    took = Durations()
    took.add(0.3)
    return [SEEN(3, 'a "quoted"\nname'), SIZE(4.5), TOOK(took, "b")]


@given(st.lists(st.floats(0, 100) | st.sampled_from(BOUNDS_S)))
def test_durations_are_counted_as_a_list_would(taken: list[float]) -> None:
    durations = Durations()
    for each in taken:
        durations.add(each)
    page = Page(as_text((TOOK,), [TOOK(durations, "x")])[0].decode())
    for bound in BOUNDS_S:
        assert page.value("cairn_took_seconds_bucket", what="x", le=str(bound)) == sum(t <= bound for t in taken)
    assert page.value("cairn_took_seconds_count", what="x") == len(taken)
    assert page.value("cairn_took_seconds_bucket", what="x", le="+Inf") == len(taken)
    assert page.value("cairn_took_seconds_sum", what="x") == pytest.approx(sum(taken))


def test_durations_join() -> None:
    parts = [Durations(), Durations()]
    for seconds in (0.0001, 0.2, 50.0):
        parts[0].add(seconds)
        parts[1].add(seconds)
    joined = Durations.joined(parts)
    assert sum(joined.counts) == 6
    assert joined.counts[0] == joined.counts[-1] == 2
    assert joined.seconds == pytest.approx(100.4002)


def test_each_metric_is_declared_once_and_named_as_prometheus_wants() -> None:
    metrics = [metric for declared in DECLARED.values() for metric in declared]
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.help.endswith(".")
        assert not any(word in metric.labels for word in ("client", "address", "le")), metric
        assert "_bytes" not in metric.name or metric.name.endswith(("_bytes", "_bytes_total")), metric


def serve(
    body: Callable[[str], Awaitable[None]], state: Path, taking: Callable[[], Awaitable[Sequence[Sample]]]
) -> None:
    async def main() -> None:
        async with serving_metrics("127.0.0.1:0", state, METRICS, taking) as address:
            assert (state / ADDRESS_FILE).read_text() == f"{address}\n"
            await body(address)

    asyncio.run(main())
    assert not (state / ADDRESS_FILE).exists()


async def say(address: str, text: bytes) -> bytes:
    """All that is answered to these bytes."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(text)
        return await reader.read()
    finally:
        writer.close()


def test_a_scrape(tmp_path: Path) -> None:
    async def body(address: str) -> None:
        page = Page(await asyncio.to_thread(fetch, address))
        assert page.value("cairn_seen_total", what='a "quoted"\nname') == 3
        assert page.value("cairn_size_bytes") == 4.5
        assert page.value("cairn_took_seconds_bucket", what="b", le="0.5") == 1
        assert page.value("process_resident_memory_bytes") > 0
        text = await asyncio.to_thread(fetch, address, "application/openmetrics-text; version=1.0.0")
        assert text.endswith("# EOF\n")

    serve(body, tmp_path, collect)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET / HTTP/1.1", b"404"), (b"POST /metrics HTTP/1.1", b"405"), (b"", b"405"), (b"GET /metrics?a=b", b"200")],
)
def test_what_is_asked_decides(request_line: bytes, status: bytes, tmp_path: Path) -> None:
    async def body(address: str) -> None:
        answer = await say(address, request_line + b"\r\nHost: x\r\n\r\n")
        assert answer.split(b" ")[1] == status

    serve(body, tmp_path, collect)


def test_only_the_head(tmp_path: Path) -> None:
    async def body(address: str) -> None:
        head, _, rest = (await say(address, b"HEAD /metrics HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"Content-Length: " in head
        assert rest == b""

    serve(body, tmp_path, collect)


def test_a_stranger_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    async def body(address: str) -> None:
        with contextlib.suppress(ConnectionError):  # which of the two depends on what it had read
            assert await say(address, b"GET /metrics HTTP/1.1\r\nX: " + bytes(2 * MAX_HEAD_BYTES)) == b""
        assert Page(await asyncio.to_thread(fetch, address)).names

    serve(body, tmp_path, collect)


def test_too_many_at_once_are_dropped_until_one_has_gone(tmp_path: Path) -> None:
    async def body(address: str) -> None:
        host, _, port = address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CLIENTS)]
        with pytest.raises((ConnectionError, urllib.error.URLError, OSError)):
            await asyncio.to_thread(fetch, address)
        for _, writer in silent:
            writer.close()
        fetched = asyncio.create_task(fetch_when_served(address))
        await until(fetched.done, "a scrape after the others have gone")
        assert fetched.result().names

    serve(body, tmp_path, collect)


async def fetch_when_served(address: str) -> Page:
    while True:
        try:
            return Page(await asyncio.to_thread(fetch, address))
        except OSError:
            await asyncio.sleep(0.01)


def test_a_picture_that_fails_is_an_error_and_the_next_one_is_tried(tmp_path: Path) -> None:
    taken = 0

    async def taking() -> Sequence[Sample]:
        nonlocal taken
        taken += 1
        if taken == 1:
            raise QuorumUnavailable("nobody is there")
        return await collect()

    async def body(address: str) -> None:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            await asyncio.to_thread(fetch, address)
        assert Page(await asyncio.to_thread(fetch, address)).names

    serve(body, tmp_path, taking)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with serving_metrics(address, tmp_path, METRICS, collect):
            raise AssertionError("it listens twice")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Conflict, match=rf"{address}.*--metrics"):
            asyncio.run(main(address))
    assert not (tmp_path / ADDRESS_FILE).exists()


def test_no_address_is_no_endpoint(tmp_path: Path) -> None:
    (tmp_path / ADDRESS_FILE).write_text("of a run before\n")

    async def main() -> None:
        async with serving_metrics("", tmp_path, METRICS, collect) as address:
            assert address == ""
            assert not (tmp_path / ADDRESS_FILE).exists()

    asyncio.run(main())


def test_requests_to_an_object_store_are_told_by_outcome() -> None:
    requests = StoreRequests()

    async def main() -> None:
        store = MeasuredStore(MemoryStore(), requests)
        await store.put("packs/a", b"1234")
        await store.put("packs/b", b"56")
        assert await store.get("packs/a") == b"1234"
        assert await store.get_range("packs/a", 1, 2) == b"23"
        with pytest.raises(NotFound):
            await store.get("packs/c")
        assert [each.key async for each in store.list("packs")] == ["packs/a", "packs/b"]
        await store.delete("packs/a")
        await store.close()

    asyncio.run(main())
    assert requests.ended == {
        ("put", OK): 2,
        ("get", OK): 1,
        ("get", "not-found"): 1,
        ("get-range", OK): 1,
        ("list", OK): 1,
        ("delete", OK): 1,
    }
    assert (requests.sent_bytes, requests.received_bytes) == (6, 6)
    assert {name: sum(each.counts) for name, each in requests.durations.items()} == {
        "get": 2, "get-range": 1, "put": 2, "delete": 1, "list": 1,
    }  # fmt: skip


def test_a_request_that_takes_too_long_is_cut_off() -> None:
    requests = StoreRequests()

    async def main() -> None:
        with requests.timed("get"):
            await asyncio.sleep(60)

    async def cut_off() -> None:
        task = asyncio.create_task(main())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cut_off())
    assert requests.ended == {("get", CUT_OFF): 1}
