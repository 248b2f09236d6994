"""The `meta` table: what a replica is and how far it got, as named rows.

One row for each fact, each under its own checksum. Rows that come in numbers have their number in
the name: a sealed generation, a pin, a tombstone. A pin that is taken away while the replica fills
leaves a row that says so, and every trim then leaves a tombstone, because a copy that was stated
earlier would bring back what they took away; both go when the replica is whole (docs/storage.md, copies).
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from blockstore.domain import Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.errors import Conflict, Corrupt, NotFound, QuorumUnavailable
from blockstore.log import LogImage, decode_filling, encode_filling
from blockstore.record import HEADER_SIZE, Record, decode_record
from blockstore.storage.keys import number_key, with_check, without_check
from blockstore.storage.tables import Handles, Reading, Writing
from blockstore.units import FILL_GENERATION, Epoch, Generation, Sequence

FORMAT: Final = b"cairn tables 1"

_POSITION: Final = struct.Struct("<QQ")
_NUMBER: Final = struct.Struct("<Q")
_ACKED: Final = struct.Struct("<21sQQ")
_GENERATION: Final = struct.Struct(">I")
_SEALED: Final = struct.Struct("<QB")
_PIN: Final = struct.Struct("<QB")
_TOMBSTONE: Final = struct.Struct("<QQIQ")
_TOMBSTONE_NAME: Final = struct.Struct(">QQ")
_GENERATION_PREFIX: Final = b"generation/"
_PIN_PREFIX: Final = b"pin/"
_TOMBSTONE_PREFIX: Final = b"tombstone/"
_DISCARD_PREFIX: Final = b"discard/"
#: LMDB's limit on keys less the prefix and the number: a snapshot's id is far shorter.
MAX_PIN_ID: Final = 256


class SealedGeneration(NamedTuple):
    """A generation that a SEAL closed.

    argument: what the SEAL carried, a snapshot's id. merging: its versions are being deleted, so it
    cannot be read any more.
    """

    generation: Generation
    sequence: Sequence
    argument: bytes
    merging: bool = False


class Pin(NamedTuple):
    """Who keeps a generation, and since which record; held is False for the mark of one taken away."""

    generation: Generation
    holder: bytes
    sequence: Sequence
    held: bool


class Tombstone(NamedTuple):
    """A trim or zero of [start, end) in a generation, which copies stated before it must not undo.

    discarded: it was a DISCARD, which covers no source.
    """

    start: int
    end: int
    generation: Generation
    sequence: Sequence
    discarded: bool = False


class Meta:
    """Reads and writes the rows of `meta` and `tail` in one transaction, which the caller holds."""

    def __init__(self, tables: Handles, transaction: Reading | Writing) -> None:
        self._table = tables.meta
        self._tail = tables.tail
        self._transaction = transaction

    # ---- single rows

    def get(self, name: bytes) -> bytes | None:
        """A row's content. Raises Corrupt."""
        value = self._transaction.get(name, db=self._table)
        return None if value is None else without_check(name, value)

    def put(self, name: bytes, content: bytes) -> None:
        self._transaction.put(name, with_check(name, content), db=self._table)

    def delete(self, name: bytes) -> None:
        self._transaction.delete(name, db=self._table)

    def _must(self, name: bytes, size: int | None = None) -> bytes:
        content = self.get(name)
        if content is None or (size is not None and len(content) != size):
            raise Corrupt(f"the meta table has no {name.decode()}, or one of a wrong size")
        return content

    # ---- identity and progress

    def create(self, address: ReplicaAddress, source: bytes) -> None:
        self.put(b"format", FORMAT)
        self.put(b"address", f"{address.volume} {address.segment} {address.replica}".encode())
        if source:
            self.put(b"source", source)
            self.put(b"origin", source)

    def check_format(self) -> None:
        """Raises Corrupt; Conflict where they are sound, and another version of the program wrote them."""
        found = self._must(b"format")
        if found != FORMAT:
            raise Conflict(
                f"the tables have format {found!r}, this program reads {FORMAT!r}: run the one that wrote them"
            )

    def address(self) -> ReplicaAddress:
        try:
            volume, segment, replica = self._must(b"address").decode().split(" ")
            return ReplicaAddress(VolumeId(volume), SegmentNumber(int(segment)), ReplicaId(replica))
        except ValueError as error:
            raise Corrupt(f"the meta table's address makes no sense: {error}") from error

    @property
    def source(self) -> bytes:
        """What absent blocks come from; empty without a source, or once hydrated."""
        return self.get(b"source") or b""

    @property
    def origin(self) -> bytes:
        """The source that the replica was created with; it stays when the source ends."""
        return self.get(b"origin") or b""

    def applied(self) -> Position:
        return self._position(b"applied")

    def generation(self) -> Generation:
        return Generation(*_NUMBER.unpack(self._must(b"generation", _NUMBER.size)))

    def mark(self) -> int:
        (mark,) = _NUMBER.unpack(self._must(b"mark", _NUMBER.size))
        return int(mark)

    def image(self) -> LogImage:
        """Raises Corrupt."""
        filling = self.get(b"filling")
        epoch, configuration = _POSITION.unpack(self._must(b"sealed", _POSITION.size))
        return LogImage(
            applied=self.applied(),
            epoch=Epoch(epoch),
            configuration=configuration,
            filling=decode_filling(filling) if filling is not None else None,
            records=tuple(self._read_tail()),
            generation=self.generation(),
            copied=self._position(b"copied"),
            known=tuple(self._known()),
        )

    def put_image(self, image: LogImage, mark: int) -> None:
        """Everything of `image`; rows of `tail` that are right already are not written again."""
        self.put(b"applied", _POSITION.pack(*image.applied))
        self.put(b"sealed", _POSITION.pack(image.epoch, image.configuration))
        self.put(b"generation", _NUMBER.pack(image.generation))
        self.put(b"copied", _POSITION.pack(*image.copied))
        self.put(b"mark", _NUMBER.pack(mark))
        self.put(b"known", b"".join(_ACKED.pack(replica.encode(), *acked) for replica, acked in image.known))
        if image.filling is None:
            self.delete(b"filling")
        else:
            self.put(b"filling", encode_filling(image.filling))
        self._put_tail(image.records)

    def _known(self) -> Iterator[tuple[ReplicaId, Position]]:
        content = self.get(b"known") or b""
        if len(content) % _ACKED.size:
            raise Corrupt(f"the meta table's known positions have {len(content)} bytes, not {_ACKED.size} each")
        for replica, epoch, sequence in _ACKED.iter_unpack(content):
            yield ReplicaId(replica.decode()), Position(Epoch(epoch), Sequence(sequence))

    def _position(self, name: bytes) -> Position:
        epoch, sequence = _POSITION.unpack(self._must(name, _POSITION.size))
        return Position(Epoch(epoch), Sequence(sequence))

    # ---- tail

    def _read_tail(self) -> Iterator[Record]:
        for key, value in self._transaction.cursor(self._tail):
            record = decode_record(bytes(value))
            if bytes(key) != number_key(record.sequence):
                raise Corrupt(f"the tail has record {tuple(record.position)} under the key {bytes(key).hex()}")
            yield record

    def _put_tail(self, records: tuple[Record, ...]) -> None:
        wanted = {number_key(record.sequence): record for record in records}
        kept = set()
        for key, value in list(self._tail_headers()):
            record = wanted.get(key)
            if record is not None and record.encoded[:HEADER_SIZE] == value:
                kept.add(key)
            else:
                self._transaction.delete(key, db=self._tail)
        for key, record in wanted.items():
            if key not in kept:
                self._transaction.put(key, record.encoded, db=self._tail)

    def _tail_headers(self) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._transaction.cursor(self._tail):
            yield bytes(key), bytes(value[:HEADER_SIZE])

    # ---- generations and pins

    def sealed(self) -> list[SealedGeneration]:
        """The generations that were sealed and not merged away, oldest first."""
        found = []
        for name, content in self._rows(_GENERATION_PREFIX):
            (generation,) = _GENERATION.unpack(name)
            sequence, merging = _SEALED.unpack_from(content)
            argument = content[_SEALED.size :]
            found.append(SealedGeneration(Generation(generation), Sequence(sequence), argument, bool(merging)))
        return found

    def put_sealed(self, sealed: SealedGeneration) -> None:
        name = _GENERATION_PREFIX + _GENERATION.pack(sealed.generation)
        self.put(name, _SEALED.pack(sealed.sequence, sealed.merging) + sealed.argument)

    def check_whole(self) -> None:
        """Raises QuorumUnavailable while the tables may lack something below their applied position."""
        if self.get(b"filling") is not None:
            raise QuorumUnavailable("the replica is filling: ask another one")

    def check_readable(self, generation: int) -> None:
        """Raises NotFound unless a generation is sealed in the tables and all that it shows is here."""
        content = self.get(_GENERATION_PREFIX + _GENERATION.pack(generation))
        if content is None or _SEALED.unpack_from(content)[1]:
            raise NotFound(f"generation {generation} is not sealed in the tables, or was merged away")

    def delete_sealed(self, generation: Generation) -> None:
        self.delete(_GENERATION_PREFIX + _GENERATION.pack(generation))

    def pins(self) -> list[Pin]:
        """All rows, marks of pins taken away included."""
        found = []
        for name, content in self._rows(_PIN_PREFIX):
            (generation,) = _GENERATION.unpack_from(name)
            sequence, held = _PIN.unpack(content)
            found.append(Pin(Generation(generation), name[_GENERATION.size :], Sequence(sequence), bool(held)))
        return found

    def pinned(self) -> set[Generation]:
        return {pin.generation for pin in self.pins() if pin.held}

    def pinned_below(self, generation: Generation) -> Generation:
        """The highest generation below that somebody holds, FILL_GENERATION without one. Of a whole replica."""
        cursor = self._transaction.cursor(self._table)
        cursor.set_range(_PIN_PREFIX + _GENERATION.pack(generation))
        if not cursor.prev() or bytes(cursor.key()[: len(_PIN_PREFIX)]) != _PIN_PREFIX:
            return FILL_GENERATION
        without_check(cursor.key(), cursor.value())
        return Generation(*_GENERATION.unpack_from(cursor.key(), len(_PIN_PREFIX)))

    def sealed_between(self, after: Generation, up_to: Generation) -> list[Generation]:
        """The generations in (after, up_to] that were sealed and not merged away, oldest first."""
        found: list[Generation] = []
        cursor = self._transaction.cursor(self._table)
        here = cursor.set_range(_GENERATION_PREFIX + _GENERATION.pack(after + 1))
        while here and bytes(cursor.key()[: len(_GENERATION_PREFIX)]) == _GENERATION_PREFIX:
            generation = Generation(*_GENERATION.unpack_from(cursor.key(), len(_GENERATION_PREFIX)))
            if generation > up_to:
                break
            found.append(generation)
            here = cursor.next()
        return found

    def put_pin(self, pin: Pin) -> None:
        name = _PIN_PREFIX + _GENERATION.pack(pin.generation) + pin.holder
        self.put(name, _PIN.pack(pin.sequence, pin.held))

    def delete_pin(self, generation: Generation, holder: bytes) -> None:
        self.delete(_PIN_PREFIX + _GENERATION.pack(generation) + holder)

    # ---- what only a filling replica keeps

    def tombstones(self, after: Sequence = Sequence(0)) -> list[Tombstone]:
        """Those of later records than `after`, in the order of sequences. O(what is found)."""
        first = number_key(after + 1)
        found = [
            Tombstone(start, end, Generation(generation), Sequence(sequence), discarded)
            for prefix, discarded in ((_TOMBSTONE_PREFIX, False), (_DISCARD_PREFIX, True))
            for _, content in self._rows(prefix, first)
            for start, end, generation, sequence in [_TOMBSTONE.unpack(content)]
        ]
        return sorted(found, key=lambda tombstone: tombstone.sequence)

    def put_tombstones(self, tombstones: Iterable[Tombstone]) -> None:
        for tombstone in tombstones:
            prefix = _DISCARD_PREFIX if tombstone.discarded else _TOMBSTONE_PREFIX
            name = prefix + _TOMBSTONE_NAME.pack(tombstone.sequence, tombstone.start)
            self.put(name, _TOMBSTONE.pack(*tombstone[:4]))

    def forget_filling(self) -> None:
        """The replica is whole: no copy comes any more that could undo anything."""
        for prefix in (_TOMBSTONE_PREFIX, _DISCARD_PREFIX):
            for name, _ in list(self._rows(prefix)):
                self.delete(prefix + name)
        for pin in self.pins():
            if not pin.held:
                self.delete_pin(pin.generation, pin.holder)
        self.delete(b"hydrated")

    def _rows(self, prefix: bytes, first: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Name without the prefix, and content, of the rows that begin with it, from `first` on. Raises Corrupt."""
        cursor = self._transaction.cursor(self._table)
        found = cursor.set_range(prefix + first)
        while found and bytes(cursor.key()[: len(prefix)]) == prefix:
            name = bytes(cursor.key())
            yield name[len(prefix) :], without_check(name, cursor.value())
            found = cursor.next()
