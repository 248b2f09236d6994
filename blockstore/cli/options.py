"""Options that several commands share, and those that are made from a daemon's settings.

A daemon's options come from the fields of its settings (blockstore.config): name, default, help and
type are written there and nowhere else. Bounds are checked by the settings themselves.
"""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from blockstore.cli.settings import CONTROL_VARIABLE, STATE_VARIABLE, Settings, fields_of, variable_of
from blockstore.config import option_name, split_addresses
from blockstore.errors import InvalidRequest
from blockstore.units import parse_size


class Output(Enum):
    """How a command writes what it has to tell."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="A table for people, or JSON with stable keys for programs.")
]
ControlOption = Annotated[
    str | None,
    typer.Option(
        "--control",
        envvar=CONTROL_VARIABLE,
        metavar="HOST:PORT,...",
        help="Address of control, or of each of several; without it the cluster of --state, if one was started there, "
        "else 127.0.0.1:7300.",
        show_default=False,
    ),
]


def default_state_directory() -> Path:
    """Where `cairn up` keeps a cluster unless told otherwise (XDG Base Directory Specification, state)."""
    base = Path.home() / ".local" / "state"
    return Path(os.environ.get("XDG_STATE_HOME") or base) / "cairn"


StateOption = Annotated[
    Path,
    typer.Option(
        "--state",
        envvar=STATE_VARIABLE,
        help="Directory of a cluster that `cairn up` runs.",
        file_okay=False,
        default_factory=default_state_directory,
        show_default="~/.local/state/cairn",
    ),
]


StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where snapshots go: a directory, or s3://BUCKET/PREFIX with credentials from the environment.",
        show_default="as before, else `store` in the state directory",
    ),
]
S3EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--s3-endpoint",
        metavar="URL",
        help="Of an S3 server other than Amazon's, such as http://127.0.0.1:9000.",
        show_default="as before",
    ),
]


def size_bytes(text: str) -> int:
    """The option's value in bytes. Raises BadParameter."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def size_option(help_text: str, shown_default: str | bool = True) -> Any:
    """--size, in bytes. shown_default: what `--help` calls the default, where that is no fixed one."""
    return typer.Option("--size", "-s", metavar="SIZE", parser=size_bytes, help=help_text, show_default=shown_default)


def a_number(value: float | None) -> float | None:
    """The option's value, unless it is NaN, which passes any bounds: a callback. Raises BadParameter."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter(f"{value} is no number")
    return value


def rate_bytes(text: str) -> int:
    """The option's value in bytes a second; "/s" may be written or not. Raises BadParameter."""
    return size_bytes(text.removesuffix("/s"))


def key_values(texts: list[str], option: str) -> dict[str, str]:
    """KEY=VALUE texts as a mapping. Raises InvalidRequest, also for a key that is there twice."""
    pairs = [text.partition("=") for text in texts]
    seen: set[str] = set()
    for (key, equals, _), text in zip(pairs, texts, strict=True):
        if not equals or not key:
            raise InvalidRequest(f"{option} {text!r}: write it as KEY=VALUE")
        if key in seen:
            raise InvalidRequest(f"{option} {text!r}: {key} is given twice")
        seen.add(key)
    return {key: value for key, _, value in pairs}


def checked_addresses(text: str) -> str:
    """`text`, if it is HOST:PORT, or several with commas between them. Raises InvalidRequest."""
    return ",".join(split_addresses(text))


def settings_command(kind: type[Settings], run: Callable[[Settings], int], text: str) -> Callable[..., int]:
    """A command with one option for each field of the dataclass `kind`; it hands what was given to `run`.

    run: returns the exit code. text: the command's help.
    """

    def command(**values: Any) -> int:
        return run(kind(**values))

    command.__doc__ = text
    command.__signature__ = inspect.Signature([_parameter(each) for each in fields_of(kind)])  # type: ignore[attr-defined]
    return command


def _parameter(each: "dataclasses.Field[Any]") -> inspect.Parameter:
    is_size = each.metadata["size"]
    option = typer.Option(
        option_name(each.name),
        help=each.metadata["help"],
        envvar=variable_of(each.name),
        parser=size_bytes if is_size else None,
        metavar="SIZE" if is_size else None,
        show_default=_size_text(each.default) if is_size else True,
    )
    # Given as text, so that typer's parser sees what a user would have written.
    default = str(each.default) if is_size else each.default
    annotation = Annotated[each.type, option]  # type: ignore[name-defined]
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _size_text(size: Any) -> str:
    """The shortest way to write `size` that parse_size reads back."""
    for suffix, unit in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
