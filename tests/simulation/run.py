"""One seed, run to its end."""

from dataclasses import dataclass

from tests.simulation.checkers import Violation
from tests.simulation.world import World


@dataclass(frozen=True, slots=True)
class Outcome:
    """violation: what was broken, "" if nothing. completed, failed: requests. trace: "" unless asked for."""

    seed: int
    violation: str
    events: int
    completed: int
    failed: int
    trace: list[str]


def run_seed(seed: int, *, tracing: bool = False) -> Outcome:
    """The same seed always gives the same outcome."""
    violation = ""
    world = World(seed, tracing=tracing)
    try:
        world.run()
    except Violation as error:
        violation = str(error)
    checker = world.checker
    return Outcome(
        seed, violation, world.scheduler.events, checker.completed_requests, checker.failed_requests, world.trace_lines
    )
