"""What leader and replicas say to each other, and what each asks its shell to do.

Messages cross the network (proto/cairn/v1/replica.proto names the same fields). Effects are the
core's only output: a shell carries them out in the order given, each list before the next event's.
What must come before what is written on the effect; where nothing is, order does not matter.
Source: docs/replication.md; Raft, sections 5.3 and 5.4.
"""

from collections.abc import Hashable

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import CairnError
from blockstore.log import LogEntry
from blockstore.record import Record
from blockstore.units import FIRST_GENERATION, BlockNumber, Epoch, Generation, Sequence
from blockstore.values import value

AckedPositions = tuple[tuple[ReplicaId, Position], ...]
"""For some members: a position that each has acked, while it was whole."""

# ---- messages


@value
class SealEpoch:
    """Leader to member: accept nothing of an older epoch or configuration, and say what you hold.

    known: the highest position that anybody was told this member had acked (rule 10). connection: grows with each
    one to this member in this epoch.
    """

    epoch: Epoch
    configuration: int
    known: Position = ORIGIN
    connection: int = 0


@value
class SealAnswer:
    """What a member holds, all of it durable.

    epoch, configuration: as sealed. end: of its log. commit: the highest position that it knows to be
    committed; a filling replica may know a higher one than `end`. floor: the highest position that
    it may ever have acked, where that can be above `end` (a filling one), else ORIGIN. generation:
    that a write behind `end` belongs to; of no meaning unless complete. full: short of space. known: what
    other members had acked, as leaders told it. complete: all content up to `end` is here; a filling
    replica may lack only the certainty that it never acked more. damaged: as in AppendAnswer.
    """

    epoch: Epoch
    configuration: int
    end: Position
    commit: Position
    applied: Position
    whole: bool
    floor: Position = ORIGIN
    generation: Generation = FIRST_GENERATION
    full: bool = False
    known: AckedPositions = ()
    complete: bool = False
    damaged: bool = False


@value
class CatchUp:
    """Part of an Append: where a member finds what the leader no longer holds.

    target: the log should reach this, which the leader vouches for. base: the committed position at
    which the live stream starts if no peer has the gap in its log. peers: whole, best first; also
    the sources of a delta.
    """

    target: Position
    base: Position
    peers: tuple[ReplicaId, ...]


@value
class Append:
    """Leader to member, in order on one stream; without records it is a heartbeat.

    request: grows with each message to this member; echoed. commit: up to here all is on a quorum.
    end: of the leader's log when this was sent. records: in sequence. acked: of all other members, now
    and then; in between it is empty. fill_anew: unless 0, a member that says that it is damaged gives its word up and
    has everything copied: a quorum of the others is sound and has all that is committed. It is the connection on which
    that was said: the word counts there alone, or it might come late, after the member was counted on again.
    """

    epoch: Epoch
    configuration: int
    request: int
    commit: Position
    end: Position
    records: tuple[Record, ...] = ()
    catch_up: CatchUp | None = None
    acked: AckedPositions = ()
    fill_anew: int = 0


@value
class AppendAnswer:
    """Cumulative: this request and all before it on its stream were seen.

    matched: everything up to here is durable and known to match the leader's log. commit, end: the
    replica's own. behind: the predecessor of what was sent is missing. extents_done, extents_total:
    how far a delta got, for status. damaged: its tables have lost what nobody can name; it stays as it is, and
    refuses what it cannot read, until it is told to fill anew.
    """

    epoch: Epoch
    request: int
    matched: Position
    commit: Position
    end: Position
    whole: bool
    full: bool = False
    behind: bool = False
    extents_done: int = 0
    extents_total: int = 0
    damaged: bool = False


@value
class FencedBy:
    """Instead of an answer: a newer epoch or configuration than the sender's was sealed here."""

    epoch: Epoch
    configuration: int


# ---- effects of a follower


@value
class Persist:
    """Write the entries to the journal, all or none of them, behind all earlier numbers.

    Afterwards: Follower.persisted(number); one call for the highest of a group will do.
    """

    number: int
    entries: tuple[LogEntry, ...]


@value
class Answer:
    """Send `message` to where `origin` (as given with the request) leads; drop it if that is gone.

    Everything that it rests on is durable already.
    """

    origin: Hashable
    message: SealAnswer | AppendAnswer | FencedBy


@value
class Commit:
    """These records, the next in order, are committed: visible to reads, and to be applied by a checkpoint."""

    records: tuple[Record, ...]


@value
class ResetLog:
    """The replica begins to fill: forget committed records that no checkpoint has applied.

    A checkpoint or copy under way must have ended before; the tables keep what they have.
    """


@value
class FetchLog:
    """Ask `peer` for the records behind `after` up to `target`.

    Afterwards: log_fetched (any number of times), then log_ended, log_not_held or fetch_failed, with
    this attempt. It ends a FetchLog before it, of which nothing need be told; a FetchDelta goes on.
    """

    attempt: int
    peer: ReplicaId
    after: Position
    target: Position


@value
class FetchDelta:
    """Copy from `peer` what its tables hold, as of its applied position, which is at or above `at_least`.

    First its meta, then each extent whose highest sequence is above `since`. Before each transaction
    that writes a copy: accept_copy; the image goes into that transaction. At the end delta_done or
    delta_failed, with this attempt. Given out only once the `filling` entry is durable. It ends a
    FetchDelta before it, of which nothing need be told; a FetchLog goes on.
    """

    attempt: int
    peer: ReplicaId
    since: Sequence
    at_least: Position


@value
class Checkpoint:
    """Apply what is committed to the tables soon: becoming whole waits for it."""


FollowerEffect = Persist | Answer | Commit | ResetLog | FetchLog | FetchDelta | Checkpoint

# ---- effects of a leader


@value
class Send:
    """To this member, in order with what was sent to it before; drop it while there is no connection."""

    replica: ReplicaId
    message: SealEpoch | Append


@value
class Reconnect:
    """Close the way to this member and open it anew: it has to be sealed again."""

    replica: ReplicaId


@value
class Serving:
    """The epoch-start record is on a quorum and no older lease is left: guests may be served."""


@value
class Completed:
    """The operations of these tickets are committed: answer their guests."""

    tickets: tuple[Hashable, ...]


@value
class Sealed:
    """The SEAL of this ticket is committed, at `position`; `generation` is the layer that it sealed."""

    ticket: Hashable
    generation: Generation
    position: Position


@value
class Failed:
    """These requests, writes or reads, end with the error; a write may take effect yet."""

    tickets: tuple[Hashable, ...]
    error: CairnError


@value
class ReadFrom:
    """Read from this member; afterwards read_arrived or read_failed with the attempt. ticket: whose read it is."""

    attempt: int
    replica: ReplicaId
    start: BlockNumber
    count: int
    commit: Position
    ticket: Hashable


@value
class ReadDone:
    """Answer the guest with the data that arrived for `attempt`."""

    ticket: Hashable
    attempt: int


@value
class ReadDropped:
    """The data of `attempt` is not wanted any more: it came from elsewhere, or its request has ended."""

    attempt: int


@value
class Relieved:
    """The queue has fallen below its low mark: take requests again."""


@value
class Over:
    """This leader has ended for good; all its requests were failed before."""

    error: CairnError


LeaderEffect = (
    Send | Reconnect | Serving | Completed | Sealed | Failed | ReadFrom | ReadDone | ReadDropped | Relieved | Over
)
