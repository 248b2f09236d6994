"""The barrier of a snapshot of several volumes: from its beginning to its end no change is acknowledged.

What a guest was told is written before one volume's snapshot was sealed must be in those of the others, too.
So all volumes hold, then all are sealed, then all are released. Nothing below the guest stands still for it:
changes are ordered, stored and committed meanwhile, and reads go on. Only the answers to changes are kept,
also to those that were called before the barrier; that is why this stands where answers are given, and not
around the volume: one that is on its way back from there could not be kept any more.

A hold ends by itself after its limit. The snapshot has failed then, whoever still believes in it: `release`
says so, also when it is asked again, and that barrier never begins anew.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from blockstore.config import MAX_HOLD_S
from blockstore.errors import Conflict, InvalidRequest

#: Barriers whose end is remembered, for a caller that lost the answer and asks again.
_REMEMBERED: Final = 64


class Hold:
    """One barrier over one volume, while it lasts."""

    def __init__(self, barrier: str) -> None:
        self.barrier = barrier
        self._kept: list[Callable[[], None]] = []

    def keep(self, answer: Callable[[], None]) -> None:
        """Give this answer at the end."""
        self._kept.append(answer)

    def end(self) -> None:
        kept, self._kept = self._kept, []
        for answer in kept:
            answer()


class Answers(Protocol):
    """Where the answers to a volume's changes are given: the device. While `hold` is there, it keeps them."""

    hold: Hold | None


class Barriers:
    """The barriers over one volume, one after the other."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._timer: asyncio.TimerHandle | None = None
        self._ended: OrderedDict[str, bool] = OrderedDict()
        """Of past barriers: whether they held until they were released."""

    @property
    def holding(self) -> bool:
        """Whether answers are kept now."""
        return self._answers.hold is not None

    async def hold(self, barrier: str, limit_s: float) -> None:
        """Returns once no change is acknowledged any more, for at most `limit_s` from now; the same again goes on.

        Raises Conflict where another barrier holds, or this one has ended; InvalidRequest.
        """
        if not barrier or not 0 < limit_s <= MAX_HOLD_S:
            raise InvalidRequest(f"barrier {barrier!r} for {limit_s} s: it needs a name and at most {MAX_HOLD_S} s")
        if barrier in self._ended:
            raise Conflict(f"barrier {barrier} has ended here: begin another one")
        now = self._answers.hold
        if now is not None and now.barrier != barrier:
            raise Conflict(f"barrier {now.barrier} holds this volume: try again when it is over")
        if now is None:
            self._answers.hold = Hold(barrier)
        self._set_timer(asyncio.get_running_loop().call_later(limit_s, self._end, barrier, False))
        await asyncio.sleep(0)  # answers that were given before this are sent by now

    def release(self, barrier: str) -> bool:
        """Give the answers; whether none was given since `hold` returned. False for a barrier that is not known."""
        self._end(barrier, True)
        return self._ended.get(barrier, False)

    def close(self) -> None:
        """There is nothing to be acknowledged here any more."""
        if self._answers.hold is not None:
            self._end(self._answers.hold.barrier, False)

    def _end(self, barrier: str, held: bool) -> None:
        hold = self._answers.hold
        if hold is None or hold.barrier != barrier:
            return
        self._set_timer(None)
        self._ended[barrier] = held
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        self._answers.hold = None
        hold.end()

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer
