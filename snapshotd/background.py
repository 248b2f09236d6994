"""Threads that give way to guests' I/O on the same machine, and to what guests read of a source."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

_NICE: Final = 10


def background_threads(count: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads have a low priority."""
    return ThreadPoolExecutor(count, name, initializer=_give_way)


def _give_way() -> None:
    """Lower the priority of the thread that calls it: Linux keeps one for each thread (setpriority(2), notes)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
