"""What the members' answers to this epoch's seal allow: to choose a log, to doubt a member, to serve (rules 1, 10).

Each answer stands with its member. Invariants:
- only answers of connections that stand count for the choice: a member that restarts may have lost its promise;
- no guest is served while a front-end before this one may hold its lease.
"""

from collections.abc import Mapping

from blockstore.domain import ReplicaId
from blockstore.replication.member import Member
from blockstore.replication.messages import SealAnswer
from blockstore.replication.quorum import Quorum
from blockstore.replication.recovery import ChosenLog, Undecided, answers_for, choose_log
from blockstore.replication.settings import LeaderSettings
from blockstore.units import Epoch


class Attaching:
    """From the first seal until guests are served. why: what it waits for; empty once it waits for nothing."""

    def __init__(
        self,
        quorum: Quorum,
        members: Mapping[ReplicaId, Member],
        settings: LeaderSettings,
        now: float,
        *,
        accept_loss: bool,
        loss_epochs: tuple[Epoch, ...],
    ) -> None:
        self.accept_loss = accept_loss
        self._loss_epochs = loss_epochs
        self.why = "no member has answered yet"
        self._quorum = quorum
        self._members = members
        self._settings = settings
        self._began = self._chosen_at = now
        #: When a quorum of the members had answered.
        self._heard_quorum_at: float | None = None

    def count(self, quorum: Quorum) -> None:
        """These are the voters from now on."""
        self._quorum = quorum

    def heard(self, member: Member, answer: SealAnswer, now: float) -> list[Member]:
        """What a seal's answer says beside what it holds; the members that it shows to be old copies."""
        if self._heard_quorum_at is None and self._quorum.reached(self._answers(sealed=False)):
            self._heard_quorum_at = now
        return self._learn(member, answer)

    def _learn(self, member: Member, answer: SealAnswer) -> list[Member]:
        """Rule 10: who answers for less than what it is known to have acked is an old copy that was put back."""
        if answer.whole:
            member.acked = max(member.acked, answer.end)
        old_copies: list[Member] = []
        for replica, position in ((member.replica, member.acked), *answer.known):
            peer = self._members.get(replica)
            if peer is None or (peer is not member and position <= peer.acked):
                continue
            peer.acked = position
            if peer.sealed and peer.answer is not None and answers_for(peer.answer) < position:
                peer.distrust()
                old_copies.append(peer)
        return old_copies

    def choose(self, now: float) -> ChosenLog | Undecided:
        """The log to go on with, if that can be said already."""
        answers = self._answers(sealed=True)
        waited = len(answers) == len(self._quorum.replicas) or now - self._began >= self._settings.loss_wait_s
        accept_loss = self.accept_loss and waited
        chosen = choose_log(self._quorum, answers, accept_loss=accept_loss, loss_epochs=self._loss_epochs)
        if isinstance(chosen, Undecided):
            self.why = chosen.why
        else:
            self._chosen_at = now
            self.why = "the record that opens the epoch is not on a quorum yet"
        return chosen

    def is_stuck(self, chosen: ChosenLog, now: float) -> bool:
        """A quorum is here, but nobody in it has the log that was chosen: another epoch may choose another."""
        if now - self._chosen_at < self._settings.retry_limit_s:
            return False
        here = [member for member in self._members.values() if member.sealed]
        if not self._quorum.reached([member.replica for member in here]):
            return False
        return not any(member.whole and member.matched.sequence >= chosen.end.sequence for member in here)

    def older_leases_are_over(self, now: float) -> bool:
        """Who answered a seal confirms no older epoch any more; else a lease runs out by itself."""
        assert self._heard_quorum_at is not None
        longest_s = max(self._settings.lease_s, self._settings.older_lease_s)
        lease_out = self._heard_quorum_at + longest_s + self._settings.drift_s
        if now < lease_out and len(self._answers(sealed=False)) < len(self._quorum.replicas):
            self.why = "a front-end before this one may hold its lease still"
            return False
        self.why = ""
        return True

    def _answers(self, *, sealed: bool) -> dict[ReplicaId, SealAnswer]:
        """Those that voters gave in this epoch. sealed: of connections that stand."""
        voters = [(replica, self._members[replica]) for replica in self._quorum.replicas]
        return {id: m.answer for id, m in voters if m.answer is not None and (m.sealed or not sealed)}
