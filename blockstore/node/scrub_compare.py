"""Whether two replicas show the same of an extent, and where they do not. Pure.

Invariant: a difference is told only of one and the same committed sequence. Each view says up to which position it
reflects the log, and by which record the extent was last changed; so two views are of the earlier one's position where
nothing in between touched the extent. All else is MOVING: looked at again, and never called a difference.

A difference is told, and nothing is done about it: both replicas pass their checksums, and nobody may choose by
counting (design, section 3, rule 9). What the versions themselves prove is said with it: each block's checksum is
seeded with its sequence, so a replica that shows an older record's version than another one lacks a committed write.
That is no vote, but it is not acted upon either: a copy would overwrite what could still tell how it came to that.
"""

from enum import Enum
from typing import NamedTuple

from blockstore.storage.scrub import ExtentView, ShownBlock, ShownExtent
from blockstore.units import Generation, Sequence


class Verdict(Enum):
    """What two views of an extent say of each other."""

    SAME = "same"
    MOVING = "moving"
    DIFFERENT = "different"


class Difference(NamedTuple):
    """A block that two replicas show differently as of one sequence."""

    block: int
    generation: Generation
    sequence: Sequence
    what: str


def compare(own: ExtentView, peer: ExtentView) -> Verdict:
    """Of two views of one extent that cover the same generations."""
    assert (own.extent, own.generations) == (peer.extent, peer.generations)
    if own.digest == peer.digest:
        return Verdict.SAME
    return Verdict.DIFFERENT if at_one_sequence(own, peer) else Verdict.MOVING


def at_one_sequence(own: ExtentView | ShownExtent, peer: ExtentView | ShownExtent) -> bool:
    """Whether both show the extent as of the earlier one's position.

    Positions of two branches of a log, of which one was given up, do not order in both epoch and sequence.
    """
    earlier, later = sorted((own, peer), key=lambda view: (view.position.sequence, view.position.epoch))
    if earlier.position.epoch > later.position.epoch:
        return False
    if earlier.position.sequence == later.position.sequence and earlier.position.epoch != later.position.epoch:
        return False
    return later.highest <= earlier.position.sequence


def differences(own: ShownExtent, peer: ShownExtent, generation: Generation) -> list[Difference]:
    """Block by block, in order; none where they are not of one sequence."""
    if not at_one_sequence(own, peer):
        return []
    sequence = min(own.position.sequence, peer.position.sequence)
    found = []
    for number in sorted(own.blocks.keys() | peer.blocks.keys()):
        ours, theirs = own.blocks.get(number), peer.blocks.get(number)
        if (ours.digest if ours else b"") != (theirs.digest if theirs else b""):
            found.append(Difference(number, generation, sequence, _say(ours, theirs)))
    return found


def _say(own: ShownBlock | None, peer: ShownBlock | None) -> str:
    """Which versions they show, and what these prove."""
    said = f"this replica shows {_name(own)}, the other one {_name(peer)}"
    if own and peer and own.sequence != peer.sequence:
        behind = "this replica" if own.sequence < peer.sequence else "the other one"
        return f"{said}: {behind} lacks a committed write"
    return said


def _name(version: ShownBlock | None) -> str:
    if version is None:
        return "no entry"
    content = "data" if version.digest else "zeroes"
    return f"{content} of record {version.sequence} in generation {version.generation}"
