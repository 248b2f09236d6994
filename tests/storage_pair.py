"""Two replicas of one log, one of which is copied from the other: the actions that tests choose from."""

import shutil
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from blockstore.domain import ORIGIN
from blockstore.log import Filling, LogImage
from blockstore.node.scrub_compare import Verdict, compare
from blockstore.record import Operation
from blockstore.storage.check import check_replica
from blockstore.storage.copies import copied_position, decode_meta
from blockstore.storage.keys import blocks_of
from blockstore.storage.memtable import RUN_BLOCKS
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.scrub import ExtentView, ScrubReader
from blockstore.storage.tables import FILE_NAME
from blockstore.units import Generation
from tests.storage_model import EPOCH, Log, block, discard, fill, hydrated, new_store, position, trim, write, zero

#: Where it is there, a file system in memory: what these tests are about is not the disk.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
#: Few blocks at the edges of three extents, so that operations meet each other.
NUMBERS = (0, 1, 2, 254, 255, 256, 257, 511, 512, 513)
COUNTS = (1, 2, 3, 256, 768)
_LONGEST_WRITE = RUN_BLOCKS + 2
#: What reads look at: runs over those.
WINDOWS = ((0, 6), (252, 8), (508, 8), (766, 2))
#: What a restored volume's source maps, of those.
MAPPED = (1, 2, 255, 256, 512)


class Plan(NamedTuple):
    """An operation in few words, so that a failing example can be read."""

    kind: str
    start: int
    blocks: int
    seed: int = 0

    def operation(self) -> Operation:
        if self.kind == "write":
            return write(self.start, *(block(self.seed + i) for i in range(min(self.blocks, _LONGEST_WRITE))))
        return {"trim": trim, "zero": zero, "discard": discard}[self.kind](self.start, self.blocks)


class Replica:
    """A store and how far its replica got, as a follower would know it."""

    def __init__(self, directory: Path, log: Log, digit: int) -> None:
        self.directory = directory / str(digit)
        self.log = log
        self.digit = digit
        self.store = new_store(self.directory, digit, b"snap" if log.source else b"")
        self.committed = 0
        self.filling: Filling | None = None
        self.copied = ORIGIN

    def commit(self) -> None:
        self.store.commit(self.log.records[self.committed : self.log.sequence])
        self.committed = self.log.sequence

    def image(self) -> LogImage:
        generation = self.log.image(self.committed).generation
        return LogImage(position(self.committed), EPOCH, 1, self.filling, (), generation, self.copied)

    def checkpoint(self) -> None:
        self.store.checkpoint(self.image(), 0)

    def reopen(self) -> None:
        """What was committed and not checkpointed is gone."""
        self.store.close()
        self.store = ReplicaStore.open(self.directory)
        assert (self.store.image.filling, self.store.image.copied) == (self.filling, self.copied)
        self.committed = self.store.applied.sequence

    def lose_everything(self) -> None:
        """Its tables are gone; what is made in their place knows of nothing, not even of a source."""
        self.store.close()
        shutil.rmtree(self.directory)
        self.store = new_store(self.directory, self.digit)
        self.filling, self.copied = None, ORIGIN


def view_alike(own: ScrubReader, peer: ScrubReader, extent: int) -> tuple[ExtentView, ExtentView]:
    """What both show, of the generations that both can show."""
    theirs = peer.view(extent, own.view(extent).generations)
    return own.view(extent, theirs.generations), theirs


