"""Ways of breaking the core on purpose: each removes one rule at run time, and the simulation must notice.

A mutation replaces a few attributes of the core's classes, and nothing of the simulation, save where
the rule lives in the tables (what of a copy wins), which the simulation has as a model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from blockstore.domain import Position
from blockstore.log import LogEntry, RecordEntry, TruncateEntry
from blockstore.record import Record
from blockstore.replication.follower import Follower
from blockstore.replication.messages import Answer, FollowerEffect, SealEpoch
from blockstore.replication.record_run import RecordRun, earlier
from tests.simulation.model_tables import Tables, Version

Patch = tuple[type | Any, str, Any]
"""Of what, which attribute, and what stands there instead."""


def _unlinked_append(run: RecordRun, record: Record) -> None:
    run.size_bytes += len(record.encoded)
    run._records.append(record)


def _take_by_number(follower: Follower, records: tuple[Record, ...]) -> tuple[list[LogEntry], bool]:
    run = follower._run
    new = [r for r in records if r.sequence > run.start.sequence and not run.holds(r.position)]
    if not new:
        return [], True
    if new[0].sequence > run.end.sequence + 1:
        return [], False
    return follower._extend(new), True


def _take_and_cut(follower: Follower, records: tuple[Record, ...]) -> tuple[list[LogEntry], bool]:
    """A record that is held already cuts the log behind it, instead of being acked again."""
    run = follower._run
    above = [record for record in records if record.sequence > follower.commit.sequence]
    if not above:
        return [], True
    if run.position_at(above[0].sequence - 1) != above[0].previous:
        return [], False
    entries: list[LogEntry] = []
    if above[0].sequence <= run.end.sequence:
        run.truncate(above[0].previous.sequence)
        follower._durable = min(follower._durable, int(above[0].previous.sequence))
        entries.append(TruncateEntry(above[0].previous.sequence))
    for record in above:
        run.append(record)
        entries.append(RecordEntry(record))
    return entries, True


def _seal_at_once(follower: Follower, origin: Any, message: SealEpoch) -> list[FollowerEffect]:
    """Answered before the seal, and what was accepted before it, is durable."""
    if follower._fences(message.epoch, message.configuration):
        return _SEAL(follower, origin, message)
    effects = [effect for effect in _SEAL(follower, origin, message) if not isinstance(effect, Answer)]
    return [*effects, follower._seal_answer(origin, message)]


_SEAL: Final = Follower.seal


def _acked_in_memory(follower: Follower) -> Position:
    return earlier(follower._matched, follower._run.end)


def _commit_whatever_is_durable(follower: Follower) -> list[FollowerEffect]:
    follower._told_commit = max(follower._told_commit, follower._durable_match)
    return _ADVANCE(follower)


_ADVANCE: Final = Follower._advance_commit


def _trims_do_not_stay(local: Version, stated: int) -> bool:
    return local[0] > stated and local[1] != 0


MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "skip_the_predecessor_check": (
        (Follower, "_take", _take_by_number),
        (RecordRun, "append", _unlinked_append),
    ),
    "cut_a_log_at_a_duplicate": ((Follower, "_take", _take_and_cut),),
    "ack_before_persisting": ((Follower, "_durable_match", property(_acked_in_memory)),),
    "answer_a_seal_before_it_is_durable": ((Follower, "seal", _seal_at_once),),
    "apply_uncommitted_records": ((Follower, "_advance_commit", _commit_whatever_is_durable),),
    "forget_the_floor": ((Follower, "_floor_reached", lambda _: True),),
    "whole_before_the_copies_are_passed": ((Follower, "_past_copies", lambda _: True),),
    "let_a_copy_win_over_a_live_trim": ((Tables, "stays", staticmethod(_trims_do_not_stay)),),
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The core is broken in this way inside; None: it is not."""
    with ExitStack() as stack:
        for owner, attribute, value in MUTATIONS[name] if name else ():
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield
