"""What a leader tells operators about itself and its members."""

from dataclasses import dataclass, field

from blockstore.domain import Position, ReplicaId
from blockstore.errors import CairnError
from blockstore.metrics import Durations
from blockstore.replication.leader_log import LeaderLog
from blockstore.replication.member import Member
from blockstore.units import Epoch, Generation


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member, as of what it last said.

    sealed: its seal was answered on this connection. lag_records, lag_bytes: behind the leader's log;
    lag_bytes is None where the leader does not hold all of that any more. extents_done, extents_total:
    of a copy under way, else 0. behind: it fetches from peers what the leader does not hold.
    left_out: why it takes no part now; empty where it does. foreign: for good. damaged: it has lost content, and waits
    to be told to fill anew.
    """

    replica: ReplicaId
    connected: bool
    sealed: bool
    whole: bool
    full: bool
    matched: Position
    commit: Position
    lag_records: int
    lag_bytes: int | None
    extents_done: int
    extents_total: int
    behind: bool
    left_out: str = ""
    foreign: bool = False
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class LeaderStatus:
    """why: what it waits for before it serves, or why it is over; else empty.

    settled: the number of the configuration whose quorum has all that was committed before; 0 for none yet.
    lacks_room: who is full and who is away, where new writes are held or refused for that; else empty. held: how many
    wait for it. waiting_bytes: of writes that are in no record yet. commits: of each record, from when its first write
    came until it was committed. unleased: reads whose data was here before the lease allowed to hand it on.
    """

    serving: bool
    epoch: Epoch
    end: Position
    commit: Position
    generation: Generation
    over: CairnError | None
    why: str
    members: tuple[MemberStatus, ...]
    settled: int = 0
    held: int = 0
    lacks_room: str = ""
    waiting_bytes: int = 0
    unleased: int = 0
    commits: Durations = field(default_factory=Durations)


def member_status(member: Member, log: LeaderLog) -> MemberStatus:
    """A picture of now."""
    lag_records, lag_bytes = log.lag(member)
    return MemberStatus(
        replica=member.replica,
        connected=member.connected,
        sealed=member.sealed,
        whole=member.whole,
        full=member.full,
        matched=member.matched,
        commit=member.commit,
        lag_records=lag_records,
        lag_bytes=lag_bytes,
        extents_done=member.extents_done,
        extents_total=member.extents_total,
        behind=member.catching_up,
        left_out=member.left_out,
        foreign=member.foreign,
        damaged=member.damaged,
    )
