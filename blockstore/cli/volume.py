"""`cairn volume`: virtual disks."""

import sys
from typing import Annotated, Final

import typer
from rich.console import Group
from rich.text import Text

from blockstore.cli import documents, hydrate, repair, scrub, tables
from blockstore.cli.attaching import attach_and_wait, recovery_needed, until_detached, until_state
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.completion import complete_snapshot, complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.options import (
    ControlOption,
    Output,
    OutputOption,
    StateOption,
    a_number,
    key_values,
    rate_bytes,
    size_bytes,
    size_option,
)
from blockstore.cli.screen import print_table, progress, say, show
from blockstore.config import MAX_TIME_S
from blockstore.errors import Conflict, InvalidRequest
from blockstore.rpc import control_pb2 as pb
from nbd_server import uri as nbd_uri

app = typer.Typer(help="Volumes: virtual disks, each block on three nodes.", no_args_is_help=True)
app.add_typer(hydrate.app, name="hydrate")

VolumeArgument = Annotated[
    str, typer.Argument(metavar="VOLUME", help="The volume's id or name.", autocompletion=complete_volume)
]
_SIZE_HELP: Final = "Like 512M, 10G or 1T; a multiple of 4 KiB."
SizeOption = Annotated[int, size_option(_SIZE_HELP)]
NewSizeOption = Annotated[int | None, size_option(_SIZE_HELP, "the snapshot's")]
SnapshotOption = Annotated[
    str,
    typer.Option(
        "--snapshot",
        metavar="SNAPSHOT",
        help="Start with the content of this snapshot, which comes as it is needed and in the background.",
        autocompletion=complete_snapshot,
        show_default=False,
    ),
]
InitRateOption = Annotated[
    int | None,
    typer.Option(
        "--init-rate",
        metavar="RATE",
        parser=rate_bytes,
        help="Most bytes a second that the background brings, like 50M; 0 is no limit.",
        show_default="no limit",
    ),
]
SegmentSizeOption = Annotated[
    int | None,
    typer.Option(
        "--segment-size",
        metavar="SIZE",
        parser=size_bytes,
        help="A larger volume has several segments of this size, each on nodes of its own.",
        show_default="as control is set",
    ),
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        "--timeout",
        metavar="SECONDS",
        help="Wait so long until it is done; 0 does not wait.",
        min=0,
        max=MAX_TIME_S,
        callback=a_number,
    ),
]


@app.command("create")
def create(
    *,
    size: NewSizeOption = None,
    state: StateOption,
    snapshot: SnapshotOption = "",
    init_rate: InitRateOption = None,
    name: Annotated[str, typer.Option("--name", "-n", help="A name for it, which no other volume has.")] = "",
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="May be given again.")] = None,
    segment_size: SegmentSizeOption = None,
    client_token: Annotated[
        str, typer.Option("--client-token", help="A second request with the same token gives the same volume.")
    ] = "",
    wait: WaitOption = 30.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a volume, replicated three times; it reads as zeroes, or as a snapshot does.

    One made from a snapshot can be used at once: what has not come yet is fetched when it is read.
    """
    if size is None and not snapshot:
        raise InvalidRequest("Missing option '--size': how large the volume is, unless --snapshot says it")
    if init_rate is not None and not snapshot:
        raise InvalidRequest("--init-rate is for volumes made with --snapshot: there is nothing to bring")
    request = pb.CreateVolumeRequest(
        size_bytes=size or 0,
        name=name,
        tags=key_values(tag or [], "--tag"),
        client_token=client_token,
        snapshot=snapshot,
        init_rate_bytes=init_rate or 0,
        segment_size_bytes=segment_size or 0,
    )

    async def work(client: ControlClient) -> pb.Volume:
        with progress("creating a volume") as update:
            volume = await client.call(client.stub.CreateVolume, request)
            return await until_state(client, volume, pb.VOLUME_STATE_AVAILABLE, wait, update)

    _show(run_with_control(find_control(control, state), work), output)


@app.command("list")
def list_volumes(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """List all volumes."""
    address = find_control(control, state)
    answer = run_with_control(address, lambda client: client.whole(client.stub.ListVolumes, pb.ListVolumesRequest()))
    found = list(answer.volumes)
    show(output, documents.volumes(found), lambda: tables.volumes(found))


@app.command("show")
def show_volume(
    volume: VolumeArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Show one volume: where its replicas are, where it is attached, and how far hydration and rebuilds are."""

    async def work(client: ControlClient) -> tuple[pb.Volume, pb.VolumeHealth]:
        found = await client.volume(volume)
        return found, await client.health(found.id) or pb.VolumeHealth()

    found, health = run_with_control(find_control(control, state), work)
    filling = repair.rebuilds(health)
    document = {
        **documents.volume(found),
        "replicas": [documents.replica(each) for each in health.replicas],
        "rebuilds": [repair.rebuild_document(each) for each in filling],
    }
    table = repair.rebuilds_table((found.name or found.id, each) for each in filling)
    troubles = tables.troubles(health)
    more = [part for each in (troubles, table) if each for part in (Text(), each)]
    show(output, document, lambda: Group(tables.volume(found), *more))