class Pair:
    """The source is always whole; the target is whole, away, or filling from the source.

    todo: the extents that a copy under way has still to bring; None without one. lagging: the target
    gets no records for now, so that what is copied to it is ahead of its own log.
    """

    def __init__(self, directory: Path, *, restored: bool = False) -> None:
        self.log = Log(source={number: block(1000 + number) for number in MAPPED} if restored else {})
        self.source = Replica(directory, self.log, 1)
        self.target = Replica(directory, self.log, 2)
        self.away = False
        self.lagging = False
        self.todo: list[int] | None = None

    def append(self, operation: Operation) -> None:
        self.log.record(operation)
        self.follow()

    def discard(self, plan: Plan) -> None:
        """The blocks of the plan that the source does not map: the others need a trim."""
        numbers = [n for n in range(plan.start, plan.start + plan.blocks) if n not in self.log.source]
        if self.log.hydrated:
            self.append(trim(plan.start, plan.blocks))
        elif numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
            self.append(discard(numbers[0], len(numbers)))

    def fill(self, number: int) -> None:
        """As a front-end does behind its guest: also a block that the guest has written meanwhile."""
        if number in self.log.source and not self.log.hydrated:
            self.append(fill(number, self.log.source[number]))

    def hydrate(self) -> None:
        """The blocks that nobody wrote come from the source, and that ends."""
        if self.log.source and not self.log.hydrated:
            for number in sorted(self.log.absent(0, 1024)):
                self.fill(number)
            self.append(hydrated())

    def follow(self) -> None:
        self.source.commit()
        if not self.away and not self.lagging:
            self.target.commit()

    def pinned(self) -> list[int]:
        return sorted(generation for generation, pins in self.log.pins.items() if pins)

    def crash(self, replica: Replica) -> None:
        replica.reopen()
        self.follow()

    def begin_to_fill(self) -> None:
        """Or begin anew: what was copied before is void, and the live stream starts at a new base."""
        target = self.target
        since = target.store.applied.sequence if target.filling is None else target.filling.since
        base = position(self.log.sequence)
        target.filling = Filling(base, base, since)
        target.copied = ORIGIN
        target.store.reset()
        target.committed = self.log.sequence
        target.checkpoint()
        self.away = self.lagging = False
        self.todo = None

    def lose_the_target(self) -> None:
        if self.log.sequence:
            self.target.lose_everything()
            self.begin_to_fill()

    def copy_meta(self) -> None:
        assert self.target.filling is not None
        if self.source.store.applied < self.target.filling.base:
            self.source.checkpoint()
        self._write_copy(self.source.store.delta_meta(), [])
        self.todo = self.source.store.delta_extents(self.target.filling.since)

    def copy_extents(self, count: int) -> None:
        assert self.todo is not None
        extents = [self.source.store.copy_extent(extent) for extent in self.todo[:count]]
        del self.todo[:count]
        self._write_copy(None, extents)

    def _write_copy(self, meta: bytes | None, extents: list[list[bytes]]) -> None:
        parts = [part for extent in extents for part in extent] + ([meta] if meta else [])
        stated = max(copied_position(part) for part in parts)
        self.target.copied = max(self.target.copied, stated)
        self.target.store.write_copy(meta, extents, stated, self.target.image())

    def become_whole(self) -> None:
        assert self.todo == []
        self.lagging = False
        self.follow()
        assert self.target.committed >= self.target.copied.sequence
        self.target.filling = None
        self.todo = None
        self.target.checkpoint()
        self.source.checkpoint()
        self.check_same()

    def check_same(self) -> None:
        """Both are whole and have applied all: they show the same, and keep it for the same holders."""
        for replica in (self.source, self.target):
            pins = {(pin.generation, pin.holder) for pin in decode_meta(replica.store.delta_meta()).pins}
            assert pins == {(generation, holder) for generation, held in self.log.pins.items() for holder in held}
        for generation in (*map(Generation, self.pinned()), None):
            digests = {replica.store.digest(generation) for replica in (self.source, self.target)}
            assert len(digests) == 1, f"the replicas differ in generation {generation}"

    def check_content(self) -> None:
        """What is whole and up to date shows what the log says."""
        for replica in (self.source, self.target):
            if replica.filling is not None or self.lagging:
                continue
            for start, count in WINDOWS if replica.committed == self.log.sequence else ():
                self.check_absent(replica, start, count)
                assert replica.store.read(start, count) == self.log.content(start, count)
            for generation in self.pinned() if not self.away else ():
                for start, count in WINDOWS if generation < replica.store.image.generation else ():
                    found = replica.store.sealed.read(Generation(generation), start, count)
                    assert found == self.log.content(start, count, generation, replica.store.applied.sequence)
            if not self.away:
                self.check_changes(replica)

    def check_scrub(self) -> None:
        """Whatever ran on one of two whole replicas and not on the other: scrub finds no damage and no difference."""
        if self.target.filling is not None or self.target.store.image.filling is not None:
            return
        source, target = self.source.store.scrub, self.target.store.scrub
        for extent in sorted({*source.extents(0, 100), *target.extents(0, 100)}):
            views = view_alike(source, target, extent)
            assert compare(*views) is not Verdict.DIFFERENT, f"extent {extent} seems to differ: {views}"
        (at, pins), (other, other_pins) = source.pins(), target.pins()
        assert at != other or pins == other_pins

    def check_changes(self, replica: Replica) -> None:
        """Between each two pinned generations, every block that differs is listed."""
        pinned = [generation for generation in self.pinned() if generation < replica.store.image.generation]
        for older, newer in combinations(pinned, 2):
            before, after = self.log.blocks[older], self.log.blocks[newer]
            differing = {number for number in {*before, *after} if before.get(number) != after.get(number)}
            changes = replica.store.sealed.changes(older + 1, newer, 0, 1000)
            assert differing <= {number for extent, bits in changes for number in blocks_of(extent, bits)}

    def check_absent(self, replica: Replica, start: int, count: int) -> None:
        """With a source, what nobody wrote is told as absent, and no block that has content here."""
        assert replica.store.has_source == (bool(self.log.source) and not self.log.hydrated)
        _, runs = replica.store.read_with_absent(start, count)
        absent = {number for first, length in runs for number in range(first, first + length)}
        if replica.store.has_source:
            assert absent & set(self.log.source) == self.log.absent(start, count)

    def close(self) -> None:
        """Also what no read shows must be in order."""
        for replica in (self.source, self.target):
            replica.checkpoint()
            replica.store.close()
            problems = check_replica(replica.directory / FILE_NAME).problems
            assert problems == [], problems[0].what
