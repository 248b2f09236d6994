"""Live progress on stderr: bars with rate and time left at a terminal, plain lines now and then elsewhere.

What is said is the same in both; only how often, and that a bar is drawn over, differs.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import rich.progress

from blockstore.cli.screen import console, say
from blockstore.units import format_size

#: Between two lines about one thing, where these go to a file or a pipe.
LINE_S: Final = 2.0
#: The time over which a rate is measured.
_WINDOW_S: Final = 5.0

BYTES: Final = "bytes"


@dataclass(frozen=True, slots=True)
class Amount:
    """How far something is. total: 0 where it is not known. rate: in `unit` a second; None where nobody measured it.

    note: what keeps it.
    """

    done: int
    total: int = 0
    unit: str = BYTES
    rate: float | None = None
    note: str = ""


class Meters(Protocol):
    """Shows how far each of several things is, by name."""

    def update(self, name: str, amount: Amount) -> None:
        """Tell how far `name` is."""


class Rate:
    """What was done in the last seconds, for who is only told how much is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, done: int) -> float | None:
        """The rate a second now that `done` is done; None where that cannot be said yet."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # another phase
        self._seen.append((now, done))
        while now - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        began, at_first = self._seen[0]
        return (done - at_first) / (now - began) if now > began and done > at_first else None


def describe(amount: Amount) -> str:
    """Done, total, rate and time left, in words."""
    parts = [_of(amount)]
    if amount.rate:
        parts.append(_quantity(int(amount.rate), amount.unit) + "/s")
        if amount.total > amount.done:
            parts.append(f"{format_duration((amount.total - amount.done) / amount.rate)} left")
    return ", ".join([*parts, *([amount.note] if amount.note else [])])


def _of(amount: Amount) -> str:
    if not amount.total and not amount.done:
        return "waiting"
    done = _quantity(amount.done, amount.unit)
    if not amount.total:
        return done
    return f"{done} of {_quantity(amount.total, amount.unit)} ({100 * amount.done / amount.total:.0f}%)"


def _quantity(number: int, unit: str) -> str:
    return format_size(number) if unit == BYTES else f"{number:,} {unit}".rstrip()


def format_duration(seconds: float) -> str:
    """A time for people: 7 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def meters() -> Iterator[Meters]:
    """What shows progress until the block ends."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[words]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console(sys.stderr), transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar for each name."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def update(self, name: str, amount: Amount) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=None, words="")
        total = amount.total or None  # None: a bar that only shows that something goes on
        self._bars.update(self._tasks[name], completed=amount.done, total=total, words=describe(amount))


class _Lines:
    """A line for each name that is new, when what keeps it changes, when it is done, and now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, say_line: Callable[[str], None] = say) -> None:
        self._clock = clock
        self._say = say_line
        self._told: dict[str, tuple[float, str, str]] = {}

    def update(self, name: str, amount: Amount) -> None:
        now, words = self._clock(), describe(amount)
        at, note, last = self._told.get(name, (float("-inf"), "", ""))
        ended = amount.total and amount.done >= amount.total
        if words != last and (ended or note != amount.note or now - at >= LINE_S):
            self._told[name] = now, amount.note, words
            self._say(f"{name}: {words}")
