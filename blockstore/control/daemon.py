"""The control process: a metastore, the services Control and Snapshots, and the reconcile loop.

With the embedded metastore it is the only one, and active from its start; with etcd it may be one of several, and
stands by until it is its turn (blockstore/control/succession.py). It ends cleanly on SIGTERM and SIGINT, and by
itself when the metastore fails for good: then nothing that it says could be relied on. The address that it
listens at, with the port that it got, is in the file `address` of its state directory while it runs.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final

import structlog

from blockstore.config import ControlSettings
from blockstore.control.awake_clock import AwakeClock
from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.creating import Creating
from blockstore.control.creation import Creation
from blockstore.control.floors import Floors
from blockstore.control.gate import Gate
from blockstore.control.growth import Growth
from blockstore.control.hydration import Hydrations
from blockstore.control.leadership import ControlPlace, Roster
from blockstore.control.maintenance import Upkeep
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.etcd_address import read_address
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.control.metastore.interface import Metastore
from blockstore.control.metastore.measured import MeasuredMetastore
from blockstore.control.metrics import METRICS, ControlMetrics
from blockstore.control.peers import Peers
from blockstore.control.pins import Unpinning
from blockstore.control.placing import Placing
from blockstore.control.presence import Presence
from blockstore.control.reasons import Reasons
from blockstore.control.reconcile import Reconciler
from blockstore.control.registrar import Registrar
from blockstore.control.repair_limits import repair_limits
from blockstore.control.replacing import Replacing
from blockstore.control.scrubbing import Scrubbing
from blockstore.control.sealing import Sealing
from blockstore.control.segment_plan import check_segment_size
from blockstore.control.service import Controls, ControlService
from blockstore.control.shipping import Shipping
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_reading import SnapshotReading
from blockstore.control.snapshot_service import SnapshotService
from blockstore.control.store_warden import StoreWarden
from blockstore.control.succession import Succession
from blockstore.daemon import ADDRESS_FILE, stop_signals, tell_ready, write_address
from blockstore.durable_files import make_directory
from blockstore.errors import QuorumUnavailable
from blockstore.grpc_endpoint import Endpoint
from blockstore.metrics_endpoint import serving_metrics
from blockstore.waiting import while_running

_log = structlog.get_logger(__name__)

#: How long calls under way may take to end when the process does.
GRACE_S: Final = 1.0


async def run(settings: ControlSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises CairnError where it cannot start, or cannot go on."""
    stopped = stop_signals()
    async with serving(settings) as (address, working):
        metastore = settings.metastore or str(settings.state)
        _log.info("control listens", address=address, metastore=metastore)
        tell_ready(f"listens at {address}")
        ends: list[asyncio.Future[Any]] = [stopped, working]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        _log.info("control stops", address=address)
        if working.done():
            working.result()


