"""The simulated processes: which one a task belongs to, and how it dies.

A task belongs to the process of whoever created it (a context variable, which asyncio hands on). Killed like by
SIGKILL: its files are copied as they are at that moment, and the copy is what it starts with again. Python has to end
the tasks nevertheless, so their `finally` clauses run: on files that nobody will look at, without network or threads.
"""

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any


class Process:
    """One life of a daemon. name: of all its lives."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.alive = True
        self.stopping = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """Not done yet, in the order of their making: the order of a set would be chance."""
        self.on_death: list[Callable[[], None]] = []
        self.on_power_loss: list[Callable[[], None]] = []
        """What gets as far as the disk in that moment, and is not synced."""
        self.disks: list[Any] = []
        """Those of its journals (disk.py)."""
        self.signals: dict[int, Callable[[], None]] = {}
        self.main: asyncio.Task[Any] | None = None

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run `work` as this process."""
        context = copy_context()
        context.run(CURRENT.set, self)
        loop = asyncio.get_running_loop()
        self.main = context.run(loop.create_task, work())

    def kill(self, copy_to: Path, *, power: bool = False) -> None:
        """At once: what it had on its disk is in `copy_to`. power: that goes as well, and what is under way with it."""
        if power:
            for callback in self.on_power_loss:
                callback()
        self.end()
        shutil.copytree(self.directory, copy_to)

    async def stop(self) -> Any:
        """As by SIGTERM; what its `run` returned."""
        self.stopping = True
        for signal in list(self.signals.values())[:1]:
            signal()
        assert self.main is not None
        return await self.main

    def end(self) -> None:
        """Nothing that it does from now on reaches anybody."""
        self.alive = False
        for callback in self.on_death:
            callback()
        for task in list(self.tasks):
            task.cancel()


CURRENT: ContextVar[Process | None] = ContextVar("process", default=None)


def in_process(process: Process | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it as a part of that process."""
    context = copy_context()
    context.run(CURRENT.set, process)
    return context.run(function, *arguments)


def make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
    """A task factory that notes whose the task is."""
    task = asyncio.Task(work, loop=loop, **options)
    context = options.get("context")
    process = context.get(CURRENT) if context is not None else CURRENT.get()
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
    return task
