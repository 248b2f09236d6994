"""Copies between replicas: long random stories of one that fills while the log goes on; and hostile copies."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage_model import pin, seal, unpin
from tests.storage_pair import COUNTS, MEMORY, NUMBERS, Pair, Plan

FILLS = 6


def something(pair: Pair, chance: random.Random) -> None:
    """One step that a fill must bear with."""
    if chance.random() < 0.6:
        kind = chance.choice(["write", "write", "trim", "zero"])
        plan = Plan(kind, chance.choice(NUMBERS), chance.choice(COUNTS), chance.randrange(256))
        pair.append(plan.operation())
        return
    holders = [(generation, holder) for generation in pair.pinned() for holder in sorted(pair.log.pins[generation])]
    generation, holder = chance.choice(holders) if holders else (0, b"")
    actions: list[Callable[[], object]] = [
        lambda: pair.append(seal(b"snap-%d" % pair.log.generation)),
        lambda: pair.append(seal()),
        pair.source.checkpoint,
        pair.target.checkpoint,
        lambda: pair.crash(pair.source),
        lambda: pair.crash(pair.target),
        pair.source.store.merge,
        pair.target.store.merge,
        pair.source.store.compact,
    ]
    if holders:
        actions += [lambda: pair.append(pin(generation, b"other")), lambda: pair.append(unpin(generation, holder))]
    chance.choice(actions)()


def some(pair: Pair, chance: random.Random, most: int) -> None:
    for _ in range(chance.randint(0, most)):
        something(pair, chance)


def fill(pair: Pair, chance: random.Random) -> None:
    """From away to whole, with everything that may come between, beginning anew included."""
    pair.begin_to_fill()
    some(pair, chance, 3)
    pair.copy_meta()
    while pair.todo:
        some(pair, chance, 4)
        pair.lagging = pair.lagging or chance.random() < 0.2
        if chance.random() < 0.1:
            fill(pair, chance)
            return
        pair.copy_extents(chance.randint(1, 2))
    some(pair, chance, 3)
    pair.become_whole()


@pytest.mark.parametrize("seed", range(30))
def test_a_replica_that_filled_shows_what_its_source_shows(seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        pair = Pair(Path(directory))
        some(pair, chance, 12)
        for _ in range(FILLS):
            pair.away = True
            some(pair, chance, 8)
            fill(pair, chance)
            pair.check_content()
            some(pair, chance, 5)
        pair.close()
