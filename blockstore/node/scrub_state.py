"""How far the scrub of a replica is, kept beside its tables over restarts: `scrub`, a JSON document.

It is a note, not data: where it cannot be read, or not be written, the next pass begins from the first extent. What
it says of differences stays until the blocks were found equal, whichever pass that is.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from blockstore.domain import ReplicaId
from blockstore.node.scrub_compare import Difference
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import Generation, Sequence

_log = structlog.get_logger(__name__)
#: Told one by one; of the rest the number of extents.
MAX_DIFFERENCES: Final = 20
#: Extents that are looked at again at the end of a pass. A volume in which more change all the time is compared
#: in parts: those that are left out are counted.
MAX_PENDING: Final = 4096


@dataclass(slots=True)
class Pass:
    """One walk over all extents of a replica, and what it found.

    pending: extents that have to be looked at again before it is over: damaged, changing or different. done: extents
    that were walked over. bad: those still damaged at the end. rate_bytes: a second, 0 without a limit.
    """

    number: int = 0
    by_hand: bool = False
    rate_bytes: int = 0
    running: bool = False
    began_ms: int = 0
    next_extent: int = 0
    total: int = 0
    done: int = 0
    damaged: set[int] = field(default_factory=set)
    bad: int = 0
    compared: int = 0
    not_compared: int = 0
    why: str = ""
    pending: set[int] = field(default_factory=set)


@dataclass(slots=True)
class ScrubState:
    """due_ms: when the next pass of the schedule begins. ended_ms: of the last one that went through to its end.

    differing: by extent, with which replica, and its first block that differs.
    """

    due_ms: int = 0
    ended: int = 0
    ended_ms: int = 0
    latest: Pass = field(default_factory=Pass)
    differing: dict[int, tuple[ReplicaId, Difference]] = field(default_factory=dict)

    def message(self) -> pb.ScrubStatus:
        """For status."""
        latest = self.latest
        return pb.ScrubStatus(
            number=latest.number,
            running=latest.running,
            ended=self.ended,
            extents_total=max(latest.total, latest.done),
            extents_done=latest.done,
            ended_ms=self.ended_ms,
            began_ms=latest.began_ms,
            extents_damaged=len(latest.damaged),
            extents_bad=latest.bad,
            extents_compared=latest.compared,
            extents_not_compared=latest.not_compared,
            why=latest.why,
            divergences=[_divergence(*each) for _, each in sorted(self.differing.items())[:MAX_DIFFERENCES]],
            extents_differing=len(self.differing),
        )


def _divergence(peer: ReplicaId, found: Difference) -> pb.Divergence:
    return pb.Divergence(
        block=found.block, generation=found.generation, peer=peer, sequence=found.sequence, what=found.what
    )


def load(path: Path) -> ScrubState | None:
    """What was kept in `path`; None where there is nothing, or nothing that makes sense."""
    if not path.exists():
        return None
    try:
        return _decode(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("how far the scrub was is not known any more: it begins anew", path=str(path), error=str(error))
        return None


def save(path: Path, state: ScrubState) -> None:
    """In one step, and without a sync: what a crash loses is read once more."""
    staged = path.with_name(path.name + ".new")
    try:
        staged.write_text(json.dumps(_encode(state)))
        staged.replace(path)
    except OSError as error:  # a full disk: scrub goes on
        _log.warning("how far the scrub is could not be written down", path=str(path), error=str(error))


def _encode(state: ScrubState) -> dict[str, Any]:
    latest = dataclasses.asdict(state.latest)
    latest |= {"pending": sorted(state.latest.pending), "damaged": sorted(state.latest.damaged)}
    differing = [(extent, peer, *found) for extent, (peer, found) in sorted(state.differing.items())]
    return {
        "due_ms": state.due_ms,
        "ended": state.ended,
        "ended_ms": state.ended_ms,
        "latest": latest,
        "differing": differing,
    }


def _decode(found: dict[str, Any]) -> ScrubState:
    latest = Pass(**found["latest"])
    latest.pending, latest.damaged = set(latest.pending), set(latest.damaged)
    return ScrubState(
        due_ms=int(found["due_ms"]),
        ended=int(found["ended"]),
        ended_ms=int(found["ended_ms"]),
        latest=latest,
        differing={
            int(extent): (ReplicaId(peer), Difference(block, Generation(generation), Sequence(sequence), what))
            for extent, peer, block, generation, sequence, what in found["differing"]
        },
    )
