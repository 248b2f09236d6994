"""What every daemon does the same way: end on a signal, and say where it listens."""

import asyncio
import os
import signal
from pathlib import Path


def stop_signals() -> "asyncio.Future[int]":
    """Done, with the signal's number, at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if stopped.done():
            os._exit(128 + number)
        stopped.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopped


def write_address(path: Path, address: str) -> None:
    """Replace the file at `path` by one that holds `address`: a reader sees the old one or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(address + "\n")
    scratch.replace(path)
