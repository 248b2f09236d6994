"""What front-ends and peers ask of a node beside seals and records, and what it answers."""

from dataclasses import dataclass

from blockstore.domain import Position
from blockstore.units import BlockNumber, Epoch, Sequence
from tests.simulation.model_tables import ExtentCopy, MetaCopy


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a front-end asks of a replica's tables."""

    epoch: Epoch
    configuration: int
    commit: Position
    start: BlockNumber
    count: int


@dataclass(frozen=True, slots=True)
class LogRequest:
    epoch: Epoch
    after: Position
    up_to: Position


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    epoch: Epoch
    since: Sequence
    at_least: Position


@dataclass(frozen=True, slots=True)
class Copied:
    """A part of a delta: the meta, or an extent, as of `stated`."""

    stated: Position
    meta: MetaCopy | None
    extents: tuple[ExtentCopy, ...]
    absent: bool = False


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """What a front-end asks of a whole replica: generations and source, as of `applied` or later."""

    applied: Position


@dataclass(frozen=True, slots=True)
class Described:
    applied: Position
    meta: MetaCopy
