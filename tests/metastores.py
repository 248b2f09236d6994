"""Each implementation of the metastore, opened for a test: the embedded one, and a real etcd."""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.etcd import open_etcd
from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.etcd_client import EtcdClient
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


@asynccontextmanager
async def etcd(directory: Path) -> AsyncIterator[Metastore]:
    """The path stands for a prefix."""
    prefix = "/" + hashlib.sha256(str(directory).encode()).hexdigest()[:20]
    client = EtcdClient(EtcdAddress(tuple(_running[0].clients), prefix))
    try:
        store = await open_etcd(client)
        try:
            yield store
        finally:
            await store.close()
    finally:
        await client.close()


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
