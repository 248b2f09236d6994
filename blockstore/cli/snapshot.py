"""`cairn snapshot`: the content of volumes at one instant, in object storage.

Here is what control answers; what snapshotd does with their content is in snapshot_content.py.
"""

import secrets
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from blockstore.cli import snapshot_content, snapshot_documents, snapshot_tables
from blockstore.cli.client import CALL_TIMEOUT_S, ControlClient, run_with_control
from blockstore.cli.completion import complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.following import refuse_failed, until_ended
from blockstore.cli.hooks import Hooks
from blockstore.cli.lineage import lineage
from blockstore.cli.meters import meters
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, a_number, key_values
from blockstore.cli.screen import say, show
from blockstore.cli.snapshot_options import DescriptionOption, SnapshotArgument, SnapshotArguments, TagOption
from blockstore.cli.store_client import store_connected
from blockstore.config import MAX_TIME_S
from blockstore.errors import CairnError, InvalidRequest, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from nbd_server import uri as nbd_uri

#: What the request can say; nobody has more.
_MOST_LISTED: Final = 2**32 - 1

app = typer.Typer(help="Snapshots: the content of volumes at one instant, in object storage.", no_args_is_help=True)
app.add_typer(snapshot_content.app)

#: Two hooks that flush a database or freeze a file system take seconds; nobody's I/O stands still for minutes.
_HOOK_TIMEOUT_S: Final = 30.0
_MOST_HOOK_TIMEOUT_S: Final = 3600.0


@app.command("create")
def create(
    volumes: Annotated[
        list[str],
        typer.Argument(
            metavar="VOLUME",
            help="Ids or names; several are snapshots of one instant.",
            autocompletion=complete_volume,
        ),
    ],
    *,
    state: StateOption,
    description: DescriptionOption = "",
    tag: TagOption = None,
    pre: Annotated[
        str, typer.Option("--pre", metavar="CMD", help="Shell command to run before, such as fsfreeze -f /srv.")
    ] = "",
    post: Annotated[
        str, typer.Option("--post", metavar="CMD", help="Shell command to run after, in any case: fsfreeze -u /srv.")
    ] = "",
    hook_timeout: Annotated[
        float,
        typer.Option(
            "--hook-timeout",
            metavar="SECONDS",
            help="Most that each hook, and the sealing between, takes.",
            min=0.1,
            max=_MOST_HOOK_TIMEOUT_S,
            callback=a_number,
        ),
    ] = _HOOK_TIMEOUT_S,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Return when it is whole in the object store, and show how far it is.")
    ] = False,
    client_token: Annotated[
        str, typer.Option("--client-token", help="A second request with the same token gives the same snapshots.")
    ] = "",
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a snapshot of one volume, or of several at one instant; volumes stay in use.

    It returns when the content is fixed; shipping to the object store goes on behind it. --pre runs before,
    and nothing is done where it fails; --post runs after, also on failure and Ctrl-C. A hook that takes too
    long is killed, so that the application's I/O goes on.
    """
    request = pb.CreateSnapshotRequest(
        volumes=volumes,
        description=description,
        tags=key_values(tag or [], "--tag"),
        client_token=client_token or secrets.token_hex(16),
    )
    address = find_control(control, state)
    hooks = Hooks(pre, post, hook_timeout, {"CAIRN_VOLUMES": " ".join(volumes)})
    found = hooks.around(lambda: _create(address, request, hook_timeout if hooks else CALL_TIMEOUT_S))
    if wait:
        pending = [each.id for each in found if each.state == pb.SNAPSHOT_STATE_PENDING]
        ended = {each.id: each for each in _until_ended(address, pending, 0)}
        found = [ended.get(each.id, each) for each in found]
    _show_all(found, output)
    refuse_failed(found)


def _create(address: str, request: pb.CreateSnapshotRequest, limit_s: float) -> list[pb.Snapshot]:
    """What control made. Raises QuorumUnavailable, with what to look at, where it did not say in time."""

    async def work(client: ControlClient) -> list[pb.Snapshot]:
        try:
            answer = await client.call(client.snapshots.CreateSnapshot, request, limit_s)
        except QuorumUnavailable as error:
            raise QuorumUnavailable(
                f"{error}; the snapshot may come to be all the same, see `cairn snapshot list`: where the volumes' "
                "application was held still for it, delete that one and take another"
            ) from error
        return list(answer.snapshots)

    return run_with_control(address, work)


@app.command("list")
def list_snapshots(
    *,
    state: StateOption,
    volume: Annotated[
        str,
        typer.Option("--volume", help="Only those of this volume.", autocompletion=complete_volume, show_default=False),
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, max=_MOST_LISTED, help="Only so many, the newest.", show_default="all"),
    ] = None,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List snapshots, of all volumes or of one, the oldest first."""
    _show_all(run_with_control(find_control(control, state), lambda client: _listed(client, volume, limit)), output)


