"""The last changes of a store, in memory: what watchers are told, and what listings are made of.

Invariants: changes stand in the order of their revisions, and all above `_held_above` are here; whoever
asks for older ones gets Compacted. Safe between threads: a store may write in one of its own.
"""

import threading
from bisect import insort
from collections import deque
from collections.abc import Iterable
from itertools import takewhile
from operator import attrgetter

from blockstore.control.metastore.interface import Change, Compacted, KeyValue, Listing, Revision, Step


class History:
    """Up to `limit` changes; the first one that may be added is above `revision`."""

    def __init__(self, revision: Revision, limit: int) -> None:
        self._held_above = revision
        self._changes: deque[Change] = deque(maxlen=limit)
        self._lock = threading.Lock()

    def add(self, change: Change) -> None:
        """A further one, above all that are here."""
        with self._lock:
            if len(self._changes) == self._changes.maxlen:
                self._held_above = self._changes[0].revision
            self._changes.append(change)

    def begin(self, revision: Revision) -> None:
        """All before is forgotten: the next change is above `revision`."""
        with self._lock:
            self._changes.clear()
            self._held_above = revision

    def last(self) -> Revision:
        """Of the newest change, or where it began."""
        with self._lock:
            return self._changes[-1].revision if self._changes else self._held_above

    def forget_above(self, revision: Revision) -> None:
        """Take back what did not come to be."""
        with self._lock:
            while self._changes and self._changes[-1].revision > revision:
                self._changes.pop()

    def between(self, after: Revision, until: Revision) -> tuple[Change, ...]:
        """Those with a revision above `after`, up to `until`, oldest first. Raises Compacted where one is not held."""
        with self._lock:
            if after < self._held_above:
                raise Compacted(f"changes above revision {after} are no longer held, only above {self._held_above}")
            newest_first = tuple(takewhile(lambda change: change.revision > after, reversed(self._changes)))
        return tuple(each for each in reversed(newest_first) if each.revision <= until)


class Listings:
    """The last listing of each prefix: a few are asked for many times a second, and little changes between."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._last: dict[str, Listing] = {}

    def follow(self, prefix: str, revision: Revision) -> Listing | None:
        """The listing at `revision`, out of the last one and the changes since; None where these do not tell."""
        last = self._last.get(prefix)
        if last is None:
            return None
        try:
            changes = self._history.between(last.revision, revision)
        except Compacted:
            return None
        if step := _step(last.items, changes, prefix):
            return self.keep(prefix, Listing(revision, _followed(step), step))
        return self.keep(prefix, Listing(revision, last.items, last.step))

    def keep(self, prefix: str, listing: Listing) -> Listing:
        """The listing, which later ones are made of."""
        self._last[prefix] = listing
        return listing


def _step(items: tuple[KeyValue, ...], changes: Iterable[Change], prefix: str) -> Step | None:
    """What the changes do to keys under `prefix`; None where nothing."""
    changed = {
        key: None if value is None else KeyValue(key, value, each.revision)
        for each in changes
        for key, value in each.values.items()
        if key.startswith(prefix)
    }
    return Step(items, changed) if changed else None


def _followed(step: Step) -> tuple[KeyValue, ...]:
    """The keys after it."""
    left = [each for each in step.before if each.key not in step.changed]
    for now in step.changed.values():
        if now is not None:
            # By characters: in UTF-8 that is the order of the bytes.
            insort(left, now, key=attrgetter("key"))
    return tuple(left)
