"""`cairn control`: the process that keeps the catalog."""

import typer

from blockstore.cli.daemons import run_daemon
from blockstore.cli.options import settings_command
from blockstore.config import ControlSettings

app = typer.Typer(help="Control: keeps the catalog, places replicas, hands out epochs.", no_args_is_help=True)


@app.callback()
def _noun() -> None:
    """A noun has verbs, also where there is one only."""


app.command("run")(
    settings_command(
        ControlSettings,
        lambda settings: run_daemon("control", settings),
        "Run control in the foreground, until SIGTERM or Ctrl-C.",
    )
)
