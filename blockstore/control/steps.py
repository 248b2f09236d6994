"""Work under way: each step runs once at a time, under its name, and says once what stands in its way.

A step ends in a transition that fails if what it was for has moved on, so it may be repeated, cut
off or late without harm. Whoever waits for one shields it: who stops waiting stops nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable

import structlog

from blockstore.domain import VolumeId
from blockstore.errors import CairnError

_log = structlog.get_logger(__name__)


class Steps:
    """The steps that run now, and the last words of those that failed."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[None]] = {}
        self._told: dict[str, str] = {}

    def start(self, key: Hashable, subject: str, carry_out: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
        """The step of that name: the one that runs, or a new one. subject: whose trouble its errors are."""
        if key not in self._running:
            task = asyncio.ensure_future(_run(carry_out))
            task.add_done_callback(lambda done: self._ended(key, subject, done))
            self._running[key] = task
        return self._running[key]

    def running(self, key: Hashable) -> "asyncio.Task[None] | None":
        """The step of that name, while it runs."""
        return self._running.get(key)

    def tell(self, subject: str, error: CairnError) -> None:
        """Log what stands in the way, once, and not again each second."""
        if self._told.get(subject) != str(error):
            _log.warning("not done yet; trying on", subject=subject, error=str(error))
            self._told[subject] = str(error)

    def why(self, subject: str) -> str:
        """What stood in the way the last time; empty where nothing did."""
        return self._told.get(subject, "")

    def forget(self, subject: str) -> None:
        """It is gone, or what stood in its way counts no more."""
        self._told.pop(subject, None)

    async def cancel(self) -> None:
        """End all of them where they are."""
        under_way = tuple(self._running.values())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def _ended(self, key: Hashable, subject: str, task: "asyncio.Task[None]") -> None:
        del self._running[key]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.forget(subject)
        elif isinstance(error, CairnError):
            self.tell(subject, error)
        else:
            _log.error("a step failed in a way that nobody foresaw", subject=subject, step=str(key), exc_info=error)


def newcomer_key(volume: VolumeId) -> Hashable:
    """The step that makes a newcomer of this volume; a Delete waits for it."""
    return volume, "newcomer"


def growth_key(volume: VolumeId) -> Hashable:
    """Of the step that creates a volume's further segments."""
    return volume, "growth"


async def _run(carry_out: Callable[[], Awaitable[None]]) -> None:
    await carry_out()
