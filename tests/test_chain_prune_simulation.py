"""Prunes, writers, readers and deletions interleaved by seed; and rules of prune, broken on purpose, are caught.

Those that take a rare instant to show are broken at that very instant in tests/test_chain_prune_race.py.

Replay one seed: `SIMULATION_SEED=17 pytest tests/test_chain_prune_simulation.py -k every`.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import pytest

from blockstore.errors import CairnError
from snapshotd.prune import Progress, Pruner
from snapshotd.prune_look import View
from snapshotd.prune_plan import Plan
from tests.chain_simulation import simulate

_SEEDS: Final = 60
#: Schedules in which a broken rule has to show, from one that did show it: another change makes other schedules.
_SEEDS_TO_CATCH: Final = 300
_LIMIT_S: Final = 60.0


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

    _first: View | None = None

    async def _look(self) -> View:
        self._first = self._first or await super()._look()
        return self._first


class _NoNumber(Pruner):
    """Does not raise the prune number."""

    async def _raise(self, expected: int) -> int:
        return expected


class _TakesRootsEarly(Pruner):
    """Deletes roots of snapshots that are pending: it knows of none that counts."""

    async def _write_and_delete(
        self, view: View, plan: Plan, raised: int, number: int
    ) -> AsyncGenerator[Progress, None]:
        for root in view.inventory.roots:
            if root.snapshot in view.roots.pending:
                await self.repository.store.delete(root.key)
        async with aclosing(super()._write_and_delete(view, plan, raised, number)) as progress:
            async for each in progress:
                yield each


#: And a seed that catches it.
_BROKEN: dict[type[Pruner], int] = {_LooksOnce: 47, _NoNumber: 0, _TakesRootsEarly: 105}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("broken", _BROKEN, ids=lambda each: each.__name__.strip("_"))
def test_a_broken_rule_is_caught(broken: type[Pruner]) -> None:
    for seed in range(_BROKEN[broken], _BROKEN[broken] + _SEEDS_TO_CATCH):
        try:
            _run(seed, broken)
        except (AssertionError, CairnError):
            return
    pytest.fail(f"{broken.__name__} was not caught in {_SEEDS_TO_CATCH} schedules")
