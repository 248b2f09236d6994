"""`cairn key`: what protects the data key of the object store."""

from typing import Final

import typer

from blockstore.cli.control_address import find_control
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption
from blockstore.cli.screen import show
from blockstore.cli.store_client import StoreClient, run_with_store
from blockstore.rpc import snapshot_pb2 as pb

app = typer.Typer(help="Keys: what protects the data key of the object store.", no_args_is_help=True)

#: scrypt takes its time on purpose.
_ROTATE_TIMEOUT_S: Final = 120.0


@app.callback()
def _noun() -> None:
    """A noun has verbs, also where there is one only."""


@app.command("rotate")
def rotate(state: StateOption, control: ControlOption = None, output: OutputOption = Output.TABLE) -> None:
    """Wrap the data key by a new key, or by a passphrase that was written above the old one; no pack is touched.

    Copy the keyring file to its backups afterwards: without it nobody reads the snapshots.
    """

    async def work(store: StoreClient) -> pb.RotateKeyResponse:
        return await store.call(store.stub.RotateKey, pb.RotateKeyRequest(), _ROTATE_TIMEOUT_S)

    done = run_with_store(find_control(control, state), work)
    text = f"the data key is wrapped anew by {done.key}: copy that to where you keep its backup, now"
    show(output, {"key": done.key, "rewrapped": done.rewrapped}, lambda: text)
