"""`cairn node drain`, `cairn node repair` and `cairn volume rebalance`: replicas that move from node to node.

All of it is control's work and goes on by itself: a command that is interrupted takes nothing back. What is printed
is made here, too: progress, plans and settings as documents and tables.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Final

import typer
from rich.console import RenderableType
from rich.text import Text

from blockstore.cli import documents, tables
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.completion import complete_node, complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, a_number, rate_bytes
from blockstore.cli.screen import progress, show
from blockstore.config import MAX_REBUILDS, MAX_TIME_S
from blockstore.errors import QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from blockstore.units import MIB, format_size

#: Between two looks at a drain: each asks for the whole status.
_POLL_S: Final = 1.0
_MINUTE_S: Final = 60
_HOUR_S: Final = 3600

NodeArgument = Annotated[
    str, typer.Argument(metavar="NODE", help="The node's id, such as node-…", autocompletion=complete_node)
]


def drain(
    node: NodeArgument,
    *,
    state: StateOption,
    undo: Annotated[bool, typer.Option("--undo", help="It may have replicas again; what has moved stays.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it is empty; Ctrl-C ends only the waiting.")
    ] = True,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move all replicas of a node to others, while guests go on, and place none on it any more.

    Also of a node that is lost for good: its replicas are then made anew from the others. None is taken out before
    the one in its place has everything. It is refused where that leaves fewer than three nodes that are not drained.
    Afterwards stop the node, and forget it with `cairn node remove`; a node that
    is to come back registers by itself when it starts.
    """
    address = find_control(control, state)
    found = run_with_control(
        address, lambda client: client.call(client.stub.DrainNode, pb.DrainNodeRequest(node=node, undo=undo))
    )
    if wait and not undo:
        with progress(f"draining {found.id}") as update:
            found = run_with_control(address, lambda client: _until_empty(client, found.id, update))
    text = f"{found.id} is {'not drained any more' if undo else 'being drained'}: {found.replicas} replicas are on it"
    done = f"{found.id} holds no replica any more: stop it, and forget it with `cairn node remove {found.id}`"
    show(output, documents.node(found), lambda: done if found.draining and not found.replicas else text)


