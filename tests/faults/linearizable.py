"""Whether what clients saw of one block can have happened one request after the other.

A block is a register: a write gives it a value, a read shows one. The history has for each request when it was sent and
when its answer came; one whose outcome nobody knows has no answer, and may take effect at any later time, or never. It
is linearizable if each request can be given an instant between the two, so that every read shows the write before it.

As no two writes have one value, this takes no search (Gibbons and Korach, Testing Shared Memories, 1997): the requests
of one value (its write, and the reads that show it) form a *cluster*; its *zone* lies between the first answer and the
last sending in it. If the first answer comes before the last sending, the register had that value for the whole zone
(*forward*), else it had it for an instant somewhere in the zone (*backward*). The history is linearizable if and only
if no read was answered before its write was sent, no two forward zones overlap, and no backward one lies within a
forward one.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

UNKNOWN: Final = math.inf
"""When a request was answered whose answer never came."""
INITIAL: Final = 0
"""The value before the first write."""


@dataclass(frozen=True, slots=True)
class Request:
    """sent, answered: on one clock, in whatever unit; a read has an answer. value: what it wrote or showed."""

    is_write: bool
    value: int
    sent: float
    answered: float

    def __str__(self) -> str:
        name = "write" if self.is_write else "read"
        return f"{name} of {self.value} sent {self.sent}, {'unknown' if self.answered == UNKNOWN else self.answered}"


class NotLinearizable(AssertionError):
    """No order of the requests explains what was read."""


@dataclass(frozen=True, slots=True)
class _Zone:
    value: int
    first_answer: float
    last_sent: float

    @property
    def forward(self) -> bool:
        return self.first_answer < self.last_sent

    @property
    def start(self) -> float:
        return min(self.first_answer, self.last_sent)

    @property
    def end(self) -> float:
        return max(self.first_answer, self.last_sent)


def check_register(history: Iterable[Request], initial: int = INITIAL) -> None:
    """Raises NotLinearizable, and ValueError where two writes have one value or one that of the beginning.

    A read without an answer says nothing, and is left out.
    """
    writes = {initial: Request(True, initial, -math.inf, -math.inf)}
    reads: dict[int, list[Request]] = {}
    for request in history:
        if request.is_write:
            if request.value in writes:
                raise ValueError(f"two writes of {request.value}")
            writes[request.value] = request
        elif request.answered != UNKNOWN:
            reads.setdefault(request.value, []).append(request)
    _check_zones([_zone_of(write, reads.pop(value, [])) for value, write in writes.items()])
    for value, shown in reads.items():
        raise NotLinearizable(f"{shown[0]}: nobody wrote {value}")


def _zone_of(write: Request, reads: list[Request]) -> _Zone:
    for read in reads:
        if read.answered < write.sent:
            raise NotLinearizable(f"{read}: it was answered before the {write}")
    cluster = (write, *reads)
    return _Zone(write.value, min(each.answered for each in cluster), max(each.sent for each in cluster))


def _check_zones(zones: list[_Zone]) -> None:
    forward = sorted((each for each in zones if each.forward), key=lambda each: each.start)
    for earlier, later in itertools.pairwise(forward):
        if later.start < earlier.end:
            raise NotLinearizable(
                f"{earlier.value} was there until {earlier.end}, and {later.value} from {later.start} to {later.end}"
            )
    at = 0
    for zone in sorted((each for each in zones if not each.forward), key=lambda each: each.start):
        while at < len(forward) and forward[at].end <= zone.start:
            at += 1
        if at < len(forward) and forward[at].start < zone.start and zone.end < forward[at].end:
            outer = forward[at]
            raise NotLinearizable(
                f"{zone.value} was there between {zone.start} and {zone.end}, while {outer.value} was from "
                f"{outer.start} to {outer.end}"
            )
