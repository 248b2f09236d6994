"""Runs one daemon in this process until it is told to stop.

The daemons are entry points of the group `cairn.daemons` (pyproject.toml): the command knows their
settings, and not their code. SIGTERM and SIGINT cancel the daemon, which then stops cleanly; the
second signal ends the process at once, which the store is made to survive. What it logs goes to
stderr, a line for each event.
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from importlib.metadata import entry_points
from typing import Any, Final

import structlog
import uvloop

from blockstore.errors import CairnError, NotFound

ENTRY_POINTS: Final = "cairn.daemons"
PARENT_VARIABLE: Final = "CAIRN_PARENT"
"""The pid of the `cairn up` that started this process: where that ends, this one does too."""

_PR_SET_PDEATHSIG: Final = 1

Daemon = Callable[[Any], Coroutine[Any, Any, None]]


def run_daemon(name: str, settings: Any) -> None:
    """Run the daemon `name` until it ends or is told to. Raises what it raises, NotFound where it is not installed."""
    die_with_parent(os.environ.get(PARENT_VARIABLE, ""))
    set_up_logging()
    daemon = find_daemon(name)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signalled(daemon(settings)))


def find_daemon(name: str) -> Daemon:
    """The function that runs the daemon `name`. Raises NotFound."""
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        daemon: Daemon = entry.load()
        return daemon
    raise NotFound(f"this installation has no daemon {name!r}: install cairn again (in a checkout: .ci/setup)")


def set_up_logging() -> None:
    """Events as lines of time, level, event and key=value; colored at a terminal only."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def die_with_parent(parent: str) -> None:
    """Have the kernel kill this process when its parent ends; `parent` is that one's pid, or empty.

    SIGKILL, because it is certain, and a crash is nothing that the store fears. Source: prctl(2).
    """
    if not parent:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise CairnError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(error)}")
    if os.getppid() != int(parent):
        raise CairnError(f"the process {parent} that started this one is gone")


async def _until_signalled(daemon: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(daemon)
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if task.cancelling():
            os._exit(128 + number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelling():
            raise
