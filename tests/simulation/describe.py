"""Short forms of messages, entries and records, for traces that people read."""

import dataclasses
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from blockstore.domain import Position
from blockstore.log import UNKNOWN_FLOOR, RecordEntry
from blockstore.record import Operation, OperationKind, Record
from tests.simulation.model_tables import values_of


def describe(value: Any) -> str:
    """2.17 is a position; [2.17<2.16 g1 WRITE 3+1=44] a record; others show what differs from the default."""
    for kind, describes in _KINDS.items():
        if isinstance(value, kind):
            return describes(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f"{field.name}={describe(getattr(value, field.name))}" for field in _telling(value)]
        return f"{type(value).__name__}({', '.join(shown)})"
    return repr(value)


def _position(position: Position) -> str:
    return "unknown" if position == UNKNOWN_FLOOR else f"{position.epoch}.{position.sequence}"


def _record(record: Record) -> str:
    operations = " ".join(map(_operation, record.operations))
    return f"[{_position(record.position)}<{_position(record.previous)} g{record.generation} {operations}]"


def _operation(operation: Operation) -> str:
    name = operation.kind.name
    if operation.kind in (OperationKind.WRITE, OperationKind.FILL):
        return f"{name} {operation.start}+{operation.count}={values_of(operation)[0]}"
    if operation.on_blocks:
        return f"{name} {operation.start}+{operation.count}"
    return name


def _telling(value: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(value) if getattr(value, field.name) != field.default]


def _name(name: str) -> str:
    return name if not name.startswith("rep-") else f"rep-{int(name[4:], 16)}"


_KINDS: Final[dict[type, Callable[[Any], str]]] = {
    Position: _position,
    RecordEntry: lambda entry: _record(entry.record),
    Record: _record,
    Operation: _operation,
    Enum: lambda member: str(member.name),
    str: _name,
    float: lambda number: f"{number:.4g}",
    tuple: lambda values: f"({', '.join(map(describe, values))})",
    list: lambda values: f"[{', '.join(map(describe, values))}]",
}
