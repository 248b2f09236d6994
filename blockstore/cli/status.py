"""`cairn status`: what is healthy, what is degraded, and why."""

import asyncio
import sys
from collections.abc import Callable
from typing import Annotated, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from blockstore.cli import documents, tables
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption
from blockstore.cli.screen import console, print_table, say, show
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb

_WATCH_S: Final = 1.0
"""Processes report to control once a second: more often would show the same."""

Answer = pb.StatusResponse | CairnError
"""What control said, or why it did not."""


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
    """Goes on while control is away, and says so."""
    if output is Output.TABLE and sys.stdout.isatty():
        with Live(console=console(sys.stdout), screen=True, auto_refresh=False) as live:
            await _each_second(client, lambda answer: live.update(_table(answer), refresh=True))
    elif output is Output.TABLE:
        await _each_second(client, lambda answer: print_table(Group(_table(answer), Text())))
    else:
        await _each_second(client, _print_line)


async def _each_second(client: ControlClient, show_one: Callable[[Answer], None]) -> None:
    while True:
        try:
            show_one(await client.status())
        except QuorumUnavailable as error:
            show_one(error)
        await asyncio.sleep(_WATCH_S)


def _table(answer: Answer) -> RenderableType:
    return Text(str(answer)) if isinstance(answer, CairnError) else tables.status(answer)


def _print_line(answer: Answer) -> None:
    if isinstance(answer, CairnError):
        say(f"cairn: {answer}")
    else:
        print(documents.text_of(documents.status(answer), compact=True), flush=True)
