"""Virtual time: a queue of what happens when, and processes that crash and pause.

Nothing here reads a clock. Two events of one time happen in the order in which they were scheduled,
so a run is a function of its seed alone.
"""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Scheduler:
    """The queue. now: virtual seconds since the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, time: float, action: Action) -> None:
        """`action` happens at `time`, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._queue, (max(time, self.now), self._count, action))

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now + delay_s, action)

    def step(self, until: float) -> bool:
        """Let the next event happen, if there is one before `until`; else the time is `until`."""
        if not self._queue or self._queue[0][0] > until:
            self.now = until
            return False
        self.now, _, action = heapq.heappop(self._queue)
        self.events += 1
        action()
        return True


class Process:
    """What can crash and be paused. Whatever was scheduled in one life never happens in the next."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.alive = True
        self.life = 0
        self.paused_until = 0.0

    def after(self, delay_s: float, action: Action) -> None:
        """`action` happens in this life, later if the process is paused then, in order; never for a dead one."""
        if not self.alive:
            return
        life = self.life

        def run() -> None:
            if self.life != life:
                return
            if self.scheduler.now < self.paused_until:
                self.scheduler.at(self.paused_until, run)
            else:
                action()

        self.scheduler.after(delay_s, run)

    def end_life(self) -> None:
        self.alive = False
        self.life += 1
        self.paused_until = 0.0
