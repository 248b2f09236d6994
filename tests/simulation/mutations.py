"""Ways of breaking the core on purpose: each removes one rule at run time, and the simulation must notice.

A mutation replaces a few attributes of the core's classes, and nothing of the simulation, save where
the rule lives in the tables (what of a copy wins), which the simulation has as a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from unittest import mock

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.log import LogEntry, LogImage, RecordEntry, SealEntry, TruncateEntry
from blockstore.record import Operation, Record
from blockstore.replication import attaching as attaching_module
from blockstore.replication.attaching import Attaching
from blockstore.replication.follower import Follower
from blockstore.replication.leader import Leader
from blockstore.replication.leader_log import LeaderLog
from blockstore.replication.member import Member
from blockstore.replication.messages import (
    Answer,
    FollowerEffect,
    LeaderEffect,
    SealAnswer,
    SealEpoch,
    Send,
)
from blockstore.replication.quorum import Quorum
from blockstore.replication.reads import Reads
from blockstore.replication.record_run import RecordRun, earlier
from blockstore.replication.recovery import ChosenLog, Undecided, choose_log
from tests.simulation.member_mutations import MEMBER_MUTATIONS
from tests.simulation.model_tables import Tables, Version
from tests.simulation.room_mutations import ROOM_MUTATIONS
from tests.simulation.short_circuit_mutations import SHORT_CIRCUIT_MUTATIONS
from tests.simulation.table_mutations import TABLE_MUTATIONS, Patch

# ---- the follower


def _unlinked_append(run: RecordRun, record: Record) -> None:
    run.size_bytes += len(record.encoded)
    run._records.append(record)


def _take_by_number(follower: Follower, records: tuple[Record, ...]) -> tuple[list[LogEntry], bool]:
    """Only that no number is missing counts, and not what stands before."""
    run = follower._run
    new = [record for record in records if record.sequence > run.start.sequence and not run.holds(record.position)]
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
    before = above[0].previous
    if run.position_at(before.sequence) != before:
        return [], False
    entries: list[LogEntry] = []
    if above[0].sequence <= run.end.sequence:
        run.truncate(before.sequence)
        follower._durable = min(follower._durable, int(before.sequence))
        entries.append(TruncateEntry(before.sequence))
    for record in above:
        run.append(record)
        entries.append(RecordEntry(record))
    return entries, True


_SEAL: Final = Follower.seal


def _seal_at_once(follower: Follower, origin: Any, message: SealEpoch) -> list[FollowerEffect]:
    """Answered before the seal, and what was accepted before it, is durable."""
    effects = [effect for effect in _SEAL(follower, origin, message) if not isinstance(effect, Answer)]
    return [*effects, follower._seal_answer(origin, message)]


_RESTORE: Final = Follower.restore.__func__  # type: ignore[attr-defined]


def _restore_without_seals(
    kind: type[Follower], replica: Any, image: LogImage, entries: Iterable[LogEntry], *, damage: Any = None
) -> Any:
    kept = [entry for entry in entries if not isinstance(entry, SealEntry)]
    return _RESTORE(kind, replica, image, kept, damage=damage)


def _acked_in_memory(follower: Follower) -> Position:
    return earlier(follower._matched, follower._run.end)


_ADVANCE_COMMIT: Final = Follower._advance_commit


def _commit_whatever_is_durable(follower: Follower) -> list[FollowerEffect]:
    follower._told_commit = max(follower._told_commit, follower._durable_match)
    return _ADVANCE_COMMIT(follower)


_FOLLOWER_READ: Final = Follower.read


def _read_while_filling(follower: Follower, epoch: Any, configuration: int, commit: Position) -> list[FollowerEffect]:
    filling, follower.filling = follower.filling, None
    try:
        return _FOLLOWER_READ(follower, epoch, configuration, commit)
    finally:
        follower.filling = filling


def _read_while_behind(follower: Follower, epoch: Any, configuration: int, commit: Position) -> list[FollowerEffect]:
    return _FOLLOWER_READ(follower, epoch, configuration, earlier(commit, follower.commit))


def _know_exactly(follower: Follower, position: Position) -> list[FollowerEffect]:
    """As if what is known of an old copy were all that it ever acked, and it had promised nothing since."""
    answers_for = follower._floor if follower.filling else follower.end
    return follower._distrust(position) if position > max(answers_for, follower._acked) else []


def _done_at_the_first_extent(follower: Follower, attempt: int, done: int, total: int) -> None:
    if follower._delta.attempt == attempt and done:
        follower._delta.running, follower._delta.complete = False, True


def _trims_do_not_stay(local: Version, stated: int) -> bool:
    return local[0] > stated and local[1] != 0


# ---- the leader


def _trusting(function: Any) -> Any:
    """The method of Leader or Reads, with every member taken for whole meanwhile."""

    def call(self: Any, *arguments: Any) -> Any:
        members = self._members.values() if isinstance(self, Leader) else self._members
        filling = [member for member in members if not member.whole]
        for member in filling:
            member.whole = True
        try:
            return function(self, *arguments)
        finally:
            for member in filling:
                member.whole = False

    return call


def _choose_any_log(quorum: Quorum, answers: Mapping[ReplicaId, SealAnswer], **_: Any) -> Any:
    return choose_log(quorum, {replica: replace(answer, whole=True) for replica, answer in answers.items()})


def _choose_by_one(quorum: Quorum, answers: Mapping[ReplicaId, SealAnswer], **_: Any) -> Any:
    whole = [answer for answer in answers.values() if answer.whole]
    if not whole:
        return Undecided("no member that answered is whole")
    best = max(whole, key=lambda answer: answer.end)
    return ChosenLog(best.end, best.commit, best.generation)


_LEARN: Final = Attaching._learn


def _learn_nothing_of_others(attaching: Attaching, member: Member, answer: SealAnswer) -> list[Member]:
    return _LEARN(attaching, member, replace(answer, known=()))


_ADVANCE: Final = Leader._advance
_REJOIN: Final = LeaderLog.rejoin


def _rejoin_by_number(log: LeaderLog, member: Member, now: float) -> list[Send]:
    """As a leader might that leaves it to the replica to say that what it holds is not what precedes."""
    sends = _REJOIN(log, member, now)
    assert member.answer is not None
    if member.catching_up and member.answer.end.sequence >= log.start.sequence:
        member.stream_from(log.start.sequence + 1)
        return log.stream(member, now) or sends
    return sends


def _append_no_epoch_start(leader: Leader, operation: Operation) -> None:
    leader._configured_at = leader._log.end.sequence


def _serve_without_epoch_start(leader: Leader, now: float) -> list[LeaderEffect]:
    """As soon as the log that was chosen is on a quorum."""
    log = leader._log
    if leader.serving or log.chosen is None or log.commit < log.chosen.end:
        return []
    return leader._requests.serve(now)


def _count_older_records(leader: Leader, now: float) -> list[LeaderEffect]:
    """Records of older epochs are committed by counting, and guests served, as if that were enough."""
    log, chosen = leader._log, leader._log.chosen
    if chosen is not None and chosen.end >= log.commit:
        matched = {m.replica: m.matched.sequence if m.whole else 0 for m in leader._members.values()}
        if leader._quorum.level(matched) >= chosen.end.sequence:
            log.commit = chosen.end
            return leader._serve_if_due(now) + _ADVANCE(leader, now)
    return _ADVANCE(leader, now)


_SERVE: Final = Leader._serve_if_due


def _serve_at_once(leader: Leader, now: float) -> list[LeaderEffect]:
    if leader._attaching._heard_quorum_at is not None:
        leader._attaching._heard_quorum_at = float("-inf")
    return _SERVE(leader, now)


_ARRIVED: Final = Reads.arrived

MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "skip_the_predecessor_check": (
        (Follower, "_take", _take_by_number),
        (RecordRun, "append", _unlinked_append),
        (LeaderLog, "rejoin", _rejoin_by_number),
    ),
    "cut_a_log_at_a_duplicate": ((Follower, "_take", _take_and_cut),),
    "ack_before_persisting": ((Follower, "_durable_match", property(_acked_in_memory)),),
    "answer_a_seal_before_it_is_durable": ((Follower, "seal", _seal_at_once),),
    "forget_seals_at_a_restart": ((Follower, "restore", classmethod(_restore_without_seals)),),
    "apply_uncommitted_records": ((Follower, "_advance_commit", _commit_whatever_is_durable),),
    "forget_the_floor": ((Follower, "_floor_reached", lambda _: True),),
    "whole_before_all_is_copied": ((Follower, "delta_progress", _done_at_the_first_extent),),
    "take_a_copy_older_than_the_base": ((Follower, "_copy_at_least", ORIGIN),),
    "let_a_copy_win_over_a_live_trim": ((Tables, "stays", staticmethod(_trims_do_not_stay)),),
    "read_from_a_replica_that_is_not_whole": (
        (Follower, "read", _read_while_filling),
        (Reads, "_choose", _trusting(Reads._choose)),
    ),
    "read_from_a_replica_that_is_behind": ((Follower, "read", _read_while_behind),),
    "read_without_a_lease": ((Reads, "arrived", lambda reads, attempt, _: _ARRIVED(reads, attempt, True)),),
    "serve_before_the_old_lease_is_over": ((Leader, "_serve_if_due", _serve_at_once),),
    "count_a_filling_replicas_acks": ((Leader, "_advance", _trusting(Leader._advance)),),
    "take_a_filling_replicas_log": ((attaching_module, "choose_log", _choose_any_log),),
    "believe_that_an_old_copy_acked_what_is_known": ((Follower, "know_acked", _know_exactly),),
    "forget_what_peers_know_of_an_old_copy": ((Attaching, "_learn", _learn_nothing_of_others),),
    "attach_without_a_quorum": ((attaching_module, "choose_log", _choose_by_one),),
    "drop_the_epoch_start_record": (
        (Leader, "_append_own", _append_no_epoch_start),
        (Leader, "_advance", _count_older_records),
        (Leader, "_serve_if_due", _serve_without_epoch_start),
    ),
    **TABLE_MUTATIONS,
    **MEMBER_MUTATIONS,
    **ROOM_MUTATIONS,
    **SHORT_CIRCUIT_MUTATIONS,
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The core is broken in this way inside; None: it is not."""
    with ExitStack() as stack:
        for owner, attribute, value in MUTATIONS[name] if name else ():
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield
