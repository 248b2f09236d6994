"""Child processes that are kept running: started again when they end, stopped when told to.

A child that has run steadily for a while is started again at once, so that a front-end that was killed keeps
guests waiting for as long as it takes to start and no longer. One that ends again before that is started after a
pause that doubles each time. One that ends with EXIT_DO_NOT_RESTART stays down: it could not record that its data is
suspect, and only a person may decide what to do. Each has a session of its own, so that Ctrl-C at
the terminal reaches the supervisor alone, which stops them in order; and each dies with the
supervisor, however that ends (blockstore.cli.daemons).
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blockstore.cli.settings import PARENT_VARIABLE, environment_without_settings
from blockstore.config import EXIT_DO_NOT_RESTART
from blockstore.errors import CairnError
from blockstore.units import MIB

FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 10.0
#: A child that ran this long did start: what ended it is something new.
STEADY_S: Final = 10.0
#: Clean stops write checkpoints; what takes longer is killed, which loses nothing that was acknowledged.
STOP_TIMEOUT_S: Final = 20.0
#: Of a log, when its process starts: a longer one becomes NAME.log.1.
MAX_LOG_BYTES: Final = 16 * MIB


@dataclass(eq=False)
class Child:
    """A process to keep running.

    command: program and arguments, made anew for each start. failures: starts in a row that did not last.
    """

    name: str
    log: Path
    command: Callable[[], list[str]]
    process: asyncio.subprocess.Process | None = None
    failures: int = 0
    given_up: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        running = self.process is not None and self.process.returncode is None
        return self.process.pid if running and self.process else None


class Supervisor:
    """Keeps children running. say(who, text) tells people; changed() is called after each start and end."""

    def __init__(self, say: Callable[[str, str], None], changed: Callable[[], None]) -> None:
        self._say = say
        self._changed = changed
        self._keepers: dict[Child, asyncio.Task[None]] = {}

    def start(self, child: Child) -> None:
        """Start it, and again whenever it ends, until `stop`."""
        self._keepers[child] = asyncio.create_task(self._keep(child), name=child.name)

    @property
    def pids(self) -> dict[str, int]:
        """Of those that run, by name."""
        return {child.name: child.pid for child in self._keepers if child.pid}

    async def stop(self, children: Iterable[Child]) -> None:
        """Tell all of `children` to stop, and wait for it; those that take too long are killed."""
        await asyncio.gather(*(self._stop(child) for child in children if child in self._keepers))

    def kill(self) -> None:
        """End all that run, at once."""
        for child in self._keepers:
            child.stopping.set()
            _signal(child, signal.SIGKILL)

    async def _stop(self, child: Child) -> None:
        child.stopping.set()
        _signal(child, signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.shield(self._keepers[child])
        except TimeoutError:
            self._say(child.name, f"does not stop within {STOP_TIMEOUT_S:.0f} s: killed")
            _signal(child, signal.SIGKILL)
            await self._keepers[child]

    async def _keep(self, child: Child) -> None:
        pause_s = FIRST_PAUSE_S
        while not child.stopping.is_set():
            began = time.monotonic()
            try:
                code = await self._run_once(child)
            except OSError as error:
                code = CairnError.codes.exit_code
                self._say(child.name, f"cannot be started: {error}")
            if child.stopping.is_set():
                return
            if code == EXIT_DO_NOT_RESTART:
                child.given_up = True
                self._say(
                    child.name, f"ended with exit code {code}, after which nothing starts it again: see {child.log}"
                )
                return
            if time.monotonic() - began > STEADY_S:
                pause_s, child.failures = 0.0, 0
            child.failures += 1
            when = f"in {pause_s:g} s" if pause_s else "at once"
            self._say(child.name, f"{describe_exit(code)}; starts again {when}, log: {child.log}")
            await _wait(child.stopping, pause_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), MAX_PAUSE_S)

    async def _run_once(self, child: Child) -> int:
        """Start it and wait for its end; the exit code, below 0 for a signal."""
        _rotate(child.log)
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *child.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**environment_without_settings(os.environ), PARENT_VARIABLE: str(os.getpid())},
            )
        self._changed()
        if child.stopping.is_set():  # while it was being started
            _signal(child, signal.SIGTERM)
        code = await child.process.wait()
        self._changed()
        return code


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def last_line(log: Path) -> str:
    """The last words of a process; empty where it said nothing."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.returncode is None:
        child.process.send_signal(number)


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.rename(log.with_name(log.name + ".1"))
