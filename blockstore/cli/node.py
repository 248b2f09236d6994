"""`cairn node`: the processes that hold replicas, and their data."""

from pathlib import Path
from typing import Annotated

import typer

from blockstore.cli import documents, node_check, repair, tables
from blockstore.cli.client import run_with_control
from blockstore.cli.control_address import find_control
from blockstore.cli.daemons import run_daemon
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, settings_command
from blockstore.cli.screen import show
from blockstore.config import NodeSettings
from blockstore.errors import Corrupt
from blockstore.rpc import control_pb2 as pb

app = typer.Typer(
    help="""Nodes: the processes that hold replicas.

    A node that is started (`cairn node run`) adds itself; `cairn volume rebalance` then moves replicas to it.
    """,
    no_args_is_help=True,
)

app.command("drain")(repair.drain)
app.command("repair")(repair.repair)


@app.command("list")
def list_nodes(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """List all nodes that ever registered."""
    address = find_control(control, state)
    found = run_with_control(address, lambda client: client.whole(client.stub.ListNodes, pb.ListNodesRequest())).nodes
    show(output, documents.nodes(list(found)), lambda: tables.nodes(list(found)))


@app.command("show")
def show_node(
    node: repair.NodeArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Show one node."""
    address = find_control(control, state)
    found = run_with_control(address, lambda client: client.call(client.stub.GetNode, pb.GetNodeRequest(node=node)))
    show(output, documents.node(found), lambda: tables.node(found))


@app.command("remove")
def remove_node(
    node: repair.NodeArgument, state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Forget a node that is down and holds no replica: move those away before with `cairn node drain`.

    There is no `node add`: a node registers by itself when it starts, and gets new volumes; `cairn volume rebalance`
    moves some of those that are there already.
    """
    address = find_control(control, state)
    run_with_control(address, lambda client: client.call(client.stub.RemoveNode, pb.RemoveNodeRequest(node=node)))
    show(output, {"id": node, "removed": True}, lambda: f"{node} is removed")


@app.command("check")
def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data directory of a stopped node.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Verify all that a stopped node stores; exit code 9 where something is wrong.

    Nothing is changed. Every journal group, table and block is read and compared with its checksum.
    """
    report = node_check.run(data)
    show(output, node_check.document(report), lambda: node_check.table(report))
    if report.problems:
        count = len(report.problems)
        raise Corrupt(f"{data} has {count} problem{'s' if count > 1 else ''}: see above what to do")


app.command("run")(
    settings_command(
        NodeSettings,
        lambda settings: run_daemon("node", settings),
        "Run a node in the foreground, until SIGTERM or Ctrl-C.",
    )
)
