"""`cairn volume hydrate`: the background copying of a restored volume's blocks out of the object store."""

from typing import Annotated

import typer

from blockstore.cli import documents, tables
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.completion import complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, rate_bytes
from blockstore.cli.screen import show
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2

app = typer.Typer(
    help="The background copying of a restored volume's blocks; what is read comes first, in any case.",
    no_args_is_help=True,
)

VolumeArgument = Annotated[
    str, typer.Argument(metavar="VOLUME", help="The volume's id or name.", autocompletion=complete_volume)
]


@app.command("pause")
def pause(
    volume: VolumeArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Bring nothing in the background; what is read is fetched all the same."""
    _set(snapshot_pb2.SetHydrationRequest(volume=volume, paused=True), find_control(control, state), output)


@app.command("resume")
def resume(
    volume: VolumeArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Go on in the background."""
    _set(snapshot_pb2.SetHydrationRequest(volume=volume, paused=False), find_control(control, state), output)


@app.command("rate")
def rate(
    volume: VolumeArgument,
    rate: Annotated[
        int, typer.Argument(metavar="RATE", parser=rate_bytes, help="Most bytes a second, like 50M; 0 is no limit.")
    ],
    state: StateOption,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Say how fast the background may be."""
    _set(snapshot_pb2.SetHydrationRequest(volume=volume, rate_bytes=rate), find_control(control, state), output)


def _set(request: snapshot_pb2.SetHydrationRequest, address: str, output: Output) -> None:
    async def work(client: ControlClient) -> pb.Volume:
        return await client.call(client.snapshots.SetHydration, request)

    found = run_with_control(address, work)
    show(output, documents.volume(found), lambda: tables.volume(found))
