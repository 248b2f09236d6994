"""The node's process: storage, the Replica service, and word to control."""

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any

import structlog

from blockstore.config import EXIT_DO_NOT_RESTART, NodeSettings, split_address
from blockstore.daemon import ADDRESS_FILE, keep_freed_memory, stop_signals, tell_ready, write_address
from blockstore.errors import Fenced
from blockstore.grpc_endpoint import Endpoint
from blockstore.metrics_endpoint import serving_metrics
from blockstore.node.metrics import METRICS, samples
from blockstore.node.node import Node
from blockstore.node.registration import Registration
from blockstore.node.replica_streams import ReplicaStreams
from blockstore.node.service import add_replica_service

_log = structlog.get_logger(__name__)
_GRACE_S = 1.0
#: LMDB gives up the interpreter's lock at every put. Beside a busy event loop a checkpoint of 4,096 random blocks
#: took 3.3 s with Python's own 5 ms, 1.0 s with this.
SWITCH_INTERVAL_S = 0.0005
#: LMDB takes 2 MiB of zeroes for each open environment, and most of it is never touched. From the heap, where memory
#: is used again and so has to be zeroed, that was 2 GiB for a thousand replicas; fresh from the kernel it is nothing.
#: What is received and sent all the time is smaller.
HEAP_UP_TO_BYTES = 2 << 20


async def run(settings: NodeSettings) -> int:
    """Serve until SIGTERM or SIGINT, then return 0; return another exit code where the disk failed.

    EXIT_DO_NOT_RESTART where another process runs as this node: started again, the two would take turns.
    Raises Conflict where the directory or the address is in use.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_freed_memory(HEAP_UP_TO_BYTES)
    stopped = stop_signals()
    node = Node(settings)
    endpoint = Endpoint(settings.listen, settings.advertise)
    streams = ReplicaStreams(node)
    stack = AsyncExitStack()
    add_replica_service(node, streams, settings, endpoint)
    try:
        if settings.streams_port >= 0:
            await streams.start(split_address(settings.listen)[0], settings.streams_port)
        await stack.enter_async_context(_serving_metrics(node, settings))
        await endpoint.start()
        write_address(settings.data / ADDRESS_FILE, endpoint.address)
        _log.info("node serves", node=node.node, zone=settings.zone, address=endpoint.address)
        tell_ready(f"{node.node} serves at {endpoint.address}")
        registration = asyncio.create_task(Registration(node, settings, endpoint.address).run())
        ends: list[asyncio.Future[Any]] = [stopped, node.failed, registration]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        registration.cancel()
        await asyncio.gather(registration, return_exceptions=True)
        await endpoint.stop(0 if node.failed.done() else _GRACE_S)
    finally:
        await stack.aclose()
        streams.stop()
        await node.close()
    if node.failed.done():
        return node.failed.result()
    error = None if registration.cancelled() else registration.exception()
    if isinstance(error, Fenced):
        _log.critical("this node is another process now", node=node.node, error=str(error))
        return EXIT_DO_NOT_RESTART
    if error is not None:
        raise error
    return 0


def _serving_metrics(node: Node, settings: NodeSettings) -> AbstractAsyncContextManager[str]:
    collect = partial(samples, node, settings.zone, settings.data)
    return serving_metrics(settings.metrics, settings.data, METRICS, collect)
