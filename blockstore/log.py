"""What a replica's journal holds, and the image of it that a checkpoint keeps.

The journal is the truth between checkpoints: a replica's state is its last image and the entries
after it, replayed in order. The image is written in the same LMDB transaction as the tables, so
that the two never disagree. Replay is idempotent: an entry that the image already reflects
changes nothing.
"""

import struct
from enum import IntEnum
from typing import Final

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import Corrupt
from blockstore.record import Record, decode_record
from blockstore.units import FIRST_GENERATION, Epoch, Generation, Sequence
from blockstore.values import value

UNKNOWN_FLOOR: Final = Position(Epoch((1 << 64) - 1), Sequence((1 << 64) - 1))
"""Above everything: the floor of a replica of which nobody can say how far it had acked."""


class EntryKind(IntEnum):
    """The kinds of journal entries. The numbers are part of the stored format."""

    RECORD = 1
    SEAL = 2
    TRUNCATE = 3
    FILLING = 4
    WHOLE = 5


@value
class RecordEntry:
    """A record joins the log behind its predecessor."""

    record: Record


@value
class SealEntry:
    """From here on nothing of an older epoch or configuration is accepted."""

    epoch: Epoch
    configuration: int


@value
class TruncateEntry:
    """Every record above `after` leaves the log; it shares a journal group with what replaces them."""

    after: Sequence


@value
class Filling:
    """What a replica that is being copied to must remember.

    floor: the highest position that it may ever have acked; never falls. base: the committed
    position at which its live stream starts. since: what it had applied when it began to fill:
    extents changed above that are copied.
    """

    floor: Position
    base: Position
    since: Sequence


@value
class FillingEntry:
    """The old log ends: its unapplied records are never applied. The new one starts at filling.base."""

    filling: Filling


@value
class WholeEntry:
    """The replica has all up to its position again."""


LogEntry = RecordEntry | SealEntry | TruncateEntry | FillingEntry | WholeEntry


@value
class LogImage:
    """A replica's log as a checkpoint keeps it, or as replay finds it.

    applied: everything up to here is in the tables (or, while filling, is what a delta brings). epoch,
    configuration: the highest sealed. filling: None when whole. records: the log after `applied`, in
    order; they may be uncommitted. generation: the layer that a write behind `applied` belongs to.
    copied: the highest position at which a peer stated the content that was copied from it. known: what
    the other members had acked, as far as a leader told; it may be missing, but is never too much.
    """

    applied: Position = ORIGIN
    epoch: Epoch = Epoch(0)
    configuration: int = 0
    filling: Filling | None = None
    records: tuple[Record, ...] = ()
    generation: Generation = FIRST_GENERATION
    copied: Position = ORIGIN
    known: tuple[tuple[ReplicaId, Position], ...] = ()

    @property
    def end(self) -> Position:
        """The position of the last record, that of the tables where there is none after them."""
        return self.records[-1].position if self.records else self.applied


_SEAL: Final = struct.Struct("<QI")
_TRUNCATE: Final = struct.Struct("<Q")
_FILLING: Final = struct.Struct("<QQQQQ")


def encode_filling(filling: Filling) -> bytes:
    """The bytes of `filling`, in the journal and in the image."""
    return _FILLING.pack(*filling.floor, *filling.base, filling.since)


def decode_filling(payload: bytes) -> Filling:
    """The reverse of encode_filling. Raises Corrupt."""
    if len(payload) != _FILLING.size:
        raise Corrupt(f"a filling entry of {len(payload)} bytes, expected {_FILLING.size}")
    fe, fs, be, bs, since = _FILLING.unpack(payload)
    return Filling(Position(Epoch(fe), Sequence(fs)), Position(Epoch(be), Sequence(bs)), Sequence(since))


def encode_entry(entry: LogEntry) -> tuple[EntryKind, bytes | memoryview]:
    """The kind and the payload of a journal entry."""
    match entry:
        case RecordEntry(record):
            return EntryKind.RECORD, record.encoded
        case SealEntry(epoch, configuration):
            return EntryKind.SEAL, _SEAL.pack(epoch, configuration)
        case TruncateEntry(after):
            return EntryKind.TRUNCATE, _TRUNCATE.pack(after)
        case FillingEntry(filling):
            return EntryKind.FILLING, encode_filling(filling)
        case WholeEntry():
            return EntryKind.WHOLE, b""


def decode_entry(kind: int, payload: bytes) -> LogEntry:
    """The reverse of encode_entry, for bytes that the journal's checksums vouch for. Raises Corrupt."""
    try:
        match EntryKind(kind):
            case EntryKind.RECORD:
                return RecordEntry(decode_record(payload, verify_blocks=False))
            case EntryKind.SEAL:
                epoch, configuration = _SEAL.unpack(payload)
                return SealEntry(Epoch(epoch), configuration)
            case EntryKind.TRUNCATE:
                return TruncateEntry(Sequence(*_TRUNCATE.unpack(payload)))
            case EntryKind.FILLING:
                return FillingEntry(decode_filling(payload))
            case EntryKind.WHOLE:
                return WholeEntry()
    except (ValueError, struct.error) as error:
        raise Corrupt(f"a journal entry of kind {kind} and {len(payload)} bytes: {error}") from error
