"""One seed, run to its end."""

from dataclasses import dataclass
from typing import Final
from unittest import mock

from blockstore.replication import in_flight
from tests.simulation.violation import Violation
from tests.simulation.world import World

#: Volumes are small here: a trim counts as wide from fewer blocks on, or there would be none.
_NARROW_BLOCKS: Final = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """violation: what was broken, "" if nothing. completed, failed: requests. seen: effects,
    journal entries, errors and faults by name. trace: empty unless asked for."""

    seed: int
    violation: str
    events: int
    completed: int
    failed: int
    seen: dict[str, int]
    trace: list[str]


def run_seed(seed: int, *, tracing: bool = False) -> Outcome:
    """The same seed always gives the same outcome."""
    violation = ""
    with mock.patch.object(in_flight, "_NARROW_BLOCKS", _NARROW_BLOCKS):
        world = World(seed, tracing=tracing)
        try:
            world.run()
        except Violation as error:
            violation = str(error)
    return Outcome(
        seed=seed,
        violation=violation,
        events=world.scheduler.events,
        completed=world.checker.completed_requests,
        failed=world.checker.failed_requests,
        seen=dict(world.seen),
        trace=world.trace_lines,
    )