app.command("rebalance")(repair.rebalance)


@app.command("delete")
def delete(
    volume: VolumeArgument,
    *,
    state: StateOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, also not at a terminal.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete a volume that is not attached, and all that is on it."""
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Delete {volume} and all that is on it?", err=True):
        say("nothing was deleted")
        raise typer.Exit(1)
    address = find_control(control, state)
    request = pb.DeleteVolumeRequest(volume=volume)
    done = run_with_control(address, lambda client: client.call(client.stub.DeleteVolume, request))
    text = (
        f"{done.id} is deleted"
        if done.deleted
        else f"{done.id} is being deleted: replicas on nodes that are down go when these come back"
    )
    show(output, {"id": done.id, "deleted": done.deleted}, lambda: text)


@app.command("attach")
def attach(
    volume: VolumeArgument,
    *,
    state: StateOption,
    front_end: Annotated[
        str, typer.Option("--front-end", metavar="ID", help="Where to.", show_default="control chooses")
    ] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take it away from another front-end.")] = False,
    wait: WaitOption = 60.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Attach a volume to a front-end, wait until NBD clients can use it, and say how."""
    request = pb.AttachVolumeRequest(volume=volume, front_end=front_end, read_only=read_only, force=force)
    _attach(request, find_control(control, state), wait, output)


@app.command("detach")
def detach(
    volume: VolumeArgument,
    *,
    state: StateOption,
    force: Annotated[
        bool, typer.Option("--force", help="Although the front-end does not answer; the next attachment fences it.")
    ] = False,
    wait: WaitOption = 60.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Detach a volume; its NBD clients are disconnected, once what they have in flight is answered.

    A client that takes its time keeps it for as long as its front-end lets it (`cairn nbd run --drain-s`).
    """
    request = pb.DetachVolumeRequest(volume=volume, force=force)

    async def work(client: ControlClient) -> pb.Volume:
        with progress(f"detaching {volume}") as update:
            answer = await client.call(client.stub.DetachVolume, request)
            return await until_detached(client, answer, wait, update)

    _show(run_with_control(find_control(control, state), work), output)


@app.command("resize")
def resize(
    volume: VolumeArgument,
    size: SizeOption,
    state: StateOption,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a volume larger, also while it is attached; what is new reads as zeroes.

    Beyond the size of a segment it gets further ones, on the nodes that have the most room. NBD clients see the new
    size when they connect again.
    """
    request = pb.ResizeVolumeRequest(volume=volume, size_bytes=size)
    address = find_control(control, state)
    _show(run_with_control(address, lambda client: client.call(client.stub.ResizeVolume, request)), output)


app.command("scrub")(scrub.scrub)


@app.command("recover")
def recover(
    volume: VolumeArgument,
    *,
    state: StateOption,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what is missing. There is no way back.")
    ] = False,
    wait: WaitOption = 60.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Bring back a volume in `error`, whose members together may lack writes that were acknowledged.

    Without --accept-loss it only says what may be missing, and what is left.
    """
    address = find_control(control, state)
    health = run_with_control(address, lambda client: recovery_needed(client, volume))
    if not accept_loss:
        if output is Output.TABLE:
            print_table(tables.volume_health([health]))
        raise Conflict(
            f"{volume}: {health.volume.reason or 'writes that were acknowledged may be missing'}; if nodes are down, "
            "start them first; `cairn volume recover --accept-loss` goes on with what is left, for good"
        )
    say(f"{volume}: going on without what may be missing ({health.volume.reason or 'no reason known'})")
    _attach(pb.AttachVolumeRequest(volume=volume, force=True, accept_loss=True), address, wait, output)


def _attach(request: pb.AttachVolumeRequest, address: str, wait_s: float, output: Output) -> None:
    with progress(f"attaching {request.volume}") as update:
        found = run_with_control(address, lambda client: attach_and_wait(client, request, wait_s, update))
    commands = nbd_uri.commands(list(found.attachment.uris))
    document = {**documents.volume(found), "commands": commands}
    show(output, document, lambda: tables.attached(found, commands))


def _show(volume: pb.Volume, output: Output) -> None:
    show(output, documents.volume(volume), lambda: tables.volume(volume))
