"""A node's journal writer without its thread: groups gather while one is on its way, and each takes the disk's time."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import ClassVar, Final

from blockstore.node.journal_writer import AppendsGroups, Durable
from blockstore.storage.journal import JournalEntry, JournalFailed, JournalFull
from tests.cluster_simulation.processes import CURRENT

_USUAL_S: Final = (0.0002, 0.003)


class SimulatedJournalWriter:
    """As blockstore.node.journal_writer.JournalWriter."""

    random = Random(0)
    sync_s: ClassVar[dict[str, tuple[float, float]]] = {}
    """By process name, between what a group takes; who is not in here has a usual disk."""

    def __init__(
        self,
        journal: AppendsGroups,
        loop: asyncio.AbstractEventLoop,
        *,
        on_failure: Callable[[BaseException], None],
        on_full: Callable[[], None],
    ) -> None:
        self._journal, self._loop = journal, loop
        self._on_failure, self._on_full = on_failure, on_full
        self._waiting: list[tuple[list[JournalEntry], Durable]] = []
        self._process = CURRENT.get()
        self._busy = self._failed = False
        if self._process is not None:
            self._process.on_power_loss.append(self._lose_power)

    def start(self) -> None:
        """There is nothing to start."""

    def submit(self, entries: list[JournalEntry], durable: Durable) -> None:
        self._waiting.append((entries, durable))
        self._begin()

    def room_made(self) -> None:
        self._begin()

    async def close(self) -> None:
        while self._waiting and not self._failed and self._alive():
            if not self._append():
                return

    def _alive(self) -> bool:
        return self._process is None or self._process.alive

    def _takes_s(self) -> tuple[float, float]:
        return self.sync_s.get(self._process.name if self._process is not None else "", _USUAL_S)

    def _lose_power(self) -> None:
        """The group that is on its way is written and not synced, or was not begun."""
        if self._busy and self._waiting and not self._failed and self._process and self.random.random() < 0.7:
            for disk in self._process.disks:
                disk.powered = False
            with suppress(JournalFailed, JournalFull):
                self._journal.append([entry for entries, _ in self._waiting for entry in entries])

    def _begin(self) -> None:
        if not self._busy and self._waiting and not self._failed:
            self._busy = True
            self._loop.call_later(self.random.uniform(*self._takes_s()), self._write)

    def _write(self) -> None:
        self._busy = False
        if self._alive() and self._waiting and not self._failed and self._append():
            self._begin()

    def _append(self) -> bool:
        """Whether the group is on disk."""
        group = self._waiting
        entries = [entry for entries, _ in group for entry in entries]
        try:
            last = self._journal.append(entries) if entries else 0
        except JournalFull:
            self._on_full()
            self._loop.call_later(1.0, self._begin)
            return False
        except BaseException as error:
            self._failed = True
            self._on_failure(error)
            return False
        self._waiting = []
        for _, durable in group:
            durable(last)
        return True
