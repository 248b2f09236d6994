"""The guest's reads: who answers them, and when their data may be handed on (rule 4).

A read waits for writes that it overlaps, goes to a whole member that has acked every committed
record, to the next one where that fails, and is answered only while the lease holds. Bytes that
fail their checksum on every member end it as Corrupt; anything else is tried again until the retry
limit.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import Position, ReplicaId
from blockstore.errors import CairnError, Corrupt, InvalidRequest, OutOfRange, QuorumUnavailable
from blockstore.replication.in_flight import Waiter
from blockstore.replication.member import Member
from blockstore.replication.messages import Failed, LeaderEffect, ReadDone, ReadDropped, ReadFrom
from blockstore.units import BlockNumber

#: Reads that one member gets before the next one has its turn: they share messages, and a 4 KiB read at
#: depth 32 then takes half the CPU that it takes one by one (110 us in all processes, not 226).
RUN: Final = 16


@dataclass(slots=True, eq=False)
class Read(Waiter):
    """One read. attempt, replica: under way or arrived; corrupt, failed: members not to ask again (this round)."""

    ticket: Hashable
    start: BlockNumber
    count: int
    since: float
    done: bool = False
    attempt: int = 0
    replica: ReplicaId | None = None
    error: CairnError | None = None
    corrupt: set[ReplicaId] = field(default_factory=set)
    failed: set[ReplicaId] = field(default_factory=set)


class Reads:
    """Every read that has no answer yet."""

    def __init__(self, members: Iterable[Member], lease_s: float) -> None:
        self._members = tuple(members)
        self._lease_s = lease_s
        self._turn = self._run = 0
        self._attempt = 0
        self.unleased = 0
        """How many had their data before the lease allowed to hand it on."""
        self._under_way: dict[int, Read] = {}
        self._parked: list[Read] = []
        self._arrived: list[Read] = []
        self._by_age: deque[Read] = deque()

    def read_from(self, members: Iterable[Member], commit: Position, now: float) -> list[LeaderEffect]:
        """Only from these from now on; what others were asked is asked of them.

        Who is no member after a change may be sealed by nobody any more, and answer when it is behind.
        """
        before, self._members = self._members, tuple(members)
        self._turn = self._run = 0
        others = [member for member in before if member not in self._members]
        effects: list[LeaderEffect] = []
        for member in others:
            effects += self.member_lost(member.replica, commit, now)
        return effects

    def add(self, read: Read) -> None:
        """It is ours until it is answered or fails."""
        self._by_age.append(read)

    def park(self, read: Read) -> None:
        """Ask for it when `retry` is called."""
        self._parked.append(read)

    def ask(self, read: Read, commit: Position, now: float) -> list[LeaderEffect]:
        """Send it to the next member that may answer; park it where there is none."""
        if read.done:
            return []
        member = self._choose(read, commit, now)
        if member is None:
            return self._give_up_or_park(read)
        self._attempt += 1
        read.attempt, read.replica = self._attempt, member.replica
        self._under_way[self._attempt] = read
        return [ReadFrom(self._attempt, member.replica, read.start, read.count, commit, read.ticket)]

    def _choose(self, read: Read, commit: Position, now: float) -> Member | None:
        members = self._members
        self._run += 1
        if self._run >= RUN:
            self._next_turn()
        for _ in members:
            member = members[self._turn]
            if (
                self._may_answer(member, now)
                and member.matched.sequence >= commit.sequence
                and member.replica not in read.failed
                and member.replica not in read.corrupt
            ):
                return member
            self._next_turn()
        return None

    def _may_answer(self, member: Member, now: float) -> bool:
        return member.sealed and member.whole and member.confirmed > now - self._lease_s

    def may_use_tables_of(self, replica: ReplicaId, now: float) -> bool:
        """Whether reads may be asked of this one now, had it all that is committed."""
        for member in self._members:
            if member.replica == replica:
                return self._may_answer(member, now)
        return False

    def _next_turn(self) -> None:
        self._turn, self._run = (self._turn + 1) % len(self._members), 0

    def _give_up_or_park(self, read: Read) -> list[LeaderEffect]:
        untried = any(m.sealed and m.whole and m.replica not in read.corrupt for m in self._members)
        if read.corrupt and not untried:
            assert read.error is not None
            return self._fail(read, read.error)
        read.failed.clear()
        self._parked.append(read)
        return []

    def arrived(self, attempt: int, leased: bool) -> list[LeaderEffect]:
        """Its data is here; without the lease it waits. Dropped where the read went on without it."""
        read = self._under_way.get(attempt)
        if read is None:
            return [ReadDropped(attempt)]
        del self._under_way[attempt]
        if leased:
            read.done = True
            return [ReadDone(read.ticket, attempt)]
        self.unleased += 1
        self._arrived.append(read)
        return []

    def failed(self, attempt: int, error: CairnError, commit: Position, now: float) -> list[LeaderEffect]:
        """The member could not answer; another may."""
        read = self._under_way.pop(attempt, None)
        if read is None:
            return []
        assert read.replica is not None
        read.attempt = 0
        if isinstance(error, InvalidRequest | OutOfRange):
            return self._fail(read, error)
        if isinstance(error, Corrupt):
            read.error = error
            read.corrupt.add(read.replica)
        else:
            read.error = read.error or error
            read.failed.add(read.replica)
        return self.ask(read, commit, now)

    @property
    def await_lease(self) -> bool:
        """Whether the data of any is here, and only the lease is not."""
        return bool(self._arrived)

    def lease_held(self) -> list[LeaderEffect]:
        """Hand on what has arrived without it."""
        arrived, self._arrived = self._arrived, []
        effects: list[LeaderEffect] = []
        for read in arrived:
            if not read.done:
                read.done = True
                effects.append(ReadDone(read.ticket, read.attempt))
        return effects

    def member_lost(self, replica: ReplicaId, commit: Position, now: float) -> list[LeaderEffect]:
        """What was asked of this member is asked of another."""
        lost = [attempt for attempt, read in self._under_way.items() if read.replica == replica]
        effects: list[LeaderEffect] = []
        for attempt in lost:
            effects.append(ReadDropped(attempt))
            error = QuorumUnavailable(f"{replica} was lost before it answered a read")
            effects += self.failed(attempt, error, commit, now)
        return effects

    def retry(self, commit: Position, now: float) -> list[LeaderEffect]:
        """Ask for whatever is parked once more, and elsewhere for what a silent member was asked."""
        effects: list[LeaderEffect] = []
        for member in self._members:
            if self._under_way and member.confirmed <= now - self._lease_s:
                effects += self.member_lost(member.replica, commit, now)
        parked, self._parked = self._parked, []
        for read in parked:
            effects += self.ask(read, commit, now)
        return effects

    def expire(self, before: float) -> list[LeaderEffect]:
        """Fail what was submitted before then."""
        effects: list[LeaderEffect] = []
        while self._by_age and (self._by_age[0].done or self._by_age[0].since <= before):
            read = self._by_age.popleft()
            if not read.done:
                effects += self._fail(read, read.error or QuorumUnavailable("no member answered the read in time"))
        return effects

    def fail_all(self, error: CairnError) -> list[LeaderEffect]:
        """This leader is over."""
        effects: list[LeaderEffect] = []
        for read in self._by_age:
            if not read.done:
                effects += self._fail(read, error)
        self._by_age.clear()
        return effects

    def _fail(self, read: Read, error: CairnError) -> list[LeaderEffect]:
        read.done = True
        effects: list[LeaderEffect] = []
        if read.attempt:
            self._under_way.pop(read.attempt, None)
            effects.append(ReadDropped(read.attempt))
        effects.append(Failed((read.ticket,), error))
        return effects
