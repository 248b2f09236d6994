"""`cairn key`: what protects the data key of the object store."""

from pathlib import Path
from typing import Annotated

import typer

from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption
from blockstore.cli.screen import show
from blockstore.cli.store_client import StoreClient, run_with_store
from blockstore.errors import InvalidRequest
from blockstore.rpc import snapshot_pb2 as pb

app = typer.Typer(help="Keys: what protects the data key of the object store.", no_args_is_help=True)

#: scrypt takes its time on purpose.
_ROTATE_TIMEOUT_S = 120.0


@app.callback()
def _noun() -> None:
    """A noun has verbs, also where there is one only."""


@app.command("rotate")
def rotate(
    *,
    state: StateOption,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(
            "--new-passphrase-file",
            metavar="FILE",
            help="Its first line is the new passphrase, where one is used; snapshotd needs it at its next start.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Protect the data key by a new key (or passphrase); no pack is touched.

    Keep the keyring file, or the passphrase, in two other places: without it nobody reads the snapshots.
    """
    request = pb.RotateKeyRequest(new_passphrase=_first_line(new_passphrase_file) if new_passphrase_file else "")

    async def work(store: StoreClient) -> pb.RotateKeyResponse:
        return await store.call(store.stub.RotateKey, request, _ROTATE_TIMEOUT_S)

    done = run_with_store(find_control(control, state), work)
    text = (
        f"key {done.key} protects {done.rewrapped} data key{'s' if done.rewrapped != 1 else ''} now: "
        "copy the keyring file (or the passphrase) to where you keep its backup"
    )
    show(output, {"key": done.key, "rewrapped": done.rewrapped}, lambda: text)


def _first_line(path: Path) -> str:
    lines = path.read_text().splitlines()
    if not lines or not lines[0]:
        raise InvalidRequest(f"{path} is empty: its first line is to be the new passphrase")
    return lines[0]
