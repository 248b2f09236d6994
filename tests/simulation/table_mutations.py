"""Rules of the tables and of the shell around them, broken on purpose: fills, sources, pins, failed checkpoints.

The simulation has these as a model (tests/simulation/model_tables.py, node.py), which test_simulation_model
holds against the real tables. What is shown here is that the checks would notice.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from blockstore.record import Operation, OperationKind, Record
from blockstore.units import Generation, Sequence
from tests.simulation.model_tables import MetaCopy, Tables
from tests.simulation.node import Node

Patch = tuple[Any, str, Any]
"""Of what, which attribute, and what stands there instead."""


def _layer_of_the_guest(record: Record, operation: Operation) -> Generation:
    return record.generation


def _zeroes_cover_no_source(kind: OperationKind, *, filling: bool, source: bool) -> bool:
    return filling


def _discards_leave_no_tombstone(kind: OperationKind, *, filling: bool, source: bool) -> bool:
    return (filling or source) and kind is not OperationKind.DISCARD


def _delta_without_fills(tables: Tables, since: Sequence) -> list[int]:
    return sorted({extent for (generation, extent), highest in tables.rows.items() if generation and highest > since})


_WRITE_META: Final = Tables._write_meta
_MERGE: Final = Tables.merge
_CHECKPOINT: Final = Tables.checkpoint


def _keep_the_source(tables: Tables, meta: MetaCopy, stated: int) -> None:
    """Also where the peer's has ended."""
    had = tables.source
    _WRITE_META(tables, meta, stated)
    tables.source = tables.source or had


def _forget_that_it_ended(tables: Tables, meta: MetaCopy, stated: int) -> None:
    tables.hydrated = False
    _WRITE_META(tables, meta, stated)


def _merge_whatever_is_pinned(tables: Tables) -> bool:
    pins, tables.pins = tables.pins, {}
    try:
        return _MERGE(tables)
    finally:
        tables.pins = pins


def _merge_while_filling(tables: Tables) -> bool:
    image = tables.image
    tables.image = replace(image, filling=None)
    try:
        return _MERGE(tables)
    finally:
        tables.image = image


def _merge_zeroes_over_a_source(tables: Tables) -> bool:
    source, tables.source = tables.source, False
    try:
        return _MERGE(tables)
    finally:
        tables.source = source


def _seal_without_pin(tables: Tables, image: Any, mark: int, records: Iterable[Record]) -> None:
    held = set(tables.pins)
    due = list(records)
    _CHECKPOINT(tables, image, mark, due)
    pinned = {(int(o.start), o.argument) for r in due for o in r.operations if o.kind is OperationKind.PIN}
    tables.pins = {pin: at for pin, at in tables.pins.items() if pin in held | pinned}


TABLE_MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "let_fills_cover_the_guest": ((Record, "generation_of", _layer_of_the_guest),),
    "let_the_source_shine_through_a_trim": ((Tables, "covers", staticmethod(_zeroes_cover_no_source)),),
    "let_a_copy_win_over_a_live_discard": ((Tables, "covers", staticmethod(_discards_leave_no_tombstone)),),
    "leave_fills_out_of_a_delta": ((Tables, "delta_extents", _delta_without_fills),),
    "keep_a_source_that_ended_at_the_peer": ((Tables, "_write_meta", _keep_the_source),),
    "forget_while_filling_that_the_source_ended": ((Tables, "_write_meta", _forget_that_it_ended),),
    "merge_what_is_pinned": ((Tables, "merge", _merge_whatever_is_pinned),),
    "merge_while_filling": ((Tables, "merge", _merge_while_filling),),
    "merge_zeroes_over_a_source": ((Tables, "merge", _merge_zeroes_over_a_source),),
    "seal_without_a_pin": ((Tables, "checkpoint", _seal_without_pin),),
    "forget_what_waited_for_a_failed_checkpoint": ((Node, "FOLLOWS_A_FAILURE", False),),
}
