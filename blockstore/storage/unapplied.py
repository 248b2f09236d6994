"""What is committed and not in the tables yet: an active memtable, and one frozen while a checkpoint applies it.

Records come in on the event loop while a thread checkpoints. Invariants:
- a record is in one of the two until the transaction that holds it has ended, and in the tables from then on: who looks
  here first and at the tables then finds each block at least once;
- a checkpoint that failed puts its records back in front of those that came since.
"""

import threading
from collections.abc import Iterable

from blockstore.record import Record
from blockstore.storage.memtable import Entry, Memtable, overlay
from blockstore.units import Generation


class Unapplied:
    """Of one replica. source: as the tables have it. has_source: whether absent blocks are its, by all committed."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.has_source = bool(source)
        self.lock = threading.Lock()
        """To be held while `memtables` are looked at."""
        self._active = Memtable()
        self._frozen = Memtable()

    @property
    def memtables(self) -> tuple[Memtable, Memtable]:
        """The older first."""
        return self._frozen, self._active

    @property
    def size_bytes(self) -> int:
        """Memory that they take."""
        return self._active.size_bytes + self._frozen.size_bytes

    @property
    def weight_bytes(self) -> int:
        """How much a checkpoint is due for."""
        return self._active.weight_bytes + self._frozen.weight_bytes

    def overlay(self, start: int, end: int) -> dict[int, tuple[Generation, Entry]]:
        """The newest content of the blocks [start, end) here, with its generation, in no order."""
        with self.lock:
            return overlay(self.memtables, start, end)

    def add(self, records: Iterable[Record]) -> None:
        """The next committed records, in order."""
        with self.lock:
            for record in records:
                self._active.add(record)
            if self._active.hydrated:
                self.has_source = False

    def forget(self) -> None:
        """All of them; no checkpoint is under way."""
        with self.lock:
            self._active, self._frozen = Memtable(), Memtable()
            self.has_source = bool(self.source)

    # ---- a checkpoint, one at a time

    def freeze(self, up_to: int) -> Memtable:
        """Records up to a sequence go to the frozen memtable; later ones stay active.

        None go when a copy is written: it applies nothing, and comes for each extent. To make both anew then took
        500 s for a replica of 4 GiB that held 256 MiB.
        """
        with self.lock:
            assert not self._frozen.records
            active = self._active
            if active.first() > up_to:
                return self._frozen
            if active.last() <= up_to:
                self._frozen, self._active = active, Memtable()
            else:
                self._frozen = Memtable(record for record in active.records if record.sequence <= up_to)
                self._active = Memtable(record for record in active.records if record.sequence > up_to)
            return self._frozen

    def thaw(self) -> None:
        """It failed."""
        with self.lock:
            if self._frozen.records:
                self._active = Memtable([*self._frozen.records, *self._active.records])
                self._frozen = Memtable()

    def applied(self, source: bytes) -> None:
        """The tables have what was frozen, and this source."""
        with self.lock:
            self._frozen, self.source = Memtable(), source
            self.has_source = bool(source) and not self._active.hydrated
