"""Going on in the background once all is ready.

The process forks before it has a thread or a connection. The parent stays at the terminal while the
child starts the cluster and tells its steps there; when the child is ready its words go to a log and
the parent ends. A child that fails before passes its exit code on.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import typer


def go_to_background(log: Path, prepare: Callable[[], None]) -> Callable[[], None]:
    """Returns in the child: a function to call when all is ready. In the parent it raises typer.Exit.

    prepare: makes the directory of `log`, before anything else.
    """
    prepare()
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        raise typer.Exit(_exit_code_of(child, receive))
    os.close(receive)
    os.setsid()

    def ready() -> None:
        _speak_to(log)
        os.write(send, b"1")
        os.close(send)

    return ready


def _exit_code_of(child: int, receive: int) -> int:
    """0 when the child is ready, else its exit code. Ctrl-C stops it."""
    while True:
        try:
            if os.read(receive, 1):
                return 0
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return code if code >= 0 else 128 - code  # as shells say it
        except KeyboardInterrupt:
            os.kill(child, signal.SIGINT)


def _speak_to(log: Path) -> None:
    """From now on, what is said goes to `log`, and nothing is read."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
