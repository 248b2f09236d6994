"""An event loop whose clock is the test's: it jumps to the next timer as soon as nothing else can happen.

So a limit of an hour passes at once, and to the exact second. It is for code without I/O: what a socket or a thread
will bring some time is not waited for.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any


class _Jumping(selectors.DefaultSelector):
    """Where the loop would wait for its next timer, the clock moves instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits, and nothing will ever happen"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """time: virtual seconds since the loop was made."""

    def __init__(self) -> None:
        self._clock = _Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine in such a loop."""

    async def run() -> None:
        await test()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
