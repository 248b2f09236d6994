"""Two replicas of one log against dicts: checkpoints, restarts, seals, merges, and copies between them."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.storage_model import pin, seal, unpin
from tests.storage_pair import COUNTS, MAPPED, MEMORY, NUMBERS, Pair, Plan, Replica

#: It waits for nothing: it takes what it takes of a processor that others use as well.
pytestmark = pytest.mark.timeout(600)

PLANS = st.builds(
    Plan,
    st.sampled_from(["write", "write", "write", "trim", "zero"]),
    st.sampled_from(NUMBERS),
    st.sampled_from(COUNTS),
    st.integers(0, 255),
)


class Replicas(RuleBasedStateMachine):
    """Chooses actions; Pair carries them out and knows what must hold."""

    restored = False

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(dir=MEMORY)
        self.pair = Pair(Path(self.temporary.name), restored=self.restored)

    def replica(self, which: bool) -> Replica:
        return self.pair.source if which else self.pair.target

    @initialize(plans=st.lists(PLANS, max_size=5))
    def start_with_content(self, plans: list[Plan]) -> None:
        for plan in plans:
            self.pair.append(plan.operation())

    @rule(plan=PLANS)
    def append(self, plan: Plan) -> None:
        self.pair.append(plan.operation())

    @rule(named=st.booleans())
    def seal(self, named: bool) -> None:
        self.pair.append(seal(b"snap-%d" % self.pair.log.generation if named else b""))

    @precondition(lambda self: self.pair.pinned())
    @rule(data=st.data(), holder=st.sampled_from([b"a", b"b"]))
    def pin(self, data: st.DataObject, holder: bytes) -> None:
        self.pair.append(pin(data.draw(st.sampled_from(self.pair.pinned())), holder))

    @precondition(lambda self: self.pair.pinned())
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(self.pair.pinned()))
        self.pair.append(unpin(generation, data.draw(st.sampled_from(sorted(self.pair.log.pins[generation])))))

    @rule(which=st.booleans(), reopen=st.booleans())
    def checkpoint(self, which: bool, reopen: bool) -> None:
        self.replica(which).checkpoint()
        if reopen:
            self.replica(which).reopen()

    @rule(which=st.booleans())
    def crash(self, which: bool) -> None:
        self.pair.crash(self.replica(which))

    @rule(which=st.booleans())
    def merge(self, which: bool) -> None:
        self.replica(which).store.merge()

    @rule(which=st.booleans())
    def compact(self, which: bool) -> None:
        self.replica(which).store.compact()

    @precondition(lambda self: self.pair.target.filling is None and not self.pair.away)
    @rule()
    def go_away(self) -> None:
        self.pair.away = True

    @precondition(lambda self: self.pair.away or self.pair.target.filling is not None)
    @rule()
    def begin_to_fill(self) -> None:
        self.pair.begin_to_fill()

    @rule()
    def lose_the_target(self) -> None:
        self.pair.lose_the_target()

    @precondition(lambda self: self.pair.target.filling is not None and self.pair.todo is None)
    @rule()
    def copy_meta(self) -> None:
        self.pair.copy_meta()

    @precondition(lambda self: bool(self.pair.todo))
    @rule(count=st.integers(1, 2))
    def copy_extents(self, count: int) -> None:
        self.pair.copy_extents(count)

    @precondition(lambda self: self.pair.target.filling is not None and self.pair.todo == [])
    @rule()
    def become_whole(self) -> None:
        self.pair.become_whole()

    @invariant()
    def content_is_as_in_the_model(self) -> None:
        self.pair.check_content()

    @invariant()
    def scrub_finds_nothing(self) -> None:
        self.pair.check_scrub()

    def teardown(self) -> None:
        self.pair.close()
        self.temporary.cleanup()


class RestoredReplicas(Replicas):
    """Of a volume with a source, which is filled from it."""

    restored = True

    @rule(plan=PLANS)
    def discard(self, plan: Plan) -> None:
        self.pair.discard(plan)

    @rule(number=st.sampled_from(MAPPED))
    def fill(self, number: int) -> None:
        self.pair.fill(number)

    @rule()
    def hydrate(self) -> None:
        self.pair.hydrate()


SETTINGS = settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestReplicas = Replicas.TestCase
TestReplicas.settings = SETTINGS
TestRestoredReplicas = RestoredReplicas.TestCase
TestRestoredReplicas.settings = SETTINGS
