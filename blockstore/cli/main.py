"""The `cairn` command: its nouns, and how an error ends it.

An error is one line on stderr that says what to do; the exit code is that of its class
(blockstore.errors). A stack is shown with --debug only, or where the error is none of ours: a defect.
"""

import errno
import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Final

import typer

from blockstore.cli import control, demo, host, key, nbd, node, pki, snapshot, snapshotd, status, store, up, volume
from blockstore.cli.screen import say
from blockstore.errors import CairnError, NoSpace

EXIT_INTERRUPTED: Final = 130
EXIT_DEFECT: Final = 1

app = typer.Typer(
    name="cairn",
    help="Cairn, a distributed block store: replicated volumes over NBD.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("demo")(demo.demo)
app.command("status")(status.status)
app.command("attach")(host.attach)
app.command("detach")(host.detach)
app.add_typer(volume.app, name="volume")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(store.app, name="store")
app.add_typer(key.app, name="key")
app.add_typer(node.app, name="node")
app.add_typer(pki.app, name="pki")
app.add_typer(control.app, name="control")
app.add_typer(nbd.app, name="nbd")
app.add_typer(snapshotd.app, name="snapshotd")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cairn {version('cairn')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the noun. --debug is looked for by `main`, which also sees errors of parsing."""


def run(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    debug = "--debug" in arguments
    try:
        code = app(arguments, prog_name="cairn", standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # typer takes the signal for itself, and says nothing
            say("cairn: interrupted")
        return code
    except typer.TyperException as error:
        return _refuse(error, debug)
    except CairnError as error:
        return _fail(str(error), error.codes.exit_code, debug)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(str(error), NoSpace.codes.exit_code if is_full else EXIT_DEFECT, debug)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED, debug)
    except Exception as error:
        message = f"a defect in cairn, please report it: {type(error).__name__}: {error}"
        return _fail(message, EXIT_DEFECT, debug)


def _refuse(error: typer.TyperException, debug: bool) -> int:
    """A command that makes no sense as written; a noun without a verb is answered with its help."""
    message = error.format_message()
    context: typer.Context | None = getattr(error, "ctx", None)
    if "\n" in message:
        say(message)
        return error.exit_code
    where = f"; see `{context.command_path} -h`" if context else ""
    return _fail(message.rstrip(".") + where, error.exit_code, debug)


def _fail(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say("cairn: " + " ".join(message.split()))
    return exit_code


def main() -> None:
    """The console script."""
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


def _open_closed_streams() -> None:
    """What was closed before we began goes nowhere: else the next file that is opened would get its number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == descriptor, f"{name} was closed, and {os.devnull} is {opened}"
            setattr(sys, name, os.fdopen(opened, "r" if name == "stdin" else "w"))
