"""How far a ship is, for people: bytes looked at, bytes stored, the rate of the last seconds, why it stands still."""

from collections import deque
from collections.abc import Callable
from typing import Final

from blockstore.rpc import snapshot_pb2 as pb

#: Long enough that a pack's upload does not make it jump, short enough to follow the network.
_WINDOW_S: Final = 5.0


class Progress:
    """clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.bytes_total = 0
        self.bytes_stored = 0
        self.why = ""
        self._clock = clock
        self._done = 0
        self._past: deque[tuple[float, int]] = deque([(clock(), 0)])

    def begin(self, bytes_total: int) -> None:
        """From the start, of so many bytes."""
        self.bytes_total = bytes_total
        self.bytes_stored = self._done = 0
        self._past = deque([(self._clock(), 0)])

    def add(self, done_bytes: int) -> None:
        """So many more were looked at."""
        self.why = ""
        self._done += done_bytes
        now = self._clock()
        self._past.append((now, self._done))
        while len(self._past) > 2 and self._past[1][0] < now - _WINDOW_S:
            self._past.popleft()

    def message(self) -> pb.ShipProgress:
        """As control hears it."""
        since, before = self._past[0]
        passed_s = self._clock() - since
        return pb.ShipProgress(
            bytes_done=self._done,
            bytes_total=self.bytes_total,
            bytes_stored=self.bytes_stored,
            rate_bytes=int((self._done - before) / passed_s) if passed_s > 0 else 0,
            why=self.why,
        )
