"""A daemon's settings as text: the names of its options, the environment variables beside them, values to and fro.

All comes from the fields of the settings (blockstore.config). Nothing here needs typer, which with what it
imports takes longer than all else that a daemon does until it serves: a daemon's command line is read without
it where it is as plain as `cairn up` writes it (`read_plain_options`).
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, Final, TypeVar, cast, get_args

from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, SnapshotdSettings, option_name
from blockstore.errors import InvalidRequest
from blockstore.units import parse_size

CONTROL_VARIABLE: Final = "CAIRN_CONTROL"
STATE_VARIABLE: Final = "CAIRN_STATE"
PARENT_VARIABLE: Final = "CAIRN_PARENT"
"""The pid of the `cairn up` that started this process: where that ends, this one does too."""
DAEMON_SETTINGS: Final[Mapping[str, type[Any]]] = {
    "control": ControlSettings,
    "node": NodeSettings,
    "nbd": FrontEndSettings,
    "snapshotd": SnapshotdSettings,
}
"""What each daemon's `run` takes, by the daemon's name."""

Settings = TypeVar("Settings")


def fields_of(kind: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """One for each option of `kind`."""
    return dataclasses.fields(kind)


def variable_of(name: str) -> str | None:
    """The environment variable that sets the option as well: where a unit file names it once for several daemons."""
    if name == "control":
        return CONTROL_VARIABLE
    return f"CAIRN_{name.upper()}" if name.startswith("metastore") else None


def environment_without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What the processes of `cairn up` inherit: their settings stand in their command lines, which leave defaults out.

    Else a CAIRN_CONTROL or CAIRN_METASTORE of the shell would lead them into another cluster.
    """
    settings = {variable_of(each.name) for kind in DAEMON_SETTINGS.values() for each in fields_of(kind)}
    return {name: value for name, value in environment.items() if name not in settings}


def read_plain_options(kind: type[Settings], arguments: Sequence[str]) -> Settings | None:
    """The settings of a line that is `--option value` throughout, and nothing but options of `kind`.

    None for any other line, and for values that make no sense: typer's parser knows more, and says what is wrong.
    """
    options, values = arguments[::2], arguments[1::2]
    known = {option_name(each.name) for each in fields_of(kind)}
    if len(options) != len(values) or not known.issuperset(options) or any(value.startswith("-") for value in values):
        return None
    try:
        given = dict(setting_from_text(kind, option, value) for option, value in zip(options, values, strict=True))
        return kind(**{**_from_environment(kind), **given})
    except InvalidRequest:
        return None


def _from_environment(kind: type[Any]) -> dict[str, Any]:
    """What variables say; one that is empty says nothing."""
    variables = {each.name: variable_of(each.name) for each in fields_of(kind)}
    texts = {name: os.environ.get(variable, "") for name, variable in variables.items() if variable is not None}
    return dict(setting_from_text(kind, name, text) for name, text in texts.items() if text)


def setting_from_text(kind: type[Any], name: str, text: str) -> tuple[str, Any]:
    """The field of `kind` that `name` (an option's name, dashes or not) means, and `text` as its value.

    Raises InvalidRequest.
    """
    options = {option_name(each.name): each for each in fields_of(kind)}
    each = options.get("--" + name.lstrip("-").replace("_", "-"))
    if each is None:
        known = ", ".join(option.removeprefix("--") for option in options)
        raise InvalidRequest(f"{name!r} is no setting there: it is one of {known}")
    try:
        return each.name, parse_size(text) if each.metadata["size"] else _plain_type(each)(text)
    except ValueError as error:
        raise InvalidRequest(f"{name}={text}: {error}") from error


def _plain_type(each: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    """The type of a field; of one that may be None, the other type."""
    kinds = [kind for kind in get_args(each.type) or (each.type,) if kind is not NoneType]
    (kind,) = kinds  # no option can be of two types
    return cast(Callable[[str], Any], kind)
