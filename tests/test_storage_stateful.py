"""Two replicas of one log against dicts: checkpoints, restarts, seals, merges, and copies between them."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockstore.domain import ORIGIN, Position
from blockstore.log import Filling, LogImage
from blockstore.record import Operation
from blockstore.storage.check import check_replica
from blockstore.storage.copies import copied_position
from blockstore.storage.replica_store import FILE_NAME, ReplicaStore
from blockstore.units import EXTENT_BLOCKS, Generation
from tests.storage_model import EPOCH, Log, block, new_store, pin, position, seal, trim, unpin, write, zero

#: Where it is there, a file system in memory: what this tests is not the disk.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
EXTENTS = 3
BLOCKS = EXTENTS * EXTENT_BLOCKS
#: Few blocks at the extents' edges, so that operations meet each other.
NUMBERS = st.sampled_from([0, 1, 2, 254, 255, 256, 257, 511, 512, 513])
#: What reads look at: runs over those.
WINDOWS = ((0, 6), (252, 8), (508, 8), (766, 2))
COUNTS = st.sampled_from([1, 2, 3, 256, BLOCKS])


class Plan(NamedTuple):
    """An operation in few words, so that a failing example can be read."""

    kind: str
    start: int
    blocks: int
    seed: int = 0

    def operation(self) -> Operation:
        if self.kind == "write":
            return write(self.start, *(block(self.seed + i) for i in range(min(self.blocks, 3))))
        return (trim if self.kind == "trim" else zero)(self.start, self.blocks)


PLANS = st.builds(
    Plan, st.sampled_from(["write", "write", "write", "trim", "zero"]), NUMBERS, COUNTS, st.integers(0, 255)
)


class Replica:
    """A store and how far its replica got, as a follower would know it."""

    def __init__(self, directory: Path, log: Log, digit: int) -> None:
        self.directory = directory / str(digit)
        self.log = log
        self.store = new_store(self.directory, digit)
        self.committed = 0
        self.filling: Filling | None = None
        self.copied = ORIGIN

    def commit(self) -> None:
        self.store.commit(self.log.records[self.committed : self.log.sequence])
        self.committed = self.log.sequence

    def image(self) -> LogImage:
        image = self.log.image(self.committed)
        generation = image.generation
        return LogImage(position(self.committed), EPOCH, 1, self.filling, (), generation, self.copied)

    def checkpoint(self) -> None:
        self.store.checkpoint(self.image(), 0)

    def reopen(self) -> None:
        self.store.close()
        self.store = ReplicaStore.open(self.directory)
        assert (self.store.image.filling, self.store.image.copied) == (self.filling, self.copied)
        self.committed = self.store.applied.sequence


class Replicas(RuleBasedStateMachine):
    """The source is always whole; the target is whole, away, or filling from the source."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(dir=MEMORY)
        self.log = Log()
        self.source = Replica(Path(self.temporary.name), self.log, 1)
        self.target = Replica(Path(self.temporary.name), self.log, 2)
        self.away = False
        self.todo: list[int] | None = None

    @initialize(plans=st.lists(PLANS, max_size=5))
    def start_with_content(self, plans: list[Plan]) -> None:
        for plan in plans:
            self.append(plan)

    @rule(plan=PLANS)
    def append(self, plan: Plan) -> None:
        self.log.record(plan.operation())
        self.follow()

    def follow(self) -> None:
        self.source.commit()
        if not self.away:
            self.target.commit()

    @rule(named=st.booleans())
    def seal(self, named: bool) -> None:
        self.log.record(seal(b"snap-%d" % self.log.generation if named else b""))
        self.follow()

    @precondition(lambda self: any(self.log.pins.values()))
    @rule(data=st.data(), holder=st.sampled_from([b"a", b"b"]))
    def pin(self, data: st.DataObject, holder: bytes) -> None:
        generation = data.draw(st.sampled_from(sorted(g for g, pins in self.log.pins.items() if pins)))
        self.log.record(pin(generation, holder))
        self.follow()

    @precondition(lambda self: any(self.log.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(g for g, pins in self.log.pins.items() if pins)))
        holder = data.draw(st.sampled_from(sorted(self.log.pins[generation])))
        self.log.record(unpin(generation, holder))
        self.follow()

    @rule(which=st.booleans(), reopen=st.booleans())
    def checkpoint(self, which: bool, reopen: bool) -> None:
        replica = self.source if which else self.target
        replica.checkpoint()
        if reopen:
            replica.reopen()

    @rule(which=st.booleans())
    def crash(self, which: bool) -> None:
        replica = self.source if which else self.target
        replica.reopen()
        self.follow()

    @rule(which=st.booleans())
    def merge(self, which: bool) -> None:
        (self.source if which else self.target).store.merge()

    @rule(which=st.booleans())
    def compact(self, which: bool) -> None:
        (self.source if which else self.target).store.compact()

    @precondition(lambda self: self.target.filling is None and not self.away)
    @rule()
    def go_away(self) -> None:
        self.away = True

    @precondition(lambda self: self.away or self.target.filling is not None)
    @rule()
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
        self.away = False
        self.todo = None

    @precondition(lambda self: self.target.filling is not None and self.todo is None)
    @rule()
    def copy_meta(self) -> None:
        assert self.target.filling is not None
        if self.source.store.applied < self.target.filling.base:
            self.source.checkpoint()
        self.write_copy(self.source.store.delta_meta(), [])
        self.todo = self.source.store.delta_extents(self.target.filling.since)

    @precondition(lambda self: bool(self.todo))
    @rule(count=st.integers(1, 2))
    def copy_extents(self, count: int) -> None:
        assert self.todo
        extents = [self.source.store.copy_extent(extent) for extent in self.todo[:count]]
        del self.todo[:count]
        self.write_copy(None, extents)

    def write_copy(self, meta: bytes | None, extents: list[list[bytes]]) -> None:
        parts = [part for extent in extents for part in extent] + ([meta] if meta else [])
        stated = max(Position(*copied_position(part)) for part in parts)
        self.target.copied = max(self.target.copied, stated)
        self.target.store.write_copy(meta, extents, stated, self.target.image())

    @precondition(lambda self: self.target.filling is not None and self.todo == [])
    @rule()
    def become_whole(self) -> None:
        assert self.target.committed >= self.target.copied.sequence
        self.target.filling = None
        self.todo = None
        self.target.checkpoint()
        self.source.checkpoint()
        for generation in self.log.pins:
            if self.log.pins[generation]:
                digests = {r.store.digest(Generation(generation)) for r in (self.source, self.target)}
                assert len(digests) == 1, f"generation {generation}"
        assert self.source.store.digest() == self.target.store.digest()

    @invariant()
    def content_is_as_in_the_model(self) -> None:
        for replica in (self.source, self.target):
            if replica.filling is not None:
                continue
            if replica.committed == self.log.sequence:
                for start, count in WINDOWS:
                    assert replica.store.read(start, count) == self.log.content(start, count)
            for generation, pins in self.log.pins.items():
                if pins and generation < replica.store.image.generation and not self.away:
                    for start, count in WINDOWS:
                        found = replica.store.read_generation(Generation(generation), start, count)
                        assert found == self.log.content(start, count, generation)

    def teardown(self) -> None:
        for replica in (self.source, self.target):
            replica.checkpoint()
            replica.store.close()
            problems = check_replica(replica.directory / FILE_NAME).problems
            assert problems == [], problems[0].what
        self.temporary.cleanup()


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
