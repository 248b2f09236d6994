"""Each implementation of the metastore, opened for a test: the embedded one, and a real etcd."""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.etcd import EtcdMetastore, open_etcd
from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.control.metastore.etcd_writer import Fence
from blockstore.control.metastore.interface import Metastore
from tests.etcd_server import EtcdServer, running_etcd

Opener = Callable[[Path], AbstractAsyncContextManager[Metastore]]
"""Opened twice on one path, it is the same store."""

#: The etcd of this process, while a test needs it.
_running: list[EtcdServer] = []


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


IMPLEMENTATIONS: dict[str, Opener] = {"embedded": embedded, "etcd": etcd}


@contextmanager
def etcd_for_stores(directory: Path) -> Iterator[EtcdServer]:
    """What `etcd` opens stores in."""
    with running_etcd(directory) as server:
        _running.append(server)
        try:
            yield server
        finally:
            _running.remove(server)
