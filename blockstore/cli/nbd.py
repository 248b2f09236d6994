"""`cairn nbd`: the front-end, which serves volumes to NBD clients."""

import typer

from blockstore.cli.daemons import run_daemon
from blockstore.cli.options import settings_command
from blockstore.config import FrontEndSettings

app = typer.Typer(help="Front-ends: serve attached volumes to NBD clients.", no_args_is_help=True)


@app.callback()
def _noun() -> None:
    """A noun has verbs, also where there is one only."""


app.command("run")(
    settings_command(
        FrontEndSettings,
        lambda settings: run_daemon("nbd", settings),
        "Run a front-end in the foreground, until SIGTERM or Ctrl-C.",
    )
)