@asynccontextmanager
async def serving(settings: ControlSettings) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Control at work, or standing by: its address, and what it does, which ends only by failing."""
    address_file = settings.state / ADDRESS_FILE
    etcd = read_address(settings)
    async with AsyncExitStack() as stack:
        metrics = ControlMetrics()
        store = None if etcd else open_embedded(settings.state, settings.map_size_bytes)
        if store:
            stack.push_async_callback(store.close)
        make_directory(settings.state)
        await stack.enter_async_context(serving_metrics(settings.metrics, settings.state, METRICS, metrics.samples))
        address_file.unlink(missing_ok=True)
        endpoint = Endpoint(settings.listen, settings.advertise)
        gate = Gate(endpoint)
        await gate.shut()
        await endpoint.start()
        work = (
            _alone(settings, gate, store, endpoint.address, metrics)
            if store
            else _on_etcd(settings, gate, endpoint.address, metrics)
        )
        working = asyncio.ensure_future(work)
        try:
            if store:
                await while_running(working, gate.opened.wait())
            write_address(address_file, endpoint.address)
            yield endpoint.address, working
        finally:
            address_file.unlink(missing_ok=True)
            await endpoint.stop(GRACE_S)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _alone(
    settings: ControlSettings, gate: Gate, store: Metastore, address: str, metrics: ControlMetrics
) -> None:
    """Active from now on."""
    place = ControlPlace(address, active=True)
    async with _tenure(settings, gate, store, lambda: (place,), metrics) as reconciling:
        await reconciling


async def _on_etcd(settings: ControlSettings, gate: Gate, address: str, metrics: ControlMetrics) -> None:
    """Active whenever it is its turn."""
    etcd = read_address(settings)
    assert etcd is not None
    client = EtcdClient(etcd)
    roster = Roster(client)
    succession = Succession(
        client,
        roster,
        gate,
        lambda store: _tenure(settings, gate, store, roster.places, metrics),
        address=address,
        lease_s=settings.leader_lease_s,
    )
    try:
        await succession.run()
    finally:
        await client.close()


@asynccontextmanager
async def _tenure(
    settings: ControlSettings, gate: Gate, store: Metastore, controls: Controls, metrics: ControlMetrics
) -> AsyncIterator["asyncio.Task[None]"]:
    """Control at work as the active one: the reconcile loop, which ends only by failing."""
    peers = Peers(settings)
    measured = MeasuredMetastore(store, metrics.calls)
    clock = AwakeClock(time.monotonic)
    services, reconciler, floors = await assemble(settings, measured, peers, controls, clock)
    ticking, reconciling = asyncio.ensure_future(clock.run()), asyncio.ensure_future(reconciler.run())
    try:
        await gate.open(*services)
        metrics.become_active(services[0])
        yield reconciling
    finally:
        await metrics.stand_by()
        await gate.shut()
        for task in (reconciling, ticking):
            task.cancel()
        await asyncio.gather(reconciling, ticking, return_exceptions=True)
        await peers.keep_only(())
        # All that is not saved is told again with the next heartbeat.
        with suppress(QuorumUnavailable, TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await floors.save()


async def assemble(
    settings: ControlSettings,
    store: Metastore,
    peers: Peers,
    controls: Controls,
    clock: Callable[[], float],
) -> tuple[tuple[ControlService, SnapshotService], Reconciler, Floors]:
    """The parts of control, joined; nothing of it runs yet. controls: who is in the status. clock: that of leases."""
    catalog, snapshots = Catalog(store), SnapshotCatalog(store)
    presence = Presence(settings.lease_s, clock, now_ms)
    floors = Floors(catalog)
    await floors.load()
    hydrations = Hydrations(snapshots, presence)
    placing, repair = Placing(catalog, presence, settings.placement), repair_limits(catalog, settings)
    creating = Creating(catalog, presence, peers, placing, repair)
    reconciler = Reconciler(
        store,
        catalog,
        presence,
        floors,
        peers,
        hydrations=hydrations,
        creating=creating,
        interval_s=settings.reconcile_s,
    )
    limits = {"seal_limit_s": settings.seal_limit_s, "hold_limit_s": settings.hold_limit_s}
    sealing = Sealing(catalog, snapshots, presence, peers, reconciler, **limits)
    shipping = Shipping(catalog, snapshots, presence)
    unpinning = Unpinning(catalog, snapshots, presence, peers, reconciler)
    upkeep = Upkeep(catalog, snapshots, presence, peers, reconciler, hydrations=hydrations)
    replacing = Replacing(catalog, presence, peers, reconciler, repair)
    for work in (sealing, shipping, unpinning, replacing, upkeep, Reasons(catalog, presence)):
        reconciler.add(work)
    scrubbing = Scrubbing(catalog, presence, peers)
    registrar = Registrar(
        catalog,
        snapshots,
        presence,
        floors,
        reconciler,
        hydrations=hydrations,
        scrubbing=scrubbing,
        replacing=replacing,
        lease_s=settings.lease_s,
    )
    check_segment_size(settings.segment_size_bytes)
    segments = {"segment_size_bytes": settings.segment_size_bytes}
    creation = Creation(catalog, snapshots, presence, reconciler, placing, **segments)
    growth = Growth(catalog, presence, peers, reconciler, placing, limits=repair, **segments)
    reconciler.add(growth)
    warden = StoreWarden(snapshots, presence, reconciler, shipping, settings.lease_s)
    control = ControlService(
        catalog,
        snapshots,
        presence,
        reconciler,
        registrar,
        creation=creation,
        growth=growth,
        scrubbing=scrubbing,
        replacing=replacing,
        controls=controls,
    )
    reading = SnapshotReading(catalog, snapshots, presence, reconciler, registrar)
    snapshot = SnapshotService(
        catalog, snapshots, presence, reconciler, sealing=sealing, shipping=shipping, warden=warden, reading=reading
    )
    return (control, snapshot), reconciler, floors
