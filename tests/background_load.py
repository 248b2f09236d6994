"""Work that goes on in a thread of its own while a test does something else.

What ends the work with an error is raised in the test's thread: where the block ends, or while the test waits for
progress. A block that ends with an error of its own keeps that one.
"""

import asyncio
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.daemons import wait_for


async def think(chance: random.Random, mean_s: float) -> None:
    """A client's wait before its next request, so long on average; now and then none at all.

    A load that takes all of a small machine says more of the machine than of what is tested.
    """
    if mean_s:
        await asyncio.sleep(max(0.0, chance.uniform(-1, 3) * mean_s))


class BackgroundLoad(ABC):
    """with ...: begins on entry; on exit it is asked to stop, and waited for."""

    def __init__(self, name: str) -> None:
        """name: of the thread, for a debugger."""
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()
        if kind is None:
            self._raise_failure()

    @abstractmethod
    def _work(self) -> None:
        """In the thread; to return soon once `_stopping`."""

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_for(self, what: str, condition: Callable[[], bool], limit_s: float) -> None:
        """Raises what ended the work, and TimeoutError."""

        def met() -> bool:
            self._raise_failure()
            return condition()

        wait_for(what, met, limit_s)
