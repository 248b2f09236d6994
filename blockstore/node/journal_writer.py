"""Turns all that is waiting into one journal group: one write, one fdatasync.

While a group is on its way to the disk, the next one gathers; so the batch grows with the load
and a lone record waits for nothing. Entries become durable in the order in which they were
submitted, over all replicas of the node. After a failed write or sync nothing is known of the
disk: the writer reports it once and takes nothing more (design: never carry on after a failed fsync).

Where the disk answers within some tenths of a millisecond, a small group is written in the event loop itself: to hand
it to a thread and back costs more than the sync, in switches between threads and in waiting for the interpreter's
lock. What is large, may need a new file, or comes while the disk is slow goes to a thread, and the loop goes on.
Invariant: one of the two writes at a time, and what the loop would write waits until the thread has written all of
its own. A quick disk that stops answering holds the loop, once, until it answers: meanwhile the node is as one that is
away, so guests' reads go to other members within the lease (with 8 s for each sync on one node, no request took 1 s).
"""

import asyncio
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Final, Protocol

from blockstore.log import RecordEntry
from blockstore.storage.journal import JournalEntry, JournalFull
from blockstore.units import KIB


class AppendsGroups(Protocol):
    """What the writer needs of a journal."""

    def append(self, entries: list[JournalEntry]) -> int:
        """Make the entries durable. Returns the number of the last one."""

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether so many bytes of records can be appended without making a file."""


_LOOK_AGAIN_S: Final = 1.0
"""A release is told of; room on a full disk is not, so the writer looks for it this often."""
QUICK_S: Final = 0.0005
"""A disk that takes no longer for a group is quick: reads and heartbeats, which need the loop, can wait for that."""
#: How much the last group counts in what is typical: one that took 50 ms sends some 30 after it to the thread.
_WEIGHT: Final = 1 / 8
#: Larger groups take their time, and let go of the interpreter for most of it.
_SMALL_BYTES: Final = 256 * KIB

Durable = Callable[[int], None]
"""Called in the event loop's thread with the number of the last entry of its submission's group."""
Submission = tuple[list[JournalEntry], Durable]


class JournalWriter:
    """Group commit for the replicas of one node. Everything is called in the event loop, and calls back there.

    on_failure is called once, with what went wrong; on_full each time that the journal has no free file, which a
    checkpoint mends: the group is then tried again.
    """

    def __init__(
        self,
        journal: AppendsGroups,
        loop: asyncio.AbstractEventLoop,
        *,
        on_failure: Callable[[BaseException], None],
        on_full: Callable[[], None],
        quick_s: float = QUICK_S,
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._on_failure = on_failure
        self._on_full = on_full
        self._quick_s = quick_s
        self._gathered: list[Submission] = []
        self._gathered_bytes = 0
        """Of their records."""
        self._scheduled = False
        self._in_thread = 0
        """Submissions that the thread was given and has not announced."""
        self._typical_s = 1.0
        """What a group takes of late; unknown is slow."""
        self._over = False
        """It was closed, or has failed: nothing more is written."""
        self._wake = threading.Condition()
        self._waiting: list[Submission] = []
        """For the thread; with `_closing` under `_wake`."""
        self._room = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, entries: list[JournalEntry], durable: Durable) -> None:
        """Queue entries; they share a group. `durable` is called once they are on disk, never before this returns."""
        if self._over:
            return
        self._gathered.append((entries, durable))
        for each in entries:
            if isinstance(each.entry, RecordEntry):
                self._gathered_bytes += len(each.entry.record.encoded)
        if not self._scheduled:
            # What else arrives in this turn of the loop shares the group.
            self._scheduled = True
            self._loop.call_soon(self._write_gathered)

    def room_made(self) -> None:
        """A journal file was released: a group that found none may be tried again."""
        self._room.set()

    async def close(self) -> None:
        """Write what is queued, then end the thread."""
        self._over = True
        self._hand_over(self._take())
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._room.set()
        if self._thread.is_alive():
            await self._loop.run_in_executor(None, self._thread.join)

    # ---- in the loop

    def _write_gathered(self) -> None:
        self._scheduled = False
        if not self._gathered:
            return
        if self._typical_s > self._quick_s or self._gathered_bytes > _SMALL_BYTES:
            self._hand_over(self._take())
        elif not self._in_thread:  # else it is looked at again when the thread has written its own
            self._write_here()

    def _take(self) -> list[Submission]:
        group, self._gathered, self._gathered_bytes = self._gathered, [], 0
        return group

    def _hand_over(self, group: list[Submission]) -> None:
        """It is the thread's."""
        self._in_thread += len(group)
        with self._wake:
            self._waiting += group
            self._wake.notify()

    def _write_here(self) -> None:
        may_wait = not self._journal.has_room_for(self._gathered_bytes)
        group = self._take()
        if may_wait:
            self._hand_over(group)
            return
        began = perf_counter()
        try:
            last = self._append(group)
        except JournalFull:
            self._hand_over(group)
        except BaseException as error:
            self._fail(error)
        else:
            self._announce(group, last, perf_counter() - began)

    def _append(self, group: list[Submission]) -> int:
        """In the loop or in the thread. Raises what Journal.append does."""
        entries = [entry for entries, _ in group for entry in entries]
        return self._journal.append(entries) if entries else 0

    def _written_in_thread(self, group: list[Submission], last: int, took_s: float) -> None:
        self._in_thread -= len(group)
        self._announce(group, last, took_s)
        if not self._scheduled:
            self._write_gathered()

    def _announce(self, group: list[Submission], last: int, took_s: float) -> None:
        self._typical_s += (took_s - self._typical_s) * _WEIGHT
        for _, durable in group:
            durable(last)

    def _fail(self, error: BaseException) -> None:
        self._over = True
        self._on_failure(error)

    # ---- in the thread

    def _run(self) -> None:
        try:
            while group := self._next_group():
                began = perf_counter()
                last = self._append_once_there_is_room(group)
                if last is None:
                    return
                self._loop.call_soon_threadsafe(self._written_in_thread, group, last, perf_counter() - began)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _next_group(self) -> list[Submission]:
        """Empty at the end."""
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            group, self._waiting = self._waiting, []
        return group

    def _append_once_there_is_room(self, group: list[Submission]) -> int | None:
        """None where the journal stayed full until the writer was closed."""
        while True:
            self._room.clear()
            try:
                return self._append(group)
            except JournalFull:
                if self._closing:
                    return None
                self._loop.call_soon_threadsafe(self._on_full)
                self._room.wait(_LOOK_AGAIN_S)
