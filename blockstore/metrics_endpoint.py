"""Metrics over HTTP, for Prometheus: `GET /metrics` at an address of its own, in the daemon's event loop.

The loop only takes the picture, which is reading numbers; a thread makes text of it by Prometheus' own library, which
is imported when the first scrape comes. So a daemon starts as fast as without, and no request of a guest waits for a
scrape longer than the picture takes.

A page for anybody who reaches the address: nothing in it is secret, and nothing can be changed by it. A client may
send MAX_HEAD_BYTES and take LIMIT_S; MAX_CLIENTS are answered at once, further ones are dropped.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from blockstore.config import join_address, split_address
from blockstore.daemon import write_address
from blockstore.errors import Conflict
from blockstore.metrics import BOUNDS_S, Durations, Kind, Metric, Sample

_log = structlog.get_logger(__name__)

#: In a daemon's state directory, while it serves metrics: HOST:PORT and a newline.
ADDRESS_FILE: Final = "metrics_address"
MAX_HEAD_BYTES: Final = 8192
#: Prometheus itself gives a scrape 10 s unless told otherwise.
LIMIT_S: Final = 10.0
MAX_CLIENTS: Final = 8
_PATH: Final = "/metrics"
_TEXT: Final = "text/plain; charset=utf-8"

Collect = Callable[[], Awaitable[Sequence[Sample]]]
"""Takes the picture; called in the event loop."""


class _Answer(NamedTuple):
    status: str
    kind: str
    body: bytes


class MetricsEndpoint:
    """Serves what `collect` says of `metrics`; `address` is where, once it is started."""

    def __init__(self, metrics: Sequence[Metric], collect: Collect) -> None:
        self.address = ""
        self._metrics = metrics
        self._collect = collect
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, listen: str) -> None:
        """Listen at HOST:PORT, port 0 being a free one. Raises Conflict where that cannot be had."""
        host, port = split_address(listen)
        try:
            self._server = await asyncio.start_server(self._connected, host, port, limit=MAX_HEAD_BYTES)
        except OSError as error:
            raise Conflict(
                f"cannot serve metrics at {listen}: {error.strerror or error}; choose another port for --metrics, "
                "or 0 for a free one"
            ) from error
        self.address = join_address(host, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Cut off who is being answered."""
        if self._server is not None:
            self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        try:
            async with asyncio.timeout(LIMIT_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                answer = await self._answer(head)
                writer.writelines(_on_the_wire(answer, with_body=not head.startswith("HEAD ")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("a scrape of the metrics came to nothing", error=str(error))
        finally:
            writer.transport.abort()

    async def _answer(self, head: str) -> _Answer:
        line, *headers = head.split("\r\n")
        method, _, rest = line.partition(" ")
        target = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _Answer("405 Method Not Allowed", _TEXT, b"only GET\n")
        if target != _PATH:
            return _Answer("404 Not Found", _TEXT, f"metrics are at {_PATH}\n".encode())
        fields = (each.partition(":") for each in headers)
        accept = ",".join(value.strip() for name, _, value in fields if name.lower() == "accept")
        try:
            samples = await self._collect()
            body, kind = await asyncio.to_thread(as_text, self._metrics, samples, accept)
        except Exception as error:
            _log.exception("the metrics could not be taken")
            return _Answer("500 Internal Server Error", _TEXT, f"{error}\n".encode())
        return _Answer("200 OK", kind, body)


def _on_the_wire(answer: _Answer, *, with_body: bool) -> tuple[bytes, bytes]:
    head = (
        f"HTTP/1.1 {answer.status}\r\nContent-Type: {answer.kind}\r\nContent-Length: {len(answer.body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode(), answer.body if with_body else b""


@asynccontextmanager
async def serving_metrics(listen: str, state: Path, metrics: Sequence[Metric], collect: Collect) -> AsyncIterator[str]:
    """While inside, serve them at `listen`, and say where in `state`; the address. Nothing where `listen` is empty.

    Raises Conflict where the address cannot be had.
    """
    file = state / ADDRESS_FILE
    file.unlink(missing_ok=True)
    if not listen:
        yield ""
        return
    endpoint = MetricsEndpoint(metrics, collect)
    await endpoint.start(listen)
    write_address(file, endpoint.address)
    _log.info("metrics are served", url=f"http://{endpoint.address}{_PATH}")
    try:
        yield endpoint.address
    finally:
        file.unlink(missing_ok=True)
        await endpoint.stop()


# ---- text


def as_text(metrics: Sequence[Metric], samples: Sequence[Sample], accept: str = "") -> tuple[bytes, str]:
    """The page and its content type; accept: what the client takes, by HTTP. Blocking: it imports the library."""
    # 50 ms, for which nobody waits who starts a daemon.
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

    encode, kind = choose_encoder(accept)
    return encode(_Picture(metrics, samples)), kind


class _Picture:
    """What the library's encoders take as a registry."""

    def __init__(self, metrics: Sequence[Metric], samples: Sequence[Sample]) -> None:
        self._samples: dict[Metric, list[Sample]] = {metric: [] for metric in metrics}
        for sample in samples:
            self._samples[sample.metric].append(sample)

    def collect(self) -> Iterator[Any]:
        from prometheus_client import ProcessCollector  # noqa: PLC0415

        for metric, samples in self._samples.items():
            yield _family(metric, samples)
        # CPU, memory and open files, under the names that they have everywhere.
        yield from ProcessCollector(registry=None).collect()


def _family(metric: Metric, samples: Sequence[Sample]) -> Any:
    from prometheus_client.core import (  # noqa: PLC0415
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    kinds: dict[Kind, Any] = {
        Kind.COUNTER: CounterMetricFamily,
        Kind.GAUGE: GaugeMetricFamily,
        Kind.HISTOGRAM: HistogramMetricFamily,
    }
    family = kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
    for _, labels, value in samples:
        if isinstance(value, Durations):
            family.add_metric(labels, buckets=_buckets(value), sum_value=value.seconds)
        else:
            family.add_metric(labels, value)
    return family


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Cumulative, as the library wants them: upper bound, and how many took at most that."""
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(durations.counts), strict=True))
