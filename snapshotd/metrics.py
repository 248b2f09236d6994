"""The metrics of snapshotd: the object store's requests, what was shipped to it, read from it, pruned in it.

The store's requests are told from the start on, all else once the repository is open.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from blockstore.metrics import Sample, counter, gauge, histogram
from snapshotd.chain_service import ChainService
from snapshotd.measured_store import OPERATIONS, StoreRequests
from snapshotd.reader import SnapshotReader
from snapshotd.tasks import Tasks

OPEN = gauge("snapshotd_open", "1 once the repository is open; 0 while the object store or control is waited for.")
REQUESTS = counter("store_requests", "Requests to the object store, each try by itself.", "operation", "outcome")
REQUEST_DURATION = histogram("store_request", "What these took.", "operation")
SENT = counter("store_sent_bytes", "Bytes of objects that were put.")
RECEIVED = counter("store_received_bytes", "Bytes of objects that were got.")

SHIPS = gauge("ships_under_way", "Snapshots that are being shipped here.")
SHIPPED = counter("ships_completed", "Snapshots that were shipped.")
SHIP_FAILURES = counter("ships_failed", "Snapshots that failed for good: they are in error until somebody retries.")
SHIP_PAUSES = counter("ship_pauses", "Attempts that found somebody away, and are made again.")
SHIP_READ = counter("ship_read_bytes", "Bytes read from replicas.")
SHIP_CHANGED = counter("ship_changed_bytes", "What completed snapshots bring.")
SHIP_DEDUPLICATED = counter("ship_deduplicated_bytes", "What of that was in the store already.")
SHIP_STORED = counter("ship_stored_bytes", "What was stored for the rest, compressed and encrypted.")

FRAMES = counter("frames_fetched", "Frames read from the object store.")
FRAME_BYTES = counter("frame_bytes", "Their bytes, as they are stored.")
SERVED = counter(
    "served_bytes",
    "Bytes of snapshots that front-ends fetched: for a guest who waits, or in the background.",
    "purpose",
)
PRUNES = counter("prunes", "Prunes that were begun; no dry runs.")
PRUNES_ENDED = counter("prunes_ended", "How many of these went through.")
PRUNED_OBJECTS = counter("pruned_objects", "Objects that these deleted.")
REPACKED = counter("repacked_packs", "Packs of which these kept only what is needed.")
PRUNED_BYTES = counter("pruned_bytes", "What these freed.")

METRICS: Final = (
    OPEN, REQUESTS, REQUEST_DURATION, SENT, RECEIVED, SHIPS, SHIPPED, SHIP_FAILURES, SHIP_PAUSES, SHIP_READ,
    SHIP_CHANGED, SHIP_DEDUPLICATED, SHIP_STORED, FRAMES, FRAME_BYTES, SERVED, PRUNES, PRUNES_ENDED, PRUNED_OBJECTS,
    REPACKED, PRUNED_BYTES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a daemon whose repository is open."""

    tasks: Tasks
    reader: SnapshotReader
    service: ChainService


class SnapshotdMetrics:
    """Of one process. parts: set once they are there."""

    def __init__(self) -> None:
        self.requests = StoreRequests()
        self.parts: Parts | None = None

    async def samples(self) -> list[Sample]:
        """A picture of now."""
        parts = self.parts
        seen = [OPEN(parts is not None), *_of_store(self.requests)]
        return [*seen, *_of_ships(parts.tasks), *_of_reads(parts), *_of_prunes(parts.service)] if parts else seen


def _of_store(requests: StoreRequests) -> Iterator[Sample]:
    for (operation, outcome), count in requests.ended.items():
        yield REQUESTS(count, operation, outcome)
    for operation in OPERATIONS:
        yield REQUEST_DURATION(requests.durations[operation], operation)
    yield SENT(requests.sent_bytes)
    yield RECEIVED(requests.received_bytes)


def _of_ships(tasks: Tasks) -> Iterator[Sample]:
    totals = tasks.totals
    yield SHIPS(tasks.ship_count)
    yield SHIPPED(totals.completed)
    yield SHIP_FAILURES(totals.failed)
    yield SHIP_PAUSES(totals.pauses)
    yield SHIP_READ(totals.read_bytes)
    yield SHIP_CHANGED(totals.changed_bytes)
    yield SHIP_DEDUPLICATED(totals.deduplicated_bytes)
    yield SHIP_STORED(totals.stored_bytes)


def _of_reads(parts: Parts) -> Iterator[Sample]:
    yield FRAMES(parts.reader.frames_fetched)
    yield FRAME_BYTES(parts.reader.frame_bytes)
    yield SERVED(parts.service.served.guest_bytes, "guest")
    yield SERVED(parts.service.served.background_bytes, "background")


def _of_prunes(service: ChainService) -> Iterator[Sample]:
    totals = service.pruned
    yield PRUNES(totals.begun)
    yield PRUNES_ENDED(totals.ended)
    yield PRUNED_OBJECTS(totals.objects_deleted)
    yield REPACKED(totals.packs_repacked)
    yield PRUNED_BYTES(totals.bytes_freed)
