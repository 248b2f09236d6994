"""What the leader knows of one member, and how far it has sent to it.

A member is in one of three states: not sealed (no connection, or its seal is not answered yet),
streaming (records are sent from `next` on), or catching up (only heartbeats are sent, until what it
says matches reaches what the leader still holds; as Raft's next and match indexes, section 5.3).
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.log import UNKNOWN_FLOOR
from blockstore.replication.messages import AppendAnswer, SealAnswer

#: Requests of which the time of sending is kept, for the lease; forgetting one only costs lease.
_MAX_OUTSTANDING: Final = 1024

NEVER: Final = float("-inf")


@dataclass(slots=True, eq=False)
class Member:
    """answer: to the newest seal of this epoch. matched, commit, whole, full: as last said.

    acked: the highest that it is known to have acked while whole, by its own words or those of others. confirmed:
    when the newest answered request was sent. told_at: when it was told what the others have acked.

    damaged: as last said. connection: how often the way to it was opened.

    foreign: it has, or may have, committed what the chosen log lacks, after that loss was accepted: it takes no part
    any more, and another replica takes its place.
    """

    replica: ReplicaId
    connected: bool = False
    sealed: bool = False
    doubted_at: float | None = None
    answer: SealAnswer | None = None
    whole: bool = False
    full: bool = False
    damaged: bool = False
    matched: Position = ORIGIN
    commit: Position = ORIGIN
    acked: Position = ORIGIN
    foreign: bool = False
    catching_up: bool = False
    next: int = 1
    confirmed: float = NEVER
    sent_at: float = NEVER
    told_at: float = NEVER
    connection: int = 0
    extents_done: int = 0
    extents_total: int = 0
    window_bytes: int = 0
    _request: int = 0
    _streaming_since: int = 0
    _seal_sent_at: float = NEVER
    _fill_request: int = 0
    _outstanding: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_MAX_OUTSTANDING))
    _window: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def takes_part(self) -> bool:
        """Whether it is sent anything."""
        return self.sealed and not self.foreign

    @property
    def left_out(self) -> str:
        """Why it takes no part now, for people; empty where it does."""
        if self.foreign:
            return "it may have committed what was given up with --accept-loss: another replica takes its place"
        if self.doubted_at is not None:
            return "it cannot say what it lost: it is taken in once a quorum without it has confirmed this epoch"
        return ""

    @property
    def emptied(self) -> bool:
        """It was told to fill anew and has not answered that yet."""
        return self._fill_request > 0

    @property
    def sound(self) -> bool:
        """It can be counted on, by its last word: whole, here, and with nothing lost."""
        return self.takes_part and self.whole and not self.damaged

    def empty(self, request: int) -> None:
        """Told by this request to fill anew: it counts as filling from now on."""
        self._fill_request, self.whole = request, False

    def open(self, now: float) -> None:
        """The way to it is open; its seal is about to be sent."""
        self.close()
        self.connected = True
        self.connection += 1
        self.told_at = NEVER
        self._seal_sent_at = now

    def close(self) -> None:
        """Whatever is under way to it may be lost."""
        self.connected = self.sealed = self.catching_up = False
        self.doubted_at = None
        self._outstanding.clear()
        self._clear_window()

    def take_seal(self, answer: SealAnswer) -> None:
        """It has sealed this epoch, which also confirms it."""
        self.sealed = True
        self.answer = answer
        self.whole, self.full, self.commit = answer.whole, answer.full, answer.commit
        self.damaged = answer.damaged
        self.confirmed = max(self.confirmed, self._seal_sent_at)

    def distrust(self) -> None:
        """It is an old copy that was put back (rule 10): filling, whatever it said, and it may have acked anything."""
        assert self.answer is not None
        self.answer = replace(self.answer, whole=False, floor=UNKNOWN_FLOOR)
        self.whole = False

    def doubt(self, now: float) -> None:
        """It may have lost what it promised a newer epoch: nothing is sent until that is ruled out."""
        self.sealed, self.doubted_at = False, now

    def trust(self) -> None:
        """Its seal counts after all."""
        self.sealed, self.doubted_at = True, None

    def take(self, answer: AppendAnswer) -> bool:
        """What an Append's answer says; True where it has to catch up anew from `matched`."""
        while self._outstanding and self._outstanding[0][0] <= answer.request:
            request, sent_at = self._outstanding.popleft()
            if request == answer.request:
                self.confirmed = max(self.confirmed, sent_at)
        self.commit, self.full, self.damaged = answer.commit, answer.full, answer.damaged
        self.extents_done, self.extents_total = answer.extents_done, answer.extents_total
        lost_track = answer.behind and not self.catching_up and answer.request >= self._streaming_since
        if lost_track or not answer.whole or answer.matched.sequence > self.matched.sequence:
            self.matched = answer.matched
        if answer.request >= self._fill_request:
            self._fill_request = 0
        self.whole = answer.whole and not self.emptied
        if self.whole:
            self.acked = max(self.acked, self.matched)
        while self._window and self._window[0][0] <= self.matched.sequence:
            self.window_bytes -= self._window.popleft()[1]
        return lost_track

    def stream_from(self, sequence: int) -> None:
        """Send records from here on; what answers to earlier requests say of a gap is out of date."""
        self.catching_up = False
        self.next = sequence
        self._streaming_since = self._request + 1
        self._clear_window()

    def fall_back(self) -> None:
        """Send no records until it has caught up."""
        self.catching_up = True
        self._clear_window()

    def sending(self, now: float, last_sequence: int = 0, size_bytes: int = 0) -> int:
        """The number of a request that leaves now; with records: the last one's sequence, and their size."""
        self._request += 1
        self._outstanding.append((self._request, now))
        self.sent_at = now
        if last_sequence:
            self.next = last_sequence + 1
            self._window.append((last_sequence, size_bytes))
            self.window_bytes += size_bytes
        return self._request

    def _clear_window(self) -> None:
        self._window.clear()
        self.window_bytes = 0
