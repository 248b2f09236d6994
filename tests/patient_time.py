"""An event loop whose clock stands still while the machine does not let the process run.

Control, nodes and front-ends of a test are often all in one process. Where that is not run for seconds, every lease of
theirs would have ended when it goes on, before anybody could beat. Here each turn of the loop counts for a moment at
most, on top of what the loop itself meant to wait: whoever beats in time by this clock is never gone by it.
"""

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, Final

#: More than a turn takes on a machine that is not overloaded; leases are many times as long.
TURN_S: Final = 0.02


class _Patient(selectors.DefaultSelector):
    """Asked once in each turn of the loop, to wait until its next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._counted_s = self._turn_began_at = time.monotonic()

    def now_s(self) -> float:
        """Never falls; never ahead of the machine's own clock."""
        return self._counted_s + min(TURN_S, time.monotonic() - self._turn_began_at)

    def select(self, timeout: float | None = None) -> list[Any]:
        worked_until, began_at = self.now_s(), time.monotonic()
        events = super().select(timeout)
        self._turn_began_at = time.monotonic()
        waited_s = self._turn_began_at - began_at
        meant_s = waited_s if timeout is None else max(0.0, timeout) + TURN_S
        self._counted_s = worked_until + min(waited_s, meant_s)
        return events


class PatientLoop(asyncio.SelectorEventLoop):
    """time: seconds of a clock like time.monotonic, less the times in which nothing ran."""

    def __init__(self) -> None:
        self._clock = _Patient()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s()


def run_patiently(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, in such a loop."""
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        runner.run(main)
