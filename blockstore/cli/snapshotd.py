"""`cairn snapshotd`: the process between volumes and the object store."""

import typer

from blockstore.cli.daemons import run_daemon
from blockstore.cli.options import settings_command
from blockstore.config import SnapshotdSettings

app = typer.Typer(
    help="snapshotd: ships snapshots to the object store, and serves what is restored from it.", no_args_is_help=True
)


@app.callback()
def _noun() -> None:
    """A noun has verbs, also where there is one only."""


app.command("run")(
    settings_command(
        SnapshotdSettings,
        lambda settings: run_daemon("snapshotd", settings),
        "Run snapshotd in the foreground, until SIGTERM or Ctrl-C. "
        "Credentials of an S3 store come from the environment or AWS's files.",
    )
)