@app.command("show")
def show_snapshot(
    snapshot: SnapshotArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Show one snapshot: state and progress, sizes, what needs it, and how to look into it without a restore.

    A front-end shows any snapshot to NBD clients that ask for its id: read-only, or, with +rw behind the id, as a
    clone of the connection's own, whose changes are gone when it ends.
    """
    found = run_with_control(find_control(control, state), lambda client: client.snapshot(snapshot))
    commands = nbd_uri.snapshot_commands(list(found.uris))
    document = {**snapshot_documents.snapshot(found), "commands": commands}
    show(output, document, lambda: snapshot_tables.snapshot(found, commands))


@app.command("tree")
def tree(
    *,
    state: StateOption,
    volume: Annotated[
        str,
        typer.Option("--volume", help="Only those of this volume.", autocompletion=complete_volume, show_default=False),
    ] = "",
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Draw which snapshot is a change of which, with what each holds.

    Logical bytes are what a restore brings back; own bytes are freed by deleting this snapshot (and
    `cairn store prune`), shared ones are needed by others as well. Each snapshot is whole by itself: any may go.
    """

    async def work(client: ControlClient) -> tuple[list[pb.Snapshot], dict[str, pb.SnapshotUsage]]:
        found = await _listed(client, volume)
        return found, await _usage(client) if found else {}

    found, usage = run_with_control(find_control(control, state), work)
    document = {
        "snapshots": [
            {
                **snapshot_documents.snapshot(row.snapshot),
                **snapshot_documents.usage(usage.get(row.snapshot.id)),
                "depth": row.depth,
            }
            for row in lineage(found)
        ]
    }
    show(output, document, lambda: snapshot_tables.tree(found, usage))


async def _usage(client: ControlClient) -> dict[str, pb.SnapshotUsage]:
    """What each snapshot holds in the object store, by id; nothing where no snapshotd says, which is told."""
    last = pb.StoreStatisticsResponse()
    try:
        with meters() as show_work:
            async with store_connected(client) as store:
                async for answer in store.work(store.stub.StoreStatistics, pb.StoreStatisticsRequest(), show_work):
                    last = answer
    except QuorumUnavailable as error:
        say(f"cairn: sizes are not known: {error}")
        return {}
    return {each.snapshot: each for each in last.snapshots}


@app.command("wait")
def wait_for_snapshots(
    snapshots: SnapshotArguments,
    *,
    state: StateOption,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="Most to wait; 0: for ever.",
            min=0,
            max=MAX_TIME_S,
            callback=a_number,
        ),
    ] = 0.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Wait until snapshots are whole in the object store; exit code 5 where one is in error."""
    found = _until_ended(find_control(control, state), snapshots, timeout)
    _show_all(found, output)
    refuse_failed(found)


@app.command("delete")
def delete(
    snapshots: SnapshotArguments,
    *,
    state: StateOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, also not at a terminal.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete snapshots; no other snapshot is touched. `cairn store prune` then frees what nothing needs any more.

    Where one of them is not there, none is deleted. One that a volume still hydrates from stays `deleting` until that
    has all of it.
    """
    chosen = list(dict.fromkeys(snapshots))
    names = ", ".join(chosen)
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Delete {names} for good?", err=True):
        say("nothing was deleted")
        raise typer.Exit(1)

    _show_all(run_with_control(find_control(control, state), lambda client: _delete(client, chosen)), output)


async def _delete(client: ControlClient, snapshots: Sequence[str]) -> list[pb.Snapshot]:
    """What is deleted, all of them. The error of one that is not says which were before it."""
    for each in snapshots:
        await client.snapshot(each)
    deleted: list[pb.Snapshot] = []
    for each in snapshots:
        try:
            deleted.append(await client.call(client.snapshots.DeleteSnapshot, pb.DeleteSnapshotRequest(snapshot=each)))
        except CairnError as error:
            if not deleted:
                raise
            raise type(error)(f"{error}; deleted before that: {', '.join(one.id for one in deleted)}") from error
    return deleted


@app.command("retry")
def retry(
    snapshot: SnapshotArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Ship a snapshot again that is in error; what is in the object store already is not sent again."""
    request = pb.RetrySnapshotRequest(snapshot=snapshot)
    address = find_control(control, state)
    found = run_with_control(address, lambda client: client.call(client.snapshots.RetrySnapshot, request))
    show(output, snapshot_documents.snapshot(found), lambda: snapshot_tables.snapshot(found))


async def _listed(client: ControlClient, volume: str, limit: int | None = None) -> list[pb.Snapshot]:
    request = pb.ListSnapshotsRequest(volume=volume, limit=limit or 0)
    return list((await client.whole(client.snapshots.ListSnapshots, request)).snapshots)


def _until_ended(address: str, snapshots: Sequence[str], limit_s: float) -> list[pb.Snapshot]:
    if len(set(snapshots)) != len(snapshots):
        raise InvalidRequest(f"{', '.join(snapshots)}: name each snapshot once")
    with meters() as progress:
        return run_with_control(address, lambda client: until_ended(client, snapshots, limit_s, progress))


def _show_all(snapshots: Sequence[pb.Snapshot], output: Output) -> None:
    show(output, snapshot_documents.snapshots(snapshots), lambda: snapshot_tables.snapshots(snapshots))
