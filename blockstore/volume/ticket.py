"""The ticket to open a segment of a volume, as the front-end uses it."""

from dataclasses import dataclass

from blockstore.domain import Configuration, Position, ReplicaId, SegmentNumber, VolumeId
from blockstore.units import Epoch


@dataclass(frozen=True, slots=True)
class Ticket:
    """All that it takes to open one segment of a volume. addresses, known: by replica, of all members.

    size_bytes: the segment's.
    known: the highest position that control was ever told for a replica. loss_epochs: those that went on with a loss
    accepted.
    """

    volume: VolumeId
    segment: SegmentNumber
    size_bytes: int
    epoch: Epoch
    configuration: Configuration
    addresses: dict[ReplicaId, str]
    known: dict[ReplicaId, Position]
    accept_loss: bool = False
    loss_epochs: tuple[Epoch, ...] = ()
