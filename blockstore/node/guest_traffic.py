"""Whether guests want something of this node: told to who reads generations, so that it gives way.

Fills count as nobody's: the front-end that hydrates a volume keeps them behind the guests by itself.
"""

from collections.abc import Callable, Sequence
from typing import Final

from blockstore.record import OperationKind, Record

#: A guest that waits for each answer has nothing on its way in between.
_PAUSE_S: Final = 0.1


class GuestTraffic:
    """clock: in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = float("-inf")

    @property
    def busy(self) -> bool:
        """Something came a moment ago."""
        return self._clock() - self._last < _PAUSE_S

    def note(self) -> None:
        """A guest reads."""
        self._last = self._clock()

    def note_records(self, records: Sequence[Record]) -> None:
        """A front-end sent these; none where it only says that it is there."""
        if records and records[0].operations[0].kind is not OperationKind.FILL:
            self.note()
