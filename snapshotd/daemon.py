"""The process of snapshotd: the object store, the SnapshotStore service, and the work that control gives it.

It keeps nothing that is not in the object store but its id, the cluster's name, a cache of hashes, and (where no other
is named) the keyring. It serves snapshots also while control is away, once it has been told which
cluster it belongs to.
"""

import asyncio
import fcntl
import os
import secrets
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import structlog

from blockstore.config import Addressing, SnapshotdSettings
from blockstore.daemon import stop_signals, tell_ready, write_address
from blockstore.domain import check_id, make_id
from blockstore.durable_files import make_directory, write_durably
from blockstore.errors import CairnError, Conflict, NotFound, QuorumUnavailable
from blockstore.grpc_endpoint import Endpoint
from blockstore.metrics_endpoint import serving_metrics
from snapshotd.chain_service import ChainParts
from snapshotd.control_client import ControlClient
from snapshotd.dedupe import Dedupe
from snapshotd.measured_store import StoreRequests
from snapshotd.metrics import METRICS, Parts, SnapshotdMetrics
from snapshotd.object_store import ObjectStore
from snapshotd.pack_index import PackIndex
from snapshotd.pack_store import PackStore
from snapshotd.reader import SnapshotReader
from snapshotd.repository import Repository, open_repository
from snapshotd.service import add_snapshot_store_service
from snapshotd.store_settings import StoreSettings
from snapshotd.stores import open_keyring, open_store
from snapshotd.tasks import Tasks
from snapshotd.throttle import Throttled, TokenBucket

_log = structlog.get_logger(__name__)
#: Threads that hash give the interpreter's lock back soon: what a guest waits for is served between two blocks of them.
SWITCH_INTERVAL_S: Final = 0.0005
_GRACE_S: Final = 1.0
_PAUSE_S: Final = 1.0
#: What registers before there is a repository: control names the cluster that will own it, and no more.
_NO_REPOSITORY: Final = ""