def repair(
    *,
    state: StateOption,
    replace_after: Annotated[
        float | None,
        typer.Option(
            "--replace-after",
            metavar="SECONDS",
            min=0,
            max=MAX_TIME_S,
            callback=a_number,
            help="Replace replicas away so long; 0 is never.",
        ),
    ] = None,
    rebuild_rate: Annotated[
        int | None,
        typer.Option("--rebuild-rate", metavar="RATE", parser=rate_bytes, help="Bytes/s into one node; 0: no limit."),
    ] = None,
    rebuilds: Annotated[
        int | None,
        typer.Option("--rebuilds", min=1, max=MAX_REBUILDS, help="Replicas that are filled at once in the cluster."),
    ] = None,
    rebuilds_per_node: Annotated[
        int | None,
        typer.Option("--rebuilds-per-node", min=1, max=MAX_REBUILDS, help="The same on one new node."),
    ] = None,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what the replacing of replicas goes by, or set it on the running cluster."""
    request = pb.SetRepairRequest(
        replace_after_s=replace_after,
        rebuild_rate_bytes=rebuild_rate,
        rebuilds=rebuilds,
        rebuilds_per_node=rebuilds_per_node,
    )

    async def work(client: ControlClient) -> pb.RepairSettings:
        if request.ListFields():
            return await client.call(client.stub.SetRepair, request)
        return await client.call(client.stub.GetRepair, pb.GetRepairRequest())

    found = run_with_control(find_control(control, state), work)
    show(output, settings_document(found), lambda: settings_table(found))


def rebalance(
    state: StateOption,
    volume: Annotated[
        str,
        typer.Argument(
            metavar="VOLUME", help="Its id or name; without it all volumes.", autocompletion=complete_volume
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be moved.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move replicas so that no zone has two of one volume where it need not, and nodes are evenly loaded.

    Prints the plan; it is carried out in the background, one change at a time in each volume.
    """
    request = pb.RebalanceRequest(volume=volume, dry_run=dry_run)
    address = find_control(control, state)
    found = run_with_control(address, lambda client: client.call(client.stub.Rebalance, request))
    document = {"dry_run": dry_run, "moves": [move_document(each) for each in found.moves]}
    show(output, document, lambda: moves_table(found.moves, dry_run))


async def _until_empty(client: ControlClient, node: str, update: Callable[[str], None]) -> pb.Node:
    """Until no replica is on it; goes on while control is away."""
    while True:
        try:
            found = await client.call(client.stub.GetNode, pb.GetNodeRequest(node=node))
            if not found.replicas or not found.draining:
                return found
            update(f"draining {node}: {found.replicas} replicas are left{await _filling_text(client, node)}")
        except QuorumUnavailable as error:
            update(f"draining {node}: {error}")
        await asyncio.sleep(_POLL_S)


async def _filling_text(client: ControlClient, node: str) -> str:
    """What is filled now; where nothing is, what stands in the way of the node's replicas."""
    volumes = (await client.status()).volumes
    filling = [rebuild_text(each) for volume in volumes for each in rebuilds(volume)]
    if filling:
        return f"; {len(filling)} being filled ({', '.join(filling[:3])})"
    waits = {each.waits for volume in volumes for each in volume.replicas if each.node == node and each.waits}
    return f"; {'; '.join(sorted(waits))}" if waits else ""


# ---- documents and tables


def rebuilds(value: pb.VolumeHealth) -> list[pb.ReplicaHealth]:
    """The replicas of a volume that are being filled, newcomers first."""
    found = [each for each in value.replicas if each.replaces or each.state == "filling"]
    return sorted(found, key=lambda each: not each.replaces)


def rebuild_document(value: pb.ReplicaHealth) -> documents.Document:
    """How far it is. seconds_left, rate_bytes: null where nothing can be said yet."""
    return {
        "replica": value.replica,
        "node": value.node,
        "replaces": value.replaces or None,
        "reason": value.replaces_why or None,
        "state": value.state,
        "extents_done": value.extents_done,
        "extents_total": value.extents_total,
        "rate_bytes": value.rate_bytes or None,
        "seconds_left": round(value.seconds_left, 1) or None,
    }


def rebuild_text(value: pb.ReplicaHealth) -> str:
    """In one line: how much is copied, how fast, and how long it takes yet."""
    if not value.extents_total:
        return "from the log" if value.state != "filling" else "not begun yet"
    done, total = value.extents_done * MIB, value.extents_total * MIB
    parts = [f"{format_size(done)} of {format_size(total)}"]
    parts += [f"{format_size(value.rate_bytes)}/s"] if value.rate_bytes else []
    parts += [f"{duration(value.seconds_left)} left"] if value.seconds_left else []
    return ", ".join(parts)


def rebuilds_table(values: Iterable[tuple[str, pb.ReplicaHealth]]) -> RenderableType | None:
    """(volume, replica) that are filled; None where there are none."""
    rows = [
        (volume, each.node, each.replica, each.replaces or "-", each.replaces_why or "-", rebuild_text(each))
        for volume, each in values
    ]
    return tables.grid(("VOLUME", "NODE", "REPLICA", "IN PLACE OF", "WHY", "COPIED"), rows) if rows else None


def duration(seconds: float) -> str:
    """For people: 8 s, 3 min, 2.5 h."""
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE_S:.0f} min" if seconds < _HOUR_S else f"{seconds / _HOUR_S:.1f} h"


def settings_document(value: pb.RepairSettings) -> documents.Document:
    return {
        "replace_after_s": value.replace_after_s,
        "rebuild_rate_bytes": value.rebuild_rate_bytes,
        "rebuilds": value.rebuilds,
        "rebuilds_per_node": value.rebuilds_per_node,
    }


def settings_table(value: pb.RepairSettings) -> RenderableType:
    after = f"{duration(value.replace_after_s)} away" if value.replace_after_s else "never by itself"
    rate = f"{format_size(value.rebuild_rate_bytes)}/s into a node" if value.rebuild_rate_bytes else "no limit"
    return tables.pairs(
        [
            ("replaced", after),
            ("rate", rate),
            ("at once", f"{value.rebuilds} in the cluster, {value.rebuilds_per_node} on one new node"),
        ]
    )


def move_document(value: pb.Move) -> dict[str, Any]:
    return {
        "volume": value.volume,
        "segment": value.segment,
        "replica": value.replica,
        "from_node": value.from_node,
        "to_node": value.to_node,
        "why": value.why,
        "size_bytes": value.size_bytes,
    }


def moves_table(values: Iterable[pb.Move], dry_run: bool) -> RenderableType:
    rows = [
        (each.volume, str(each.segment), each.from_node, each.to_node, format_size(each.size_bytes), each.why)
        for each in values
    ]
    if not rows:
        return Text("all is even: nothing to move")
    table = tables.grid(("VOLUME", "SEGMENT>", "FROM", "TO", "SIZE>", "WHY"), rows)
    table.caption = "nothing was moved" if dry_run else "these are moved now, one after the other: see `cairn status`"
    table.caption_justify = "left"
    return table
