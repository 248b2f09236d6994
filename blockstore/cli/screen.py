"""Where a command's words go: what was asked for to stdout, everything else to stderr.

With `--output json` stdout holds one document (with --watch one a line) and nothing else.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console, RenderableType

from blockstore.cli.documents import Document, text_of
from blockstore.cli.options import Output

#: Of a table that goes to a file or a pipe: nothing is folded there.
_UNBOUNDED_WIDTH: Final = 1000


def console(stream: TextIO) -> Console:
    """A console that folds lines at a terminal only, and takes no text for markup."""
    width = None if stream.isatty() else _UNBOUNDED_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def show(output: Output, document: Document, table: Callable[[], RenderableType]) -> None:
    """Print the document or the table, as asked."""
    if output is Output.JSON:
        print(text_of(document), flush=True)
    else:
        print_table(table())


def print_table(table: RenderableType) -> None:
    """Print to stdout, without the blanks that fill up the last column."""
    target = console(sys.stdout)
    with target.capture() as capture:
        target.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def program() -> str:
    """What to type for `cairn`: its name where the shell finds this installation by it, else its path."""
    ours = Path(sys.executable).parent / "cairn"
    found = shutil.which("cairn")
    if not ours.exists() or (found is not None and os.path.samefile(found, ours)):
        return "cairn"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)


def say(text: str) -> None:
    """A line for people, to stderr."""
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Prints each step as it happens, with the seconds since the first and who took it."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._began = clock()

    def __call__(self, who: str, text: str) -> None:
        self.line(f"{self._clock() - self._began:7.2f} s  {who:<10}  {text}")

    def line(self, text: str = "") -> None:
        """A line without a time."""
        try:
            print(text, file=self._stream or sys.stdout, flush=True)
        except OSError:
            # Who listened is gone, or the disk with the log is full: no reason to end what is being told of.
            return


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is waited for: in one line that changes at a terminal, else one line for each change."""
    if sys.stderr.isatty():
        with console(sys.stderr).status(text) as status:
            yield status.update
        return
    last = ""

    def changed(now: str) -> None:
        nonlocal last
        if now != last:
            say(now)
        last = now

    yield changed
