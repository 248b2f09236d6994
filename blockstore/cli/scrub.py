"""`cairn volume scrub`: read all that a volume's replicas hold, compare them, and say what was found."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.console import RenderableType

from blockstore.cli import documents, tables
from blockstore.cli.client import POLL_S, ControlClient, run_with_control
from blockstore.cli.completion import complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.documents import Document
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, rate_bytes
from blockstore.cli.screen import progress, show
from blockstore.errors import Corrupt, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb

#: Nothing is wrong any more: the exit code is 0.
SOUND: Final = "sound"
REPAIRED: Final = "repaired"
RUNNING: Final = "running"
#: Exit code 9.
DAMAGED: Final = "damaged"
DIFFERS: Final = "differs"
#: Exit code 8.
FILLING: Final = "filling"
NOT_REACHED: Final = "not reached"


@dataclass(frozen=True, slots=True)
class Found:
    """A replica, what became of its pass, and why where that is not all."""

    health: pb.ReplicaHealth
    number: int
    outcome: str
    why: str


def scrub(
    volume: Annotated[
        str, typer.Argument(metavar="VOLUME", help="The volume's id or name.", autocompletion=complete_volume)
    ],
    *,
    state: StateOption,
    rate: Annotated[
        int | None,
        typer.Option(
            "--rate",
            metavar="RATE",
            parser=rate_bytes,
            help="Most bytes a second that each replica reads, like 50M; 0 is no limit. Guests come first in any case.",
            show_default="no limit",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is over, and say what was found.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Read and check every block of a volume's replicas now, and compare what they show.

    Also of a detached volume, and beside the schedule. Damage is repaired from a good copy. With --wait exit code 9
    says that damage or a difference stays, and 8 that a replica could not be scrubbed to the end.
    """
    request = pb.ScrubVolumeRequest(volume=volume, rate_bytes=rate or 0)

    async def work(client: ControlClient, update: Callable[[str], None]) -> tuple[str, list[Found]]:
        started = await client.call(client.stub.ScrubVolume, request)
        return started.volume, await _follow(client, started, update, wait=wait)

    with progress(f"scrubbing {volume}") as update:
        name, found = run_with_control(find_control(control, state), lambda client: work(client, update))
    show(output, _document(name, found), lambda: _table(found))
    _raise_for(name, found)


async def _follow(
    client: ControlClient, started: pb.ScrubVolumeResponse, update: Callable[[str], None], *, wait: bool
) -> list[Found]:
    begun = {each.replica: each for each in started.replicas}
    while True:
        health = await client.health(started.volume)
        if health is None:
            raise NotFound(f"volume {started.volume} was deleted meanwhile")
        found = [_judge(each, begun.get(each.replica, pb.StartedScrub())) for each in health.replicas]
        if not wait or not any(each.outcome == RUNNING for each in found):
            return found
        update(f"scrubbing {started.volume}: " + ", ".join(map(_how_far, found)))
        await asyncio.sleep(POLL_S)


def _judge(health: pb.ReplicaHealth, begun: pb.StartedScrub) -> Found:
    """What became of the pass that was begun at this replica."""
    scrubbed = health.scrub
    if not begun.number or health.state in ("down", "unknown"):
        return Found(health, begun.number, NOT_REACHED, begun.why or health.why)
    if health.state == "filling":
        return Found(health, begun.number, FILLING, health.why)
    if scrubbed.ended < begun.number:
        return Found(health, begun.number, RUNNING, "")
    if scrubbed.extents_differing:
        return Found(health, begun.number, DIFFERS, "see `cairn status` for what to do")
    if scrubbed.extents_bad or health.damage:
        why = health.why if health.damage else "no other whole member has those blocks good"
        return Found(health, begun.number, DAMAGED, why)
    return Found(health, begun.number, REPAIRED if scrubbed.extents_damaged else SOUND, scrubbed.why)


def _how_far(found: Found) -> str:
    scrubbed = found.health.scrub
    if found.outcome != RUNNING:
        return f"{found.health.node} {found.outcome}"
    if scrubbed.number < found.number or not scrubbed.extents_total:
        return f"{found.health.node} begins"
    return f"{found.health.node} {100 * scrubbed.extents_done // scrubbed.extents_total}%"


def _raise_for(volume: str, found: list[Found]) -> None:
    bad = [each.health.replica for each in found if each.outcome in (DAMAGED, DIFFERS)]
    if bad:
        raise Corrupt(f"scrub of {volume}: something stays wrong with {', '.join(bad)}; see above, and `cairn status`")
    missing = [each.health.replica for each in found if each.outcome in (NOT_REACHED, FILLING)]
    if missing:
        raise QuorumUnavailable(
            f"scrub of {volume}: {', '.join(missing)} could not be scrubbed; see above why, and scrub again then"
        )


def _document(volume: str, found: list[Found]) -> Document:
    return {
        "volume": volume,
        "sound": all(each.outcome in (SOUND, REPAIRED) for each in found),
        "replicas": [
            {
                "replica": each.health.replica,
                "node": each.health.node,
                "zone": each.health.zone,
                "outcome": each.outcome,
                "why": each.why,
                "bad_blocks_found": each.health.bad_blocks_found,
                "bad_blocks_repaired": each.health.bad_blocks_repaired,
                **documents.scrub(each.health.scrub),
            }
            for each in found
        ],
    }


def _table(found: list[Found]) -> RenderableType:
    return tables.grid(
        ("NODE", "ZONE", "OUTCOME", "EXTENTS>", "DAMAGED>", "STILL BAD>", "COMPARED>", "DIFFER>", "WHY"),
        [
            (
                each.health.node,
                each.health.zone,
                each.outcome,
                f"{each.health.scrub.extents_done:,}",
                f"{each.health.scrub.extents_damaged:,}",
                f"{each.health.scrub.extents_bad:,}",
                f"{each.health.scrub.extents_compared:,}",
                f"{each.health.scrub.extents_differing:,}",
                each.why,
            )
            for each in found
        ],
    )
