"""Reads of one segment out of the tables of a member that runs on this machine, without its node.

A short-circuit read, as HDFS calls it. The leader says whether a member's tables may be read and what they have to
reflect (replication/leader.py, `must_reflect`), blockstore/storage/shared_tables.py reads them; here is when that is
done. It is never needed: whatever speaks against it, the leader has a node read.

A read may have to wait for the disk, and with it everything in this event loop. So one that did is followed by a rest,
twenty times as long: reads of what is not in memory go to the nodes, which share them, and this loop spends a
twentieth of its time waiting, at most. A disk that hangs would hold up all volumes of this front-end, though, where it
would otherwise be one member that is away. So as a rule tables are read only where a quorum of the members is on this
machine: where that one hangs, nothing goes on in any case.
"""

import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from blockstore.domain import Position, ReplicaId, TablesPlace
from blockstore.errors import CairnError, Corrupt, OutOfRange
from blockstore.replication.leader import Leader
from blockstore.storage.fence import this_host
from blockstore.units import BlockNumber

if TYPE_CHECKING:
    from blockstore.storage.shared_tables import SharedTables

_log = structlog.get_logger(__name__)
#: Out of memory a read takes 10 to 30 us, and 1 or 2 more for each block.
_LONG_S: Final = 0.0001
_LONG_BLOCK_S: Final = 4e-6
_REST: Final = 20
#: A node gives way to guests by what it hears of them (blockstore/node/guest_traffic.py), so it hears of one so often.
_SHOWN_S: Final = 0.03
#: How often tables are looked at that nobody reads.
_UNUSED_CHECK_S: Final = 1.0
#: Tables that could not be opened are tried again after this: they may have been replaced just then.
_RETRY_S: Final = 1.0


class ShortCircuit:
    """Of one segment, in its event loop. clock: as the leader's. reads: how many were answered here."""

    def __init__(self, leader: Leader, clock: Callable[[], float], checked_s: float, *, always: bool) -> None:
        """checked_s: `check` is called more often than that, or tables are not used.

        always: also where only a minority of the members is on this machine.
        """
        self.reads = 0
        self._leader = leader
        self._always = always
        self._clock = clock
        self._checked_s = checked_s
        self._checked_at = 0.0
        self._used = False
        self._places: dict[ReplicaId, TablesPlace] = {}
        self._tables: SharedTables | None = None
        self._replica = ReplicaId("")
        self._why = ""
        self._open_at = 0.0
        self._rests_until = 0.0
        self._faults = _major_faults()
        self._shown_at = 0.0

    def learn(self, replica: ReplicaId, place: TablesPlace) -> None:
        """Where a member that was just sealed has its tables."""
        if place.host and place.host == this_host():
            self._places[replica] = place

    def forget(self, replica: ReplicaId) -> None:
        """There is no way to its node any more."""
        self._places.pop(replica, None)
        if replica == self._replica:
            self._leave()

    def read(self, start: int, count: int) -> bytes | memoryview | None:
        """The content of these blocks, as a read that comes now has to show it; None: ask the leader."""
        now = self._clock()
        tables = self._tables_for(now)
        if tables is None:
            return None
        needed = self._leader.must_reflect(self._replica, BlockNumber(start), count, now)
        if needed is None:
            return None
        content = self._read_out(tables, start, count, needed)
        ended_at = self._clock()
        took = ended_at - now
        if took > _LONG_S + count * _LONG_BLOCK_S and self._has_waited():
            self._rests_until = ended_at + _REST * took
        if content is None or not self._leader.may_hand_on(ended_at):
            return None
        self.reads += 1
        return content

    def _tables_for(self, now: float) -> "SharedTables | None":
        """Those that a read may come out of now."""
        if not self._places or now < self._rests_until:
            return None
        if now - self._shown_at > _SHOWN_S:
            self._shown_at = now
            return None
        if self._tables is None:
            return self._open(now)
        self._used = True
        return self._tables if now - self._checked_at < self._checked_s else None

    def _read_out(self, tables: "SharedTables", start: int, count: int, needed: Position) -> bytes | memoryview | None:
        applied = tables.applied
        try:
            content = tables.read(start, count, needed)
        except Corrupt as error:  # which the node finds as well, now that it gets all reads again
            _log.warning("tables are not read here any more", replica=self._replica, why=str(error))
            self.forget(self._replica)
            return None
        except OutOfRange:
            return None
        except Exception:  # whatever it is, the node can be asked
            _log.exception("tables could not be read here", replica=self._replica)
            self._leave()
            return None
        if tables.applied != applied:
            self._leader.tables_reflect(tables.applied)
        return content

    def check(self) -> None:
        """Leave tables that were replaced, or whose member cannot be read from now: others may be better.

        What nobody reads is looked at now and then: there may be a thousand of them.
        """
        now = self._clock()
        if self._tables is None or (not self._used and now - self._checked_at < _UNUSED_CHECK_S):
            return
        self._used, self._checked_at = False, now
        if self._tables.is_current and self._has_reason() and self._leader.may_use_tables_of(self._replica, now):
            self._look(self._tables)
        else:
            self._leave()

    def _look(self, tables: "SharedTables") -> None:
        """Also where nobody reads, what tables reflect need not be remembered."""
        try:
            self._leader.tables_reflect(tables.look())
        except CairnError as error:
            _log.warning("tables are not read here any more", replica=self._replica, why=str(error))
            self.forget(self._replica)

    def close(self) -> None:
        self._places.clear()
        self._leave()

    def _open(self, now: float) -> "SharedTables | None":
        if now < self._open_at or not self._has_reason():
            return None
        # What few front-ends need is not loaded at the start of each.
        from blockstore.storage.shared_tables import SharedTables  # noqa: PLC0415

        self._open_at = now + _RETRY_S
        for replica, place in self._places.items():
            if not self._leader.may_use_tables_of(replica, now):
                continue
            try:
                self._tables = SharedTables(place, self._leader.epoch)
            except CairnError as error:
                if str(error) != self._why:
                    self._why = str(error)
                    _log.info("tables cannot be read here", replica=replica, why=self._why)
            else:
                self._why = ""
                self._checked_at, self._used = now, True
                self._leader.follow_writes()  # what they reflect of it shows after a checkpoint
                _log.info("a member is read out of its tables", replica=replica, directory=place.directory)
                self._replica = replica
                return self._tables
        return None

    def _has_reason(self) -> bool:
        """Whether this front-end depends on this machine's disks anyway."""
        members = self._leader.configuration.members
        here = sum(member.replica in self._places for member in members)
        return here > 0 and (self._always or here > len(members) // 2)

    def _has_waited(self) -> bool:
        """Whether this thread has waited for the disk since it was last asked; it may have had to wait its turn."""
        before, self._faults = self._faults, _major_faults()
        return self._faults != before

    def _leave(self) -> None:
        if self._tables is not None:
            self._tables.close()
            self._tables = None
            self._leader.unfollow_writes()


def _major_faults() -> int:
    """How often this thread has waited for a page from the disk; see getrusage(2)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
