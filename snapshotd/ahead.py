"""Work that is begun ahead of its turn, so that an object store's latency is paid once and not for each object.

Results come in the order of the work. At most `width` pieces are under way or wait for whoever takes
the results, which bounds memory; nothing goes on after the generator is closed or has failed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, Final, TypeVar

#: Requests under way at once: enough to hide 50 ms of latency, and few enough for the memory of whole packs.
WIDTH: Final = 8

T = TypeVar("T")
S = TypeVar("S")


async def ahead(
    work: Callable[[S], Coroutine[Any, Any, T]], items: AsyncIterable[S] | Iterable[S], width: int = WIDTH
) -> AsyncGenerator[T, None]:
    """work(item) of each item, in order. Raises what the first failing one raises, and cancels the others.

    Close it (contextlib.aclosing) where it is not read to its end.
    """
    running: deque[asyncio.Task[T]] = deque()
    try:
        async with aclosing(_each(items)) as source:
            async for item in source:
                running.append(asyncio.create_task(work(item)))
                if len(running) >= width:
                    yield await _first(running)
        while running:
            yield await _first(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _first(running: deque[asyncio.Task[T]]) -> T:
    """The result of the oldest; it stays in `running`, to be cancelled with the rest, until it has one."""
    result = await running[0]
    running.popleft()
    return result


async def _each(items: AsyncIterable[S] | Iterable[S]) -> AsyncGenerator[S, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
