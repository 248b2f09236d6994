"""The metrics of a node: its journal, its disk, and each replica that it has.

What a replica's tables take is asked of LMDB in a thread, for a disk may be slow; all else is read in the event loop.
"""

import asyncio
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from blockstore.errors import CairnError
from blockstore.metrics import Sample, counter, gauge, histogram
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.node import Node

_REPLICA: Final = ("volume", "segment", "replica")

INFO = gauge("node_info", "Always 1: which node this is, and its zone.", "node", "zone")
GROUPS = counter("journal_groups", "Groups written to the journal: one write and one fdatasync each.")
JOURNAL_WRITTEN = counter("journal_written_bytes", "Bytes written to the journal.")
SYNC = histogram("journal_sync", "What fdatasync of the journal took.")
JOURNAL_SIZE = gauge("journal_size_bytes", "What the journal's files take.")
JOURNAL_FREE = gauge("journal_free_bytes", "What can be written before a checkpoint has to free a file.")
CHECKPOINT = histogram("checkpoint", "What bringing one replica's committed records into its tables took.")
CHECKPOINT_FAILURES = counter("checkpoint_failures", "Checkpoints that found no room, or damaged tables.")
UNAPPLIED = gauge("unapplied_bytes", "Records held in memory until a checkpoint, of all replicas.")
UNAPPLIED_LIMIT = gauge("unapplied_limit_bytes", "Beyond so much, writes wait; see --max-unapplied.")
DISK_CAPACITY = gauge("disk_capacity_bytes", "The size of the file system with the node's data.")
DISK_FREE = gauge("disk_free_bytes", "What an ordinary process may still write there.")
DISK_FULL = gauge("disk_full", "1 while the node, or a replica on it, refuses writes for want of room.")
COPIED = counter("rebuild_received_bytes", "Received from peers' tables, for replicas that are filled.")
LOG_FETCHED = counter("catch_up_received_bytes", "Received from peers' journals, for replicas that were away.")
REBUILD_RATE = gauge("rebuild_limit_bytes", "The most of these a second, as control says it; 0: no limit.")
REPLICAS = gauge("replicas", "Replicas by state: whole, filling, damaged (whole, and to be filled anew).", "state")

WHOLE = gauge("replica_whole", "1 while the replica has all up to its position.", *_REPLICA)
FILE = gauge("replica_file_bytes", "What the replica's tables take on disk.", *_REPLICA)
FILE_FREE = gauge("replica_free_bytes", "Pages of that file that hold nothing.", *_REPLICA)
USER = gauge("replica_user_bytes", "Data of guests in it, all generations together.", *_REPLICA)
FILL_EXTENTS = gauge("replica_fill_extents", "Extents (of 1 MiB) that are to be copied to it; 0: none.", *_REPLICA)
FILL_DONE = gauge("replica_fill_extents_done", "How many of these are.", *_REPLICA)
BAD_BLOCKS = counter("replica_bad_blocks", "Blocks that failed their checksums.", *_REPLICA)
REPAIRED_BLOCKS = counter("replica_repaired_blocks", "How many of these were mended from a peer.", *_REPLICA)
SCRUB_RUNNING = gauge("scrub_running", "1 while the replica is scrubbed.", *_REPLICA)
SCRUB_EXTENTS = gauge("scrub_extents", "Extents of the latest pass.", *_REPLICA)
SCRUB_DONE = gauge("scrub_extents_done", "How many of these were looked at.", *_REPLICA)
SCRUB_BAD = gauge("scrub_extents_bad", "Extents still damaged at the end of that pass.", *_REPLICA)
SCRUB_DIFFERING = gauge("scrub_extents_differing", "Extents that show something else than a peer's.", *_REPLICA)
SCRUB_ENDED = gauge(
    "scrub_ended_timestamp_seconds", "When a pass last went through to its end, in Unix time; 0: never.", *_REPLICA
)

