"""The control process: the embedded metastore, the services Control and Snapshots, and the reconcile loop.

It ends cleanly on SIGTERM and SIGINT, and by itself when the metastore fails: then nothing that it
says could be relied on. The address that it listens at, with the port that it got, is in the file
`address` of its state directory while it runs.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from blockstore.config import ControlSettings
from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.creation import Creation
from blockstore.control.floors import Floors
from blockstore.control.hydration import Hydrations
from blockstore.control.maintenance import Upkeep
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.interface import Metastore
from blockstore.control.peers import Peers
from blockstore.control.pins import Unpinning
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.registrar import Registrar
from blockstore.control.scrubbing import Scrubbing
from blockstore.control.sealing import Sealing
from blockstore.control.service import ControlService
from blockstore.control.shipping import Shipping
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_service import SnapshotService
from blockstore.control.store_warden import StoreWarden
from blockstore.daemon import stop_signals, write_address
from blockstore.grpc_endpoint import Endpoint
from blockstore.rpc import control_pb2, control_pb2_grpc, snapshot_pb2, snapshot_pb2_grpc

_log = structlog.get_logger(__name__)

#: In the state directory: HOST:PORT and a newline.
ADDRESS_FILE: Final = "address"
#: How long calls under way may take to end when the process does.
GRACE_S: Final = 1.0


async def run(settings: ControlSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises CairnError where it cannot start, or cannot go on."""
    stopped = stop_signals()
    async with serving(settings) as (address, reconciling):
        _log.info("control listens", address=address, state=str(settings.state))
        ends: list[asyncio.Future[Any]] = [stopped, reconciling]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        _log.info("control stops", address=address)
        if reconciling.done():
            reconciling.result()


@asynccontextmanager
async def serving(settings: ControlSettings) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Control at work: its address, and the reconcile loop, which ends only by failing."""
    address_file = settings.state / ADDRESS_FILE
    store = open_embedded(settings.state, settings.map_size_bytes)
    try:
        address_file.unlink(missing_ok=True)
        peers = Peers(settings)
        endpoint, reconciler, floors = await assemble(settings, store, peers)
        await endpoint.start()
        reconciling = asyncio.ensure_future(reconciler.run())
        try:
            write_address(address_file, endpoint.address)
            yield endpoint.address, reconciling
        finally:
            address_file.unlink(missing_ok=True)
            await endpoint.stop(GRACE_S)
            reconciling.cancel()
            await asyncio.gather(reconciling, return_exceptions=True)
            await peers.keep_only(())
            await floors.save()
    finally:
        await store.close()


async def assemble(settings: ControlSettings, store: Metastore, peers: Peers) -> tuple[Endpoint, Reconciler, Floors]:
    """The parts of control, joined; neither the endpoint nor the loop runs yet."""
    catalog, snapshots = Catalog(store), SnapshotCatalog(store)
    presence = Presence(settings.lease_s, time.monotonic, now_ms)
    floors = Floors(catalog)
    await floors.load()
    hydrations = Hydrations(snapshots, presence)
    reconciler = Reconciler(
        store, catalog, presence, floors, peers, hydrations=hydrations, interval_s=settings.reconcile_s
    )
    limits = {"seal_limit_s": settings.seal_limit_s, "hold_limit_s": settings.hold_limit_s}
    sealing = Sealing(catalog, snapshots, presence, peers, reconciler, **limits)
    shipping = Shipping(catalog, snapshots, presence)
    unpinning = Unpinning(catalog, snapshots, peers, reconciler)
    upkeep = Upkeep(catalog, snapshots, presence, peers, reconciler, hydrations=hydrations)
    for work in (sealing, shipping, unpinning, upkeep):
        reconciler.add(work)
    scrubbing = Scrubbing(catalog, presence, peers)
    registrar = Registrar(
        catalog, presence, floors, reconciler, hydrations=hydrations, scrubbing=scrubbing, lease_s=settings.lease_s
    )
    creation = Creation(catalog, snapshots, presence, reconciler, settings.placement)
    warden = StoreWarden(snapshots, presence, reconciler, shipping, settings.lease_s)
    control = ControlService(
        catalog, snapshots, presence, reconciler, registrar, creation=creation, scrubbing=scrubbing
    )
    snapshot = SnapshotService(
        catalog, snapshots, presence, reconciler, sealing=sealing, shipping=shipping, warden=warden
    )
    endpoint = Endpoint(settings.listen)
    control_pb2_grpc.add_ControlServicer_to_server(control, endpoint.server)
    snapshot_pb2_grpc.add_SnapshotsServicer_to_server(snapshot, endpoint.server)
    endpoint.add_names(
        [
            control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
            snapshot_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name,
        ]
    )
    return endpoint, reconciler, floors
