"""Waiting for something beside work that may fail: whoever waits is told of the failure instead of waiting on."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def while_running(work: "asyncio.Task[Any]", waiting: Coroutine[Any, Any, Result]) -> Result:
    """What `waiting` returns. Raises what `work` ended with before that, which ends only by failing.

    `work` goes on afterwards; `waiting` is cancelled where it is not over.
    """
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait([task, work], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
