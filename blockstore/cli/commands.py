"""What `cairn` understands: its nouns, each imported when it is used.

The help of `cairn` itself, and what the shell offers for its first word, need all that they show; a command needs
its own module and no other.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_group

from blockstore.cli.ending import EXIT_INTERRUPTED, fail

#: By the command's name: its module in blockstore.cli, and there the function, or the app with the noun's verbs.
_COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "up": ("up", "up"),
    "down": ("up", "down"),
    "demo": ("demo", "demo"),
    "status": ("status", "status"),
    "attach": ("host", "attach"),
    "detach": ("host", "detach"),
    "units": ("units", "units"),
    "man": ("man", "man"),
    **{
        noun: (noun, "app")
        for noun in ("volume", "snapshot", "store", "key", "node", "pki", "control", "nbd", "snapshotd")
    },
}
#: Of each app: typer's own pages would be another style than the rest of what we print.
_PLAIN: Final[Mapping[str, Any]] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}


class _Commands(Mapping[str, Any]):
    """typer's command of each name, made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _make(*_COMMANDS[name], name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


def _make(module: str, attribute: str, name: str) -> Any:
    found = getattr(import_module(f"blockstore.cli.{module}"), attribute)
    app = typer.Typer(**_PLAIN)
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)
    return get_group(app).commands[name]


class _Group(TyperGroup):
    """`cairn` itself."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands()  # type: ignore[assignment]  # typer's own fill theirs later; nobody adds to ours

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names alone: typer's would make each of them."""
        return list(_COMMANDS)


app = typer.Typer(
    name="cairn",
    cls=_Group,
    help="Cairn, a distributed block store: replicated volumes over NBD.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_PLAIN,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - with all that it imports, for this alone

        print(f"cairn {version('cairn')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the noun. --debug is looked for by `run`, which also sees errors of parsing."""


def run(arguments: list[str], debug: bool) -> int:
    """Run one command; the exit code. Raises what it raises, but for a line that makes no sense."""
    try:
        code: int = app(arguments, prog_name="cairn", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _refuse(error, debug)
    except typer.Abort:
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:  # typer takes the signal for itself, and says nothing
        fail("interrupted", code, debug)
    return code


def _refuse(error: typer.TyperException, debug: bool) -> int:
    """A command that makes no sense as written; a noun without a verb is answered with its help."""
    message = error.format_message()
    context: typer.Context | None = getattr(error, "ctx", None)
    if "\n" in message:
        print(message, file=sys.stderr, flush=True)
        return error.exit_code
    where = f"; see `{context.command_path} -h`" if context else ""
    return fail(message.rstrip(".") + where, error.exit_code, debug)