async def run(settings: SnapshotdSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns 0.

    Raises Conflict where the directory or the address is in use, or the cluster's snapshots are in another repository;
    InvalidRequest where the store or the key is refused; Fenced where another process runs with this daemon's id.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stopped = stop_signals()
    async with AsyncExitStack() as stack:
        serving = asyncio.create_task(_serve(settings, stack))
        ends: list[asyncio.Future[Any]] = [stopped, serving]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        ended = (await asyncio.gather(serving, return_exceptions=True))[0]
    if not stopped.done() and isinstance(ended, Exception):
        raise ended
    return 0


async def _serve(settings: SnapshotdSettings, stack: AsyncExitStack) -> None:
    """Until cancelled. What is opened goes onto `stack`."""
    _lock_state(settings.state, stack)
    metrics = SnapshotdMetrics()
    await stack.enter_async_context(serving_metrics(settings.metrics, settings.state, METRICS, metrics.samples))
    endpoint = Endpoint(settings.listen, settings.advertise)
    daemon = daemon_id(settings.state)
    control = ControlClient(settings.control, daemon, secrets.token_hex(8), settings.call_timeout_s)
    stack.push_async_callback(control.close)
    await control.announce(settings.store, "")
    try:
        store = await _open_store(settings, control, metrics.requests)
        stack.push_async_callback(store.close)
        repository, cluster = await _open_repository(settings, store, control)
    except CairnError as error:
        await control.announce(settings.store, str(error))
        raise
    index = PackIndex(repository)
    reader = SnapshotReader(repository, settings.cache_bytes, index)
    identity = (repository.id + repository.keys.domain.hex()).encode()
    dedupe = await asyncio.to_thread(Dedupe, settings.state / "hashes", identity)
    packs = PackStore(repository, index, dedupe, settings.uploads, settings.zstd_level)
    stack.push_async_callback(packs.close)
    tasks = Tasks(settings, packs, reader, control, cluster)
    stack.push_async_callback(tasks.close)
    chain = ChainParts(
        repository, packs, reader, control.catalog, cluster, lambda: open_keyring(store_settings(settings))
    )
    metrics.parts = Parts(tasks, reader, add_snapshot_store_service(chain, endpoint))
    await endpoint.start()
    stack.push_async_callback(endpoint.stop, _GRACE_S)
    tasks.address = endpoint.address
    write_address(settings.state / "address", endpoint.address)
    tell_ready(f"{daemon} serves {store.url}")
    _log.info("snapshotd serves", daemon=daemon, address=endpoint.address, store=store.url, repository=repository.id)
    await tasks.run()


def daemon_id(state: Path) -> str:
    """The id in `state`, made at the first start. Raises InvalidRequest where the file holds something else."""
    path = state / "id"
    if not path.exists():
        write_durably(path, make_id("sd", secrets.token_bytes(9)))
    return check_id("sd", path.read_text().strip())


def store_settings(settings: SnapshotdSettings) -> StoreSettings:
    """What the store and the keyring are opened with. Where no key is named, the keyring is in the state directory."""
    keyring = settings.keyring_file
    if keyring is None and settings.passphrase_file is None:
        keyring = settings.state / "keyring.json"
    return StoreSettings(
        url=settings.store,
        s3_endpoint=settings.s3_endpoint,
        s3_region=settings.s3_region,
        s3_virtual_hosted=settings.s3_addressing is Addressing.HOST,
        # Who writes http:// has said so; what crosses is encrypted and signed in any case.
        s3_allow_http=settings.s3_endpoint.startswith("http://"),
        keyring=keyring,
        passphrase_file=settings.passphrase_file,
    )


def _lock_state(state: Path, stack: AsyncExitStack) -> None:
    """Raises Conflict while another process has the directory."""
    make_directory(state)
    descriptor = os.open(state / "LOCK", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Conflict(f"another process uses {state}: stop that snapshotd first") from error


async def _open_store(settings: SnapshotdSettings, control: ControlClient, requests: StoreRequests) -> ObjectStore:
    """Raises InvalidRequest where it refuses us; one that does not answer is waited for."""
    while True:
        try:
            store = await open_store(store_settings(settings), requests)
            return Throttled(store, up=TokenBucket(settings.upload_rate_bytes))
        except QuorumUnavailable as error:
            _log.warning("the object store does not answer; trying on", error=str(error))
            await control.announce(settings.store, str(error))
        await asyncio.sleep(_PAUSE_S)


async def _open_repository(
    settings: SnapshotdSettings, store: ObjectStore, control: ControlClient
) -> tuple[Repository, str]:
    """The repository in the store, made where there is none, and the name of this cluster.

    One of another cluster is opened, too: to be read, and for `cairn store adopt --force`. Nothing is written to it.
    """
    keyring = await asyncio.to_thread(open_keyring, store_settings(settings), create=True)
    known = settings.state / "cluster"
    try:
        repository = await open_repository(store, keyring, "", create=False, any_owner=True)
    except NotFound:
        cluster = await _ask_cluster(control, store, _NO_REPOSITORY, "")
        repository = await open_repository(store, keyring, cluster, create=True, any_owner=True)
    else:
        cluster = await _ask_cluster(control, store, repository.id, _read(known))
    write_durably(known, cluster)
    if repository.owner != cluster:
        _log.error(
            "the object store belongs to another cluster, and nothing is written to it; if that one is gone for good, "
            "take it over with `cairn store adopt --force`",
            store=store.url,
            owner=repository.owner,
            cluster=cluster,
        )
    return repository, cluster


async def _ask_cluster(control: ControlClient, store: ObjectStore, repository: str, known: str) -> str:
    """The name of control's cluster; where control does not answer, the `known` one, else (empty) it is waited for.

    The address that is told is nobody's: the service starts when the repository is open, and registers anew.
    Raises Conflict where a repository would be made, and the cluster's snapshots are in another one.
    """
    while True:
        try:
            return (await control.register("127.0.0.1:1", store.url, repository)).cluster
        except QuorumUnavailable as error:
            if known:
                return known
            _log.warning("control does not answer; without it the store's owner is not known", error=str(error))
        await asyncio.sleep(_PAUSE_S)


def _read(path: Path) -> str:
    """What the file holds, empty where there is none."""
    return path.read_text().strip() if path.exists() else ""
