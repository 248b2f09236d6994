"""The clock of leases: it counts the time in which control could have heard somebody.

A virtual machine that is moved or suspended, or whose host has no time for it, stands still for seconds; when it goes
on, every lease would have ended before the first heartbeat that waits in its sockets is read. Whoever beat all the time
would count as down: a snapshot that a front-end shows would be deleted under it, a volume could not be placed. So what
lies between two looks at the machine's clock counts for at most MOST_S. Invariants: the clock never falls, and is
never faster than the machine's.
"""

import asyncio
from collections.abc import Callable
from typing import Final

TICK_S: Final = 0.1
#: A busy event loop comes late to a tick by less; leases are several times as long.
MOST_S: Final = 0.5


class AwakeClock:
    """Called, it gives seconds since some moment, while `run` runs. machine_s: the machine's clock; it never falls."""

    def __init__(self, machine_s: Callable[[], float]) -> None:
        self._machine_s = machine_s
        self._counted_s = 0.0
        self._looked_at_s = machine_s()

    def __call__(self) -> float:
        return self._counted_s + min(MOST_S, self._machine_s() - self._looked_at_s)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._counted_s = self()
            self._looked_at_s = self._machine_s()
