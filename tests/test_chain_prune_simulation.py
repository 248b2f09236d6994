"""Prunes, writers, readers and deletions interleaved by seed; and each rule of prune, broken on purpose, is caught.

Replay one seed: `SIMULATION_SEED=17 pytest tests/test_chain_prune_simulation.py -k every`.
"""

import asyncio
import os
from collections.abc import Collection
from dataclasses import replace
from typing import Final

import pytest

from blockstore.errors import CairnError
from snapshotd.layout import pack_key, quarantine_key
from snapshotd.prune import Pruner, _View
from snapshotd.prune_plan import Marks, Plan
from snapshotd.repack import Repacked
from tests.chain_simulation import simulate

_SEEDS: Final = 60
#: Schedules in which a broken rule has to show; most show within ten.
_SEEDS_TO_CATCH: Final = 400
_LIMIT_S: Final = 30.0


def _run(seed: int, pruner: type[Pruner] = Pruner, crashes: float = 0.002) -> None:
    try:
        asyncio.run(asyncio.wait_for(simulate(seed, pruner, crashes=crashes), _LIMIT_S))
    except Exception as error:
        error.add_note(f"replay: SIMULATION_SEED={seed} pytest tests/test_chain_prune_simulation.py -k every")
        raise


def test_every_completed_snapshot_reads_back_in_every_schedule() -> None:
    chosen = os.environ.get("SIMULATION_SEED")
    for seed in [int(chosen)] if chosen else range(_SEEDS):
        _run(seed)


def test_schedules_with_many_crashes() -> None:
    for seed in range(1000, 1000 + _SEEDS // 2):
        _run(seed, crashes=0.02)


class _LooksOnce(Pruner):
    """Carries out what it planned before its quarantine was there."""

    _first: _View | None = None

    async def _look(self) -> _View:
        self._first = self._first or await super()._look()
        return self._first


class _NoQuarantine(Pruner):
    """Publishes a quarantine that names nothing."""

    async def _publish(self, number: int, marks: Marks) -> None:
        await super()._publish(number, frozenset())


class _NoNumber(Pruner):
    """Does not raise the prune number."""

    async def _raise(self, expected: int) -> int:
        return expected


class _NoCheck(Pruner):
    """Does not ask for the number before it deletes."""

    async def _check_number(self, raised: int) -> None:
        return


class _DeletesFirst(Pruner):
    """Deletes objects before an index says where their frames are now."""

    async def _write_indexes(self, view: _View, gone: Collection[str], repacked: Repacked) -> set[str]:
        for name in sorted(gone):
            await self.repository.store.delete(pack_key(name))
        return await super()._write_indexes(view, gone, repacked)


class _IgnoresPending(Pruner):
    """Takes the packs of snapshots that are being written for garbage, and does not quarantine them."""

    async def _look(self) -> _View:
        view = await super()._look()
        return replace(view, roots=replace(view.roots, pending=frozenset()))

    async def _publish(self, number: int, marks: Marks) -> None:
        await super()._publish(number, frozenset())


class _TrustsOthers(Pruner):
    """Relies on objects that another prune has condemned."""

    def _foreign(self, view: _View, number: int) -> Marks:
        return frozenset()

    def _plan(self, view: _View, condemned: Marks, allowed: Marks | None) -> Plan:
        return super()._plan(view, frozenset(), allowed)


class _EndsOthers(Pruner):
    """Removes every quarantine, also those of prunes that are at work."""

    async def _end_quarantines(self, view: _View, number: int) -> None:
        for each in (*view.inventory.quarantines, number):
            await self.repository.store.delete(quarantine_key(each))


class _GoesBeyond(Pruner):
    """Deletes in the end what its quarantine does not name."""

    def _plan(self, view: _View, condemned: Marks, allowed: Marks | None) -> Plan:
        return super()._plan(view, condemned, None)

    async def _publish(self, number: int, marks: Marks) -> None:
        await super()._publish(number, frozenset(sorted(marks)[: len(marks) // 2]))


_BROKEN = [
    _LooksOnce,
    _NoQuarantine,
    _NoNumber,
    _NoCheck,
    _DeletesFirst,
    _IgnoresPending,
    _TrustsOthers,
    _EndsOthers,
    _GoesBeyond,
]


@pytest.mark.parametrize("broken", _BROKEN, ids=lambda each: each.__name__.strip("_"))
def test_a_broken_rule_is_caught(broken: type[Pruner]) -> None:
    for seed in range(_SEEDS_TO_CATCH):
        try:
            _run(seed, broken)
        except (AssertionError, CairnError):
            return
    pytest.fail(f"{broken.__name__} was not caught in {_SEEDS_TO_CATCH} schedules")
