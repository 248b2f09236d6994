"""What a replica's log is, from the image of its last checkpoint and the journal entries after it.

Replay is idempotent. The image may reflect any of the entries already: records that are applied or
held are skipped, and a cut or a new start below what is applied has been overtaken. A record that
does not follow may still belong to a tail that a later entry cuts; one that nothing cuts leaves a
gap, and the replica then cannot say that it holds what it acked.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from blockstore.domain import Position
from blockstore.log import (
    UNKNOWN_FLOOR,
    Filling,
    FillingEntry,
    LogEntry,
    LogImage,
    RecordEntry,
    SealEntry,
    TruncateEntry,
    WholeEntry,
)
from blockstore.record import Record
from blockstore.replication.record_run import RecordRun
from blockstore.units import Epoch


@dataclass(slots=True)
class Replayed:
    """The state that the entries lead to. highest: any position seen; gap: a record did not follow."""

    run: RecordRun
    epoch: Epoch
    configuration: int
    filling: Filling | None
    highest: Position
    gap: bool = False


def copies(filling: Filling | None) -> bool:
    """Whether content below the base is missing, rather than only trust."""
    return filling is not None and filling.since < filling.base.sequence


def replay(image: LogImage, entries: Iterable[LogEntry]) -> Replayed:
    """The log as of the last of `entries`, which follow each other in the journal's order."""
    run = RecordRun(image.applied, image.records)
    state = Replayed(run, image.epoch, image.configuration, image.filling, run.end)
    for entry in entries:
        replay_entry(state, entry)
    return state


def replay_entry(state: Replayed, entry: LogEntry) -> None:
    """What `state` becomes by the next entry."""
    match entry:
        case RecordEntry(record):
            _take(state, record)
        case SealEntry(epoch, configuration):
            state.epoch = max(state.epoch, epoch)
            state.configuration = max(state.configuration, configuration)
        case TruncateEntry(after):
            _cut(state, after)
        case FillingEntry(filling):
            _fill(state, filling)
        case WholeEntry():
            state.filling = None


def _take(state: Replayed, record: Record) -> None:
    run = state.run
    state.highest = max(state.highest, record.position)
    if record.sequence <= run.start.sequence or run.holds(record.position):
        return
    if run.position_at(record.sequence - 1) != record.previous:
        state.gap = True
        return
    run.truncate(record.previous.sequence)
    run.append(record)


def _cut(state: Replayed, after: int) -> None:
    """What did not follow was of the tail, unless the log ends even below the cut."""
    if after > state.run.end.sequence:
        return
    state.gap = False
    if after >= state.run.start.sequence:
        state.run.truncate(after)


def _fill(state: Replayed, filling: Filling) -> None:
    """The log keeps what it holds up to the base; where a delta brings what is below, it starts there anew."""
    state.filling = filling
    if filling.floor != UNKNOWN_FLOOR:
        state.highest = max(state.highest, filling.floor)
    state.gap = False
    if filling.base.sequence < state.run.start.sequence:
        return
    if state.run.holds(filling.base):
        state.run.truncate(filling.base.sequence)
    elif copies(filling):
        state.run = RecordRun(filling.base)
    else:
        state.gap = True  # it copies nothing, but rests on records that are lost
