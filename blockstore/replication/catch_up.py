"""How far a replica got with what it asks of its peers: their logs, and copies of their tables.

Both go through the peers one after the other, each asked once in a round; the leader's next
CatchUp begins another round. Source: docs/replication.md, rule 6.
"""

from dataclasses import dataclass, field

from blockstore.domain import ReplicaId
from blockstore.replication.messages import CatchUp


@dataclass(slots=True)
class LogFetch:
    """The gap being fetched. peers: not asked yet in this round. refused: one no longer holds the gap."""

    catch_up: CatchUp
    peers: list[ReplicaId]
    attempt: int = 0
    refused: bool = False


@dataclass(slots=True)
class DeltaCopy:
    """The copying of tables. peers: not asked yet in this round. complete: every extent was copied."""

    peers: list[ReplicaId] = field(default_factory=list)
    attempt: int = 0
    running: bool = False
    complete: bool = False
    extents_done: int = 0
    extents_total: int = 0
