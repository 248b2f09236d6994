"""Runs one daemon in this process until it is told to stop.

Each daemon is an async function of its settings. It runs until SIGTERM or SIGINT, and returns its exit code where
that is not 0. What it logs goes to stderr, a line for each event.
"""

import asyncio
import ctypes
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any, Final

import uvloop

from blockstore.cli.logs import get_logger, set_up_logging
from blockstore.cli.settings import PARENT_VARIABLE
from blockstore.daemon import keep_freed_memory
from blockstore.errors import CairnError, NotFound

#: Not entry points: to look through all that is installed takes longer than to import a daemon's module.
_MODULES: Final = {
    "control": "blockstore.control.daemon",
    "node": "blockstore.node.daemon",
    "nbd": "nbd_server.daemon",
    "snapshotd": "snapshotd.daemon",
}
_PR_SET_PDEATHSIG: Final = 1

Daemon = Callable[[Any], Coroutine[Any, Any, int | None]]


def run(name: str, settings: Any) -> int:
    """Run the daemon `name` to its end; its exit code. Raises what it raises."""
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
            return runner.run(daemon(settings)) or 0
    except CairnError:
        raise
    except Exception:
        # A defect: its stack belongs in the log, where nobody gave --debug.
        get_logger(__name__).exception("the daemon failed in a way that nobody foresaw", daemon=name)
        raise


def find_daemon(name: str) -> Daemon:
    """The function that runs the daemon `name`. Raises NotFound."""
    if name not in _MODULES:
        raise NotFound(f"cairn has no daemon {name!r}: it has {', '.join(_MODULES)}")
    daemon: Daemon = import_module(_MODULES[name]).run
    return daemon


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