METRICS: Final = (
    INFO, GROUPS, JOURNAL_WRITTEN, SYNC, JOURNAL_SIZE, JOURNAL_FREE, CHECKPOINT, CHECKPOINT_FAILURES, UNAPPLIED,
    UNAPPLIED_LIMIT, DISK_CAPACITY, DISK_FREE, DISK_FULL, COPIED, LOG_FETCHED, REBUILD_RATE, REPLICAS, WHOLE, FILE,
    FILE_FREE, USER, FILL_EXTENTS, FILL_DONE, BAD_BLOCKS, REPAIRED_BLOCKS, SCRUB_RUNNING, SCRUB_EXTENTS, SCRUB_DONE,
    SCRUB_BAD, SCRUB_DIFFERING, SCRUB_ENDED,
)  # fmt: skip


async def samples(node: Node, zone: str, data: Path) -> list[Sample]:
    """A picture of now. data: the node's directory."""
    replicas = list(node.replicas())
    seen = [*_of_node(node, zone), *_states(replicas)]
    for hosted in replicas:
        seen += _of_replica(node, hosted)
    return seen + await asyncio.to_thread(_on_disk, replicas, data)


def _of_node(node: Node, zone: str) -> Iterator[Sample]:
    journal, checkpointer = node.journal, node.checkpointer
    yield INFO(1, node.node, zone)
    yield GROUPS(journal.groups)
    yield JOURNAL_WRITTEN(journal.written_bytes)
    yield SYNC(journal.syncs)
    yield JOURNAL_SIZE(journal.size_bytes)
    yield JOURNAL_FREE(journal.free_bytes)
    yield CHECKPOINT(checkpointer.durations)
    yield CHECKPOINT_FAILURES(checkpointer.failures)
    yield UNAPPLIED(node.memory.total_bytes)
    yield UNAPPLIED_LIMIT(node.memory.limit_bytes)
    yield DISK_FULL(node.full)
    yield COPIED(node.catch_up.copied_bytes)
    yield LOG_FETCHED(node.catch_up.log_bytes)
    yield REBUILD_RATE(node.rebuild_rate.rate_bytes)


def _states(replicas: Iterable[HostedReplica]) -> Iterator[Sample]:
    counts = {"whole": 0, "filling": 0, "damaged": 0}
    for hosted in replicas:
        follower = hosted.follower
        counts["damaged" if follower.damaged else "whole" if follower.whole else "filling"] += 1
    for state, count in counts.items():
        yield REPLICAS(count, state)


def _of_replica(node: Node, hosted: HostedReplica) -> Iterator[Sample]:
    labels = _labels(hosted)
    done, total = hosted.follower.copied_extents
    yield WHOLE(hosted.follower.whole, *labels)
    yield FILL_EXTENTS(total, *labels)
    yield FILL_DONE(done, *labels)
    yield BAD_BLOCKS(node.repairer.found.get(hosted.replica, 0), *labels)
    yield REPAIRED_BLOCKS(node.repairer.repaired.get(hosted.replica, 0), *labels)
    scrub = node.scrubber.status(hosted)
    yield SCRUB_RUNNING(scrub.running, *labels)
    yield SCRUB_EXTENTS(scrub.extents_total, *labels)
    yield SCRUB_DONE(scrub.extents_done, *labels)
    yield SCRUB_BAD(scrub.extents_bad, *labels)
    yield SCRUB_DIFFERING(scrub.extents_differing, *labels)
    yield SCRUB_ENDED(scrub.ended_ms / 1000, *labels)


def _on_disk(replicas: Iterable[HostedReplica], data: Path) -> list[Sample]:
    """Blocking."""
    disk = shutil.disk_usage(data)
    seen = [DISK_CAPACITY(disk.total), DISK_FREE(disk.free)]
    for hosted in replicas:
        try:
            usage = hosted.store.usage()
        except CairnError:  # deleted meanwhile, or damaged, which others find and tell
            continue
        labels = _labels(hosted)
        seen += [
            FILE(usage.file_bytes, *labels),
            FILE_FREE(usage.free_page_bytes, *labels),
            USER(usage.user_bytes, *labels),
        ]
    return seen


def _labels(hosted: HostedReplica) -> tuple[str, str, str]:
    return hosted.address.volume, str(hosted.address.segment), hosted.replica
