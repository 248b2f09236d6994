"""A server that runs, as the benchmark sees it."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.fio import Disk
from bench.space import Space


@dataclass(frozen=True)
class Serving:
    """pids: of its processes, by name. commands: what was started, for whoever wants to do the same.

    measure_space: takes the bytes that were written; None where it stores them as they are.
    """

    disk: Disk
    pids: dict[str, int]
    commands: tuple[str, ...]
    measure_space: Callable[[int], Space] | None = None
