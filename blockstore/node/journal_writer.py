"""The thread that turns all that is waiting into one journal group: one write, one fdatasync.

While a group is on its way to the disk, the next one gathers; so the batch grows with the load
and a lone record waits for nothing. Entries become durable in the order in which they were
submitted, over all replicas of the node. After a failed write or sync nothing is known of the
disk: the writer reports it once and takes nothing more (design: never carry on after a failed fsync).
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Final, Protocol

from blockstore.storage.journal import JournalEntry, JournalFull


class AppendsGroups(Protocol):
    """What the writer needs of a journal."""

    def append(self, entries: list[JournalEntry]) -> int:
        """Make the entries durable. Returns the number of the last one."""


_LOOK_AGAIN_S: Final = 1.0
"""A release is told of; room on a full disk is not, so the writer looks for it this often."""

Durable = Callable[[int], None]
"""Called in the event loop's thread with the number of the last entry of its submission's group."""


class JournalWriter:
    """Group commit for the replicas of one node.

    on_failure is called in the event loop, once, with what went wrong; on_full each time that
    the journal has no free file, which a checkpoint mends: the group is then tried again.
    """

    def __init__(
        self,
        journal: AppendsGroups,
        loop: asyncio.AbstractEventLoop,
        *,
        on_failure: Callable[[BaseException], None],
        on_full: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._on_failure = on_failure
        self._on_full = on_full
        self._wake = threading.Condition()
        self._waiting: list[tuple[list[JournalEntry], Durable]] = []
        self._room = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, entries: list[JournalEntry], durable: Durable) -> None:
        """Queue entries; they share a group. `durable` is called once they are on disk."""
        with self._wake:
            self._waiting.append((entries, durable))
            self._wake.notify()

    def room_made(self) -> None:
        """A journal file was released: a group that found none may be tried again."""
        self._room.set()

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._room.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while group := self._next_group():
                last = self._append([entry for entries, _ in group for entry in entries])
                if last is None:
                    return
                self._loop.call_soon_threadsafe(_announce, [durable for _, durable in group], last)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._on_failure, error)

    def _next_group(self) -> list[tuple[list[JournalEntry], Durable]]:
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            group, self._waiting = self._waiting, []
        return group

    def _append(self, entries: list[JournalEntry]) -> int | None:
        """None where the journal stayed full until the writer was closed."""
        if not entries:
            return 0
        while True:
            self._room.clear()
            try:
                return self._journal.append(entries)
            except JournalFull:
                if self._closing:
                    return None
                self._loop.call_soon_threadsafe(self._on_full)
                self._room.wait(_LOOK_AGAIN_S)


def _announce(callbacks: list[Durable], last: int) -> None:
    for durable in callbacks:
        durable(last)
