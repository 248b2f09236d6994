"""What every daemon does the same way: end on a signal, say that it serves and where, reuse its memory."""

import asyncio
import ctypes
import os
import signal
from pathlib import Path
from typing import Final

from blockstore.systemd import notify

#: In the directory of control or a node: HOST:PORT and a newline.
ADDRESS_FILE: Final = "address"
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: The longest NBD payload comes from the heap too.
HEAP_UP_TO_BYTES: Final = 32 << 20
_KEPT_BYTES: Final = 64 << 20


def stop_signals() -> "asyncio.Future[int]":
    """Done, with the signal's number, at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if stopped.done():
            os._exit(128 + number)
        notify("STOPPING=1")
        stopped.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopped


def tell_ready(status: str) -> None:
    """Whoever waits for the daemon to serve may go on: systemd, where that started it. status: for people."""
    notify(f"READY=1\nSTATUS={status}")


def write_address(path: Path, address: str) -> None:
    """Replace the file at `path` by one that holds `address`: a reader sees the old one or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(address + "\n")
    scratch.replace(path)


def keep_freed_memory(heap_up_to_bytes: int = HEAP_UP_TO_BYTES) -> None:
    """Have the C library keep up to 64 MiB that were freed, rather than give large buffers back at once.

    Payloads of 1 MiB come and go all the time, and each fresh one costs 256 page faults: reads of
    1 MiB over NBD took 550 us of system time each without this, and 90 us with it. Another C library
    than glibc does as it likes. heap_up_to_bytes: what is as large or larger is given back at once all the same.
    Source: mallopt(3).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, heap_up_to_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
