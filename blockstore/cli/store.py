"""`cairn store`: the object store in which snapshots are kept."""

from typing import Annotated

import typer

from blockstore.cli import snapshot_documents, snapshot_tables
from blockstore.cli.client import run_with_control
from blockstore.cli.control_address import find_control
from blockstore.cli.meters import meters
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, a_number
from blockstore.cli.screen import show
from blockstore.cli.snapshot_content import distinct, refuse_damage
from blockstore.cli.store_client import StoreClient, run_with_store
from blockstore.errors import QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import format_size

app = typer.Typer(help="The object store, in which snapshots are kept.", no_args_is_help=True)


@app.command("show")
def show_store(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show which object store this cluster uses, and the snapshotd that serves it."""
    address = find_control(control, state)
    found = run_with_control(address, lambda client: client.whole(client.snapshots.GetStore, pb.GetStoreRequest()))
    daemons = list(found.daemons)
    document = {"daemons": [snapshot_documents.daemon(each) for each in daemons]}
    show(output, document, lambda: snapshot_tables.store(daemons))


@app.command("forget")
def forget(
    daemon: Annotated[str, typer.Argument(metavar="DAEMON", help="Its id, sd-…: see `cairn store show`.")],
    *,
    state: StateOption,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Forget a snapshotd that is down and gone for good; one that comes back registers again."""
    request = pb.ForgetDaemonRequest(daemon=daemon)
    run_with_control(find_control(control, state), lambda client: client.call(client.snapshots.ForgetDaemon, request))
    show(output, {"id": daemon, "removed": True}, lambda: f"{daemon} is forgotten")


@app.command("prune")
def prune(
    *,
    state: StateOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what it would do.")] = False,
    repack_share: Annotated[
        float | None,
        typer.Option(
            "--repack-share",
            metavar="SHARE",
            help="Copy what is alive out of a pack where at least this share of it is dead; 0: where anything is.",
            min=0,
            max=1,
            callback=a_number,
            show_default="snapshotd's",
        ),
    ] = None,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Free what no snapshot and no volume needs any more; safe beside everything else."""
    request = pb.PruneRequest(dry_run=dry_run, repack_share=repack_share)

    async def work(store: StoreClient) -> tuple[pb.PrunePlan, bool]:
        plan, done = pb.PrunePlan(), False
        with meters() as show_work:
            async for each in store.work(store.stub.Prune, request, show_work):
                plan = each.plan if each.HasField("plan") else plan
                done = done or each.done
        return plan, done

    plan, done = run_with_store(find_control(control, state), work)
    document = {**snapshot_documents.plan(plan), "dry_run": dry_run, "done": done}
    show(output, document, lambda: snapshot_tables.plan(plan, done))
    if not done and not dry_run:
        raise QuorumUnavailable("the prune ended before it was done: start it again, it goes on from what is there")


@app.command("check")
def check(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """Compare what is in the object store with what should be; exit code 9 where something is missing or damaged.

    Contents are not read: that is `cairn snapshot verify`.
    """

    async def work(store: StoreClient) -> tuple[list[pb.StoreProblem], pb.CheckStoreResponse]:
        problems: list[pb.StoreProblem] = []
        last = pb.CheckStoreResponse()
        with meters() as show_work:
            async for each in store.work(store.stub.CheckStore, pb.CheckStoreRequest(), show_work):
                problems += each.problems
                last = each
        return distinct(problems), last

    problems, last = run_with_store(find_control(control, state), work)
    unneeded = f"{last.unreferenced_objects:,} objects ({format_size(last.unreferenced_bytes)}) that prune would remove"
    document = {
        "ok": not problems,
        "problems": [snapshot_documents.problem(each) for each in problems],
        "unreferenced_objects": last.unreferenced_objects,
        "unreferenced_bytes": last.unreferenced_bytes,
    }
    show(output, document, lambda: snapshot_tables.problems(problems) if problems else f"all is there; {unneeded}")
    refuse_damage(problems)


@app.command("stats")
def stats(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show what is stored: dedupe and compression, and the bytes of each snapshot."""

    async def work(store: StoreClient) -> pb.StoreStatisticsResponse:
        last = pb.StoreStatisticsResponse()
        with meters() as show_work:
            async for each in store.work(store.stub.StoreStatistics, pb.StoreStatisticsRequest(), show_work):
                last = each
        return last

    found = run_with_store(find_control(control, state), work)
    show(output, snapshot_documents.store_statistics(found), lambda: snapshot_tables.store_statistics(found))


@app.command("adopt")
def adopt(
    *,
    state: StateOption,
    force: Annotated[
        bool, typer.Option("--force", help="Take it over from the cluster that owns it, which must be gone for good.")
    ] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make the snapshots in the object store known to this cluster: a lost one is rebuilt from bucket and keys."""

    async def work(store: StoreClient) -> tuple[list[str], list[pb.StoreProblem]]:
        found: list[str] = []
        problems: list[pb.StoreProblem] = []
        with meters() as show_work:
            async for each in store.work(store.stub.Adopt, pb.AdoptRequest(force=force), show_work):
                found += each.snapshots
                problems += each.problems
        return list(dict.fromkeys(found)), distinct(problems)

    found, problems = run_with_store(find_control(control, state), work)
    document = {"snapshots": found, "problems": [snapshot_documents.problem(each) for each in problems]}
    text = f"{len(found)} snapshots are known that were not before: see `cairn snapshot tree`"
    show(output, document, lambda: snapshot_tables.problems(problems) if problems else text)
    refuse_damage(problems)
