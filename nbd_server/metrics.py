"""The metrics of a front-end: what clients ask for, and how the volumes that it leads do.

Samples of a volume are there while it is attached here; what only grows begins at 0 with each attachment. Snapshots
and clones that clients read are told together, under the volume SNAPSHOTS.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from blockstore.metrics import Durations, Sample, counter, gauge, histogram
from blockstore.replication.status import LeaderStatus, MemberStatus
from blockstore.units import BLOCK_SIZE
from blockstore.volume.open_volume import OpenVolume
from nbd_server.attempt import Attempt
from nbd_server.command_counts import CommandCounts
from nbd_server.front_end import FrontEnd
from nbd_server.server import NbdServer
from nbd_server.wire import Command, WireError

#: In the place of a volume's id.
SNAPSHOTS: Final = "snapshots"
_COMMANDS: Final = {command: command.name.lower() for command in Command if command is not Command.DISC}

COMMANDS = counter("nbd_commands", "NBD requests that ended.", "volume", "command")
COMMAND_BYTES = counter("nbd_command_bytes", "Bytes that these requests were about.", "volume", "command")
COMMAND_TIME = counter("nbd_command_seconds", "What these requests took, all together.", "volume", "command")
COMMAND_DURATION = histogram(
    "nbd_command_duration", "What requests of all volumes took, until their answers were given.", "command"
)
ERRORS = counter(
    "nbd_errors", "Errors that clients were told, also of requests that made no sense.", "volume", "command", "error"
)
CONNECTIONS = gauge("nbd_connections", "Connections of NBD clients.")
WAITING_CONNECTIONS = gauge("nbd_waiting_connections", "Connections that wait for memory which others hold.")
IN_FLIGHT = gauge("nbd_in_flight_requests", "Requests that have no answer yet.")
IN_FLIGHT_BYTES = gauge("nbd_in_flight_bytes", "Memory for what clients write and read now; see --max-in-flight.")
IN_FLIGHT_LIMIT = gauge("nbd_in_flight_limit_bytes", "The most that may be.")

SERVED = gauge("volume_served", "1 while guests are served, 0 while it is being opened or was lost.", "volume")
SIZE = gauge("volume_size_bytes", "The volume's size.", "volume")
EPOCH = gauge("volume_epoch", "The epoch of the attachment.", "volume")
CONNECTED = gauge(
    "volume_member_connected", "1 while the replica's node answers.", "volume", "segment", "replica", "node"
)
WHOLE = gauge(
    "volume_member_whole", "1 while the replica has all up to its position.", "volume", "segment", "replica", "node"
)
LAG = gauge(
    "volume_member_lag_records",
    "Records by which the replica is behind this front-end's log.",
    "volume", "segment", "replica", "node",
)  # fmt: skip
HELD = gauge("volume_held_writes", "Writes that wait until the nodes have room.", "volume")
WAITING_BYTES = gauge("volume_waiting_write_bytes", "Bytes of writes that are in no record yet.", "volume")
BARRIER = gauge("volume_barrier", "1 while the answers to writes are kept for a snapshot.", "volume")
COMMIT = histogram("volume_commit", "From when a record's first write came to its commit by a quorum.", "volume")
UNLEASED = counter(
    "volume_unleased_reads",
    "Reads that had to wait, with their data here, until a quorum confirmed the epoch.",
    "volume",
)
SHORT_CIRCUIT = counter(
    "volume_short_circuit_reads",
    "Reads that were answered out of a replica's tables on this machine, without its node.",
    "volume",
)
HYDRATION_SIZE = gauge(
    "volume_hydration_bytes", "What of a restored volume has to be brought from its source.", "volume"
)
HYDRATED = gauge("volume_hydrated_bytes", "What of that is there.", "volume")

METRICS: Final = (
    COMMANDS, COMMAND_BYTES, COMMAND_TIME, COMMAND_DURATION, ERRORS, CONNECTIONS, WAITING_CONNECTIONS, IN_FLIGHT,
    IN_FLIGHT_BYTES, IN_FLIGHT_LIMIT, SERVED, SIZE, EPOCH, CONNECTED, WHOLE, LAG, HELD, WAITING_BYTES, BARRIER, COMMIT,
    UNLEASED, SHORT_CIRCUIT, HYDRATION_SIZE, HYDRATED,
)  # fmt: skip


def samples(server: NbdServer, front_end: FrontEnd) -> list[Sample]:
    """A picture of now."""
    return [*_of_server(server), *_of_volumes(front_end), *_of_counts(SNAPSHOTS, front_end.snapshot_counts)]


def _of_server(server: NbdServer) -> Iterator[Sample]:
    yield CONNECTIONS(server.connection_count)
    yield WAITING_CONNECTIONS(server.waiting_connections)
    yield IN_FLIGHT(server.in_flight_requests)
    yield IN_FLIGHT_BYTES(server.in_flight_bytes)
    yield IN_FLIGHT_LIMIT(server.in_flight_limit_bytes)
    for command, name in _COMMANDS.items():
        yield COMMAND_DURATION(server.durations.by_command[command], name)


def _of_volumes(front_end: FrontEnd) -> Iterator[Sample]:
    for attempt in front_end.attempts:
        yield from _of_counts(attempt.volume.volume, attempt.device.counts)
        statuses = [segment.status() for segment in attempt.volume.segments]
        yield from _of_volume(attempt, statuses)
        for segment, status in zip(attempt.volume.segments, statuses, strict=True):
            yield from _of_members(segment, status.members)


def _of_counts(volume: str, counts: CommandCounts) -> Iterator[Sample]:
    """Commands that were never asked for are left out, but for reads and writes."""
    for command, name in _COMMANDS.items():
        if counts.ended[command] or command in (Command.READ, Command.WRITE):
            yield COMMANDS(counts.ended[command], volume, name)
            yield COMMAND_BYTES(counts.size_bytes[command], volume, name)
            yield COMMAND_TIME(counts.seconds[command], volume, name)
    for (number, error), count in counts.errors.items():
        yield ERRORS(count, volume, Command(number).name.lower(), WireError(error).name)


def _of_volume(attempt: Attempt, statuses: Sequence[LeaderStatus]) -> Iterator[Sample]:
    volume = attempt.volume.volume
    yield SERVED(attempt.is_served, volume)
    yield SIZE(attempt.volume.size_bytes, volume)
    yield EPOCH(attempt.epoch, volume)
    yield HELD(sum(each.held for each in statuses), volume)
    yield WAITING_BYTES(sum(each.waiting_bytes for each in statuses), volume)
    yield BARRIER(attempt.barriers.holding, volume)
    yield COMMIT(Durations.joined(each.commits for each in statuses), volume)
    yield UNLEASED(sum(each.unleased for each in statuses), volume)
    yield SHORT_CIRCUIT(sum(each.short_circuit_reads for each in attempt.volume.segments), volume)
    hydration = attempt.hydration
    if hydration is not None:
        yield HYDRATION_SIZE(hydration.blocks_total * BLOCK_SIZE, volume)
        yield HYDRATED(hydration.blocks_done * BLOCK_SIZE, volume)


def _of_members(segment: OpenVolume, members: Iterable[MemberStatus]) -> Iterator[Sample]:
    nodes = {each.replica: each.node for each in segment.configuration.everyone}
    for member in members:
        labels = segment.volume, str(segment.segment), member.replica, nodes[member.replica]
        yield CONNECTED(member.connected, *labels)
        yield WHOLE(member.whole, *labels)
        yield LAG(member.lag_records, *labels)
