"""The catalog's records as bytes: JSON, one object for a dataclass, with a format version.

JSON, because an operator can read it in a metastore of any kind; the field names of
blockstore/control/records.py are the stored format. A field that a stored record lacks takes its
default, so that fields may be added; one that this program does not know, or a newer version, is
refused: dropping it on the next write would lose it.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Final, TypeVar

from blockstore.errors import Corrupt

FORMAT_VERSION: Final = 1
_VERSION_FIELD: Final = "format_version"

Record = TypeVar("Record")


def encode(record: Any) -> bytes:
    """The bytes of a dataclass of numbers, texts, enums, tuples, string maps and further dataclasses."""
    return json.dumps({_VERSION_FIELD: FORMAT_VERSION, **_to_json(record)}, separators=(",", ":")).encode()


def decode(kind: type[Record], stored: bytes) -> Record:
    """The reverse of encode. Raises Corrupt where `stored` is no such record."""
    try:
        fields = json.loads(stored)
        version = fields.pop(_VERSION_FIELD)
        if version != FORMAT_VERSION:
            raise Corrupt(
                f"a {kind.__name__} of format {version}; this program reads {FORMAT_VERSION}: use a newer one"
            )
        record: Record = _from_json(kind, fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"a stored {kind.__name__} cannot be read: {error}") from error
    return record


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: _to_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _from_json(kind: Any, value: Any) -> Any:
    """`value`, as json.loads gives it, as the annotation `kind` says."""
    kind = getattr(kind, "__supertype__", kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _from_json(arguments[0], value)
    if origin is tuple:
        return tuple(_from_json(arguments[0], each) for each in value)
    if hasattr(kind, "__dataclass_fields__"):
        hints = _hints(kind)
        return kind(**{name: _from_json(hints[name], each) for name, each in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    expected = dict if origin is not None else kind
    if not isinstance(value, expected):
        raise TypeError(f"{value!r} is no {expected.__name__}")
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
