"""`cairn status`: what is healthy, what is degraded, and why."""

import asyncio
import sys
from typing import Annotated, Final

import typer
from rich.live import Live

from blockstore.cli import documents, tables
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption
from blockstore.cli.screen import console, print_table, show
from blockstore.rpc import control_pb2 as pb

_WATCH_S: Final = 1.0
"""Processes report to control once a second: more often would show the same."""


def status(
    state: StateOption,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again each second, until Ctrl-C.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show health, each replica's lag, and what is degraded and why.

    Ends with exit code 0 whatever the health is: scripts read `healthy` and `problems` of --output json.
    """
    address = find_control(control, state)
    if watch:
        run_with_control(address, lambda client: _watch(client, output))
        return
    answer = run_with_control(address, lambda client: client.status())
    show(output, documents.status(answer), lambda: tables.status(answer))


async def _watch(client: ControlClient, output: Output) -> None:
    if output is Output.TABLE and sys.stdout.isatty():
        with Live(console=console(sys.stdout), screen=True, auto_refresh=False) as live:
            while True:
                live.update(tables.status(await client.status()), refresh=True)
                await asyncio.sleep(_WATCH_S)
    while True:
        _print_once(await client.status(), output)
        await asyncio.sleep(_WATCH_S)


def _print_once(answer: pb.StatusResponse, output: Output) -> None:
    if output is Output.JSON:
        print(documents.text_of(documents.status(answer), compact=True), flush=True)
    else:
        print_table(tables.status(answer))
        print(flush=True)
