"""Control's metrics: of the cluster while it is active, and of the metastore whatever happens to that."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from blockstore.control.daemon import assemble
from blockstore.control.leadership import ControlPlace
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.interface import Listing, Metastore
from blockstore.control.metastore.measured import MeasuredMetastore, StoreCalls
from blockstore.control.metrics import METRICS, ControlMetrics
from blockstore.control.peers import Peers
from blockstore.errors import QuorumUnavailable
from blockstore.metrics_endpoint import as_text
from blockstore.rpc import control_pb2 as pb
from tests.control_cluster import settings_for
from tests.metrics_page import Page


class _Silent(MeasuredMetastore):
    """A metastore that may fall silent, below what measures it."""

    silent = False

    async def list(self, prefix: str) -> Listing:
        if self.silent:
            raise QuorumUnavailable("no answer")
        return await super().list(prefix)


@asynccontextmanager
async def active(directory: Path) -> AsyncIterator[tuple[ControlMetrics, _Silent]]:
    """Metrics of a control that is active, with an empty catalog."""
    settings = settings_for(directory)
    opened: Metastore = open_embedded(settings.state, settings.map_size_bytes)
    metrics = ControlMetrics()
    silent = _Silent(opened, StoreCalls())
    peers = Peers(settings)
    measured = MeasuredMetastore(silent, metrics.calls)
    (service, _), _, _ = await assemble(settings, measured, peers, lambda: (ControlPlace("x:1", True),), time.monotonic)
    metrics.become_active(service)
    try:
        yield metrics, silent
    finally:
        await metrics.stand_by()
        await peers.keep_only(())
        await opened.close()


async def scraped(metrics: ControlMetrics) -> Page:
    samples = await metrics.samples()
    return Page(as_text(METRICS, samples)[0].decode())


def test_one_look_serves_many_scrapes_and_none_who_stands_by(tmp_path: Path) -> None:
    async def main() -> None:
        async with active(tmp_path) as (metrics, _):
            first = await scraped(metrics)
            assert first.value("cairn_control_active") == first.value("cairn_healthy") == 1
            assert first.sum("cairn_volumes") == 0
            looked = first.value("cairn_metastore_call_seconds_count", operation="list")
            pages = await asyncio.gather(*(scraped(metrics) for _ in range(5)))
            assert {page.value("cairn_healthy") for page in pages} == {1}
            after = await scraped(metrics)
            assert after.value("cairn_metastore_call_seconds_count", operation="list") == looked
            await metrics.stand_by()
            standing_by = await scraped(metrics)
            assert standing_by.value("cairn_control_active") == 0
            assert not list(standing_by.find("cairn_healthy"))
            assert standing_by.value("cairn_metastore_call_seconds_count", operation="list") == looked

    asyncio.run(main())


def test_a_metastore_that_is_silent_is_no_empty_cluster(tmp_path: Path) -> None:
    async def main() -> None:
        async with active(tmp_path) as (metrics, store):
            store.silent = True
            page = await scraped(metrics)
            assert page.value("cairn_control_active") == 1
            assert not list(page.find("cairn_volumes"))
            assert page.value("cairn_metastore_errors_total", operation="list") > 0
            store.silent = False
            assert len(list((await scraped(metrics)).find("cairn_volumes"))) == len(pb.VolumeState.values()) - 1

    asyncio.run(main())
