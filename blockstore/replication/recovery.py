"""Which log an attachment goes on with, from what the sealed members hold (rule 1).

Invariant: a position that a quorum has acked, in any epoch before, is in the log that is chosen,
unless somebody said --accept-loss after hearing what may be missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from blockstore.domain import Position, ReplicaId
from blockstore.replication.messages import SealAnswer
from blockstore.replication.quorum import Quorum
from blockstore.units import Epoch, Generation


@dataclass(frozen=True, slots=True)
class ChosenLog:
    """The log ends at `end`; `committed` is known of it; writes behind it belong to `generation`."""

    end: Position
    committed: Position
    generation: Generation


@dataclass(frozen=True, slots=True)
class Undecided:
    """lost: every member has answered, and nothing that can still be heard would help."""

    why: str
    lost: bool = False


def choose_log(
    quorum: Quorum,
    answers: Mapping[ReplicaId, SealAnswer],
    *,
    accept_loss: bool = False,
    loss_epochs: tuple[Epoch, ...] = (),
) -> ChosenLog | Undecided:
    """The highest log among whole members, if fewer than a quorum can have acked above it.

    answers: of the members that were sealed in this epoch. A member not heard from, and a filling
    one whose floor is above the log, may have acked anything; between the two steps of a change of members
    the old ones alone may have been the quorum of it. With accept_loss also the log of a filling
    member will do whose content is complete: what else it may have acked is given up. loss_epochs: those that went on
    so before.
    """
    if not quorum.reached(answers):
        return Undecided(f"{len(answers)} of {len(quorum.replicas)} members answered; a quorum is needed")
    all_heard = len(answers) == len(quorum.replicas)
    fit = [answer for answer in answers.values() if answer.whole or (accept_loss and answer.complete)]
    if not fit:
        return Undecided(_nothing_whole(answers), lost=all_heard)
    best = max(fit, key=lambda answer: answer.end)
    # What was given up counts as committed for nobody any more.
    committed = max(each.commit for each in answers.values() if not missed_loss(each, best.end, loss_epochs))
    above = {replica for replica in quorum.replicas if _may_be_above(answers.get(replica), best.end)}
    if not accept_loss and (quorum.reached_before(above) or committed > best.end):
        return Undecided(_missing(best.end, sorted(above), committed), lost=all_heard)
    return ChosenLog(best.end, committed if committed <= best.end else min(best.commit, best.end), best.generation)


def answers_for(answer: SealAnswer) -> Position:
    """At or above all that a member has acked, if its disk is the one it acked with (rule 10)."""
    return answer.end if answer.whole else answer.floor


def missed_loss(answer: SealAnswer, end: Position, loss_epochs: tuple[Epoch, ...]) -> bool:
    """Whether a member may have what was given up in the log that ends there: it is none of that log any more.

    Who has no record of an epoch that accepted a loss, or of a later one, was looked at by none of their leaders. Each
    such epoch counts: one that the log knows nothing of, as it came to nothing, says nothing of those before.
    """
    return bool(answer.end.sequence) and any(answer.end.epoch < accepted <= end.epoch for accepted in loss_epochs)


def _may_be_above(answer: SealAnswer | None, end: Position) -> bool:
    return answer is None or (not answer.whole and answer.floor > end)


def _nothing_whole(answers: Mapping[ReplicaId, SealAnswer]) -> str:
    complete = {replica: answer.end for replica, answer in answers.items() if answer.complete}
    if not complete:
        return "no member that answered is whole, nor has any one all content up to where its log ends"
    fullest = max(complete, key=lambda replica: complete[replica])
    return (
        "no member that answered is whole: each may have acknowledged writes that it holds no more. The fullest log, "
        f"that of {fullest}, ends at {tuple(complete[fullest])}: what was acknowledged behind that may be missing; "
        "bring back a member that has it, or go on from there with --accept-loss"
    )


def _missing(end: Position, above: list[ReplicaId], committed: Position) -> str:
    return (
        f"the log ends at {tuple(end)}, but {', '.join(above) or 'a member'} may hold acknowledged writes above it "
        f"(committed is known up to {tuple(committed)}); bring those members back, or recover with --accept-loss"
    )
