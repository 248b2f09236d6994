"""Each implementation of the metastore, opened for a test: the embedded one, and a real etcd."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import grpc

from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.etcd import EtcdMetastore, open_etcd
from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.control.metastore.etcd_writer import Fence
from blockstore.control.metastore.interface import Metastore
from tests.cluster_simulation.etcd import EtcdMember, EtcdStore
from tests.etcd_server import EtcdServer, running_etcd

Opener = Callable[[Path], AbstractAsyncContextManager[Metastore]]
"""Opened twice on one path, it is the same store."""

#: The etcd of this process, while a test needs it.
_running: list[EtcdServer] = []
#: By path: what a restart finds again.
_simulated: dict[Path, EtcdStore] = {}


@asynccontextmanager
async def embedded(directory: Path) -> AsyncIterator[Metastore]:
    store = open_embedded(directory)
    try:
        yield store
    finally:
        await store.close()


def prefix_for(name: str) -> str:
    """One for each user of an etcd that several share."""
    return "/" + hashlib.sha256(name.encode()).hexdigest()[:20]


@asynccontextmanager
async def opened(client: EtcdClient, fence: Fence | None = None) -> AsyncIterator[EtcdMetastore]:
    """The client is closed with it."""
    try:
        store = await open_etcd(client, fence)
        try:
            yield store
        finally:
            await store.close()
    finally:
        await client.close()


def etcd(directory: Path) -> AbstractAsyncContextManager[Metastore]:
    """The path stands for a prefix."""
    return opened(EtcdClient(EtcdAddress(tuple(_running[0].clients), prefix_for(str(directory)))))


@asynccontextmanager
async def simulated_etcd(directory: Path) -> AsyncIterator[Metastore]:
    """The one of the cluster's simulation, over real gRPC."""
    store = _simulated.setdefault(directory, EtcdStore(time.monotonic))
    server = grpc.aio.server()
    EtcdMember(store).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with opened(EtcdClient(EtcdAddress((f"127.0.0.1:{port}",), "/simulated"))) as metastore:
            yield metastore
    finally:
        await server.stop(None)


IMPLEMENTATIONS: dict[str, Opener] = {"embedded": embedded, "etcd": etcd, "simulated etcd": simulated_etcd}


@contextmanager
def etcd_for_stores(directory: Path) -> Iterator[EtcdServer]:
    """What `etcd` opens stores in."""
    with running_etcd(directory) as server:
        _running.append(server)
        try:
            yield server
        finally:
            _running.remove(server)
