"""Runs one daemon in this process until it is told to stop.

The daemons are entry points of the group `cairn.daemons` (pyproject.toml): the command knows their
settings, and not their code. Each runs until SIGTERM or SIGINT, and returns its exit code where that
is not 0. What it logs goes to stderr, a line for each event.
"""

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from importlib.metadata import entry_points
from typing import Any, Final

import structlog
import typer
import uvloop

from blockstore.daemon import keep_freed_memory
from blockstore.errors import CairnError, NotFound

ENTRY_POINTS: Final = "cairn.daemons"
PARENT_VARIABLE: Final = "CAIRN_PARENT"
"""The pid of the `cairn up` that started this process: where that ends, this one does too."""
CAIRN: Final = (sys.executable, "-P", "-m", "blockstore.cli")
"""This very installation's command. -P: the directory that it is started in is no place to import from."""

_PR_SET_PDEATHSIG: Final = 1

Daemon = Callable[[Any], Coroutine[Any, Any, int | None]]


def run_daemon(name: str, settings: Any) -> None:
    """Run the daemon `name` to its end. Raises what it raises, and typer.Exit with the exit code that it returns."""
    die_with_parent(os.environ.get(PARENT_VARIABLE, ""))
    set_up_logging()
    keep_freed_memory()
    daemon = find_daemon(name)
    # Records and their parts are no circles, and there are many: what looks for circles among them took 12% of
    # a node's time.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            exit_code = runner.run(daemon(settings)) or 0
    except CairnError:
        raise
    except Exception:
        # A defect: its stack belongs in the log, where nobody gave --debug.
        structlog.get_logger(__name__).exception("the daemon failed in a way that nobody foresaw", daemon=name)
        raise
    raise typer.Exit(exit_code)


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
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=0,
                # Rich's would show local variables: guests' data, by the page.
                exception_formatter=structlog.dev.plain_traceback,
            ),
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
