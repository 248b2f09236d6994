"""The leader's limits and times, each with its reason."""

from dataclasses import dataclass

from blockstore.units import KIB, MAX_RECORD_PAYLOAD, MIB


@dataclass(frozen=True, slots=True)
class LeaderSettings:
    """Times in seconds, sizes in bytes.

    lease_s: a read is answered if a quorum confirmed the epoch to a request sent less than this ago; how
    long a new front-end waits for an old one that it cannot hear of. drift_s: by how much two boot-time
    clocks may disagree over a lease. older_lease_s: the most that lease_s may be at any front-end: the one before may
    be set otherwise, and a new one waits for whichever is longer. heartbeat_s: a fraction of the lease, so that one
    lost heartbeat breaks nothing. retry_limit_s: below the 30 s after which a guest's kernel gives a disk up.
    max_records_in_flight: fewer and larger batches win (8,000 IOPS with 4, 15,000 with 2).
    batch_bytes: while a record is in flight the next one waits for that or for so much; a message costs a member 500 us
    of CPU, an operation in it 20 us. gather_s: how long, at most, a record waits for the writes that are likely to
    follow those just answered (see gathering); 0: not at all. max_record_bytes: of payload. retained_bytes: what a
    member that was away briefly is resent from memory. queue_bytes: of requests that wait; above it no more are taken.
    window_bytes: sent to one member and not acked; a slow one must not fill the buffers of its connection. loss_wait_s:
    where a loss was accepted, how long members that have not answered are waited for: one that is up answers well
    within.
    """

    lease_s: float = 1.0
    drift_s: float = 0.1
    older_lease_s: float = 0.0
    heartbeat_s: float = 0.2
    retry_limit_s: float = 25.0
    max_records_in_flight: int = 2
    batch_bytes: int = 128 * KIB
    gather_s: float = 0.001
    max_record_bytes: int = MAX_RECORD_PAYLOAD
    retained_bytes: int = 64 * MIB
    queue_bytes: int = 64 * MIB
    window_bytes: int = 4 * MIB
    loss_wait_s: float = 5.0
