"""Many wait for one piece of work: whoever asks for what is under way joins it.

The work goes on when those who wait have gone; its end is known to all of them.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class SingleFlight(Generic[Key, Value]):
    """Work by key, at most one of each under way."""

    def __init__(self) -> None:
        self._under_way: dict[Key, asyncio.Task[Value]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._under_way

    def begin(self, key: Key, work: Callable[[], Coroutine[Any, Any, Value]]) -> "asyncio.Task[Value]":
        """The work for `key` that is under way, or that begins now."""
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.get_running_loop().create_task(work())
            task.add_done_callback(lambda ended: self._end(key, ended))
        return task

    async def get(self, key: Key, work: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """Its result, or error."""
        return await asyncio.shield(self.begin(key, work))

    async def close(self) -> None:
        """Ends whatever is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, key: Key, task: "asyncio.Task[Value]") -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # who waits has it; nobody has to
