"""Writes, trims, snapshots, restores, deletions and prunes while control, snapshotd, nodes and front-ends are killed.

Random sequences of these against real processes; at the end every completed snapshot must be exactly its content, and
once all are deleted a prune must leave nothing. Nodes scrub
all the time, and find nothing. The model is in tests/crash/snapshots.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.cluster import Cluster
from tests.crash.scrubbing import SCRUBBING, assert_no_alarm
from tests.crash.snapshots import BLOCKS, CONTENTS, Play, Possible, Volume, Wrong, content_of, judge
from tests.daemons import Daemon

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(900)]

#: Each takes some seconds; a failure shows its steps, which shrinking would run for an hour to make fewer.
EXAMPLES = 4
_AFTER_S = st.floats(0, 0.1)

volumes = st.integers(0, 1)
snapshots = st.integers(0, 7)
daemons = st.sampled_from(["control", "snapshotd-0", "snapshotd-1", "node-0", "node-1", "node-2", "front-end-0"])
pruners = st.integers(0, 1)
ranges = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 96))
# Consecutive contents from one on: 0 is a trim. A stride of 0 is one content everywhere.
numbers = st.tuples(st.integers(0, CONTENTS - 1), st.integers(0, 3))
during = st.one_of(
    st.none(),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("kill"), daemons),
    st.tuples(st.just("prune"), pruners),
)
steps = st.one_of(
    st.tuples(st.just("write"), volumes, ranges, numbers, during, st.integers(0, 40)),
    st.tuples(st.just("snapshot"), volumes),
    st.tuples(st.just("snapshot, killed"), volumes, daemons, _AFTER_S),
    st.tuples(st.just("restore"), snapshots),
    st.tuples(st.just("delete"), snapshots),
    st.tuples(st.just("prune"), pruners),
    st.tuples(st.just("prune, killed"), pruners, _AFTER_S),
    st.tuples(st.just("kill"), daemons),
)


class Steps:
    """Of one example. Volumes and snapshots are chosen by number, from those that there are."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.play = Play(cluster)

    def step(self, step: tuple[Any, ...]) -> None:
        play = self.play
        match step:
            case ("write", volume, (start, length), (first, stride), during, at):
                changes = {
                    block: (first + stride * (block - start)) % CONTENTS
                    for block in range(start, min(start + length, BLOCKS))
                }
                chosen = self.volume(volume)
                event = None if during is None else lambda: self.during(during, chosen)
                play.write(chosen, changes, event, min(at, len(changes) - 1))
                play.start_killed()
            case ("snapshot", volume):
                play.snapshot(self.volume(volume))
            case ("snapshot, killed", volume, daemon, after_s):
                play.killed(lambda: play.snapshot(self.volume(volume)), self.daemon(daemon), after_s)
            case ("restore", number) if play.snapshots:
                play.restore(self.snapshot(number))
            case ("delete", number) if play.snapshots:
                play.delete(self.snapshot(number))
            case ("prune", daemon):
                play.prune(self.cluster.snapshotds[daemon])
            case ("prune, killed", daemon, after_s):
                pruner = self.cluster.snapshotds[daemon]
                play.killed(lambda: play.prune(pruner), pruner, after_s)
            case ("kill", daemon):
                play.kill(self.daemon(daemon))

    def during(self, event: tuple[Any, ...], volume: Volume) -> None:
        """In the middle of a write."""
        match event:
            case ("snapshot",):
                self.play.snapshot(volume)
            case ("kill", daemon):
                self.daemon(daemon).kill()
            case ("prune", daemon):
                self.play.prune(self.cluster.snapshotds[daemon])

    def volume(self, number: int) -> Volume:
        return self.play.volumes[number % len(self.play.volumes)]

    def snapshot(self, number: int) -> str:
        return sorted(self.play.snapshots)[number % len(self.play.snapshots)]

    def daemon(self, name: str) -> Daemon:
        (found,) = [each for each in self.cluster.daemons if each.name == name]
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("snapshots"), snapshotds=2, node_settings=SCRUBBING) as running:
        yield running


ALL_KINDS = [
    ("write", 0, (0, 500), (1, 1), None, 0),
    ("snapshot, killed", 0, "snapshotd-0", 0.05),
    ("write", 0, (200, 96), (0, 0), ("snapshot",), 30),
    ("snapshot, killed", 0, "control", 0.01),
    ("write", 0, (190, 30), (3, 2), ("kill", "control"), 5),
    ("write", 0, (300, 96), (7, 3), ("kill", "front-end-0"), 40),
    ("snapshot", 0),
    ("restore", 0),
    ("write", 1, (230, 60), (5, 1), ("kill", "node-0"), 20),
    ("snapshot", 1),
    ("delete", 0),
    ("prune, killed", 0, 0.05),
    ("write", 1, (100, 90), (9, 2), ("prune", 1), 10),
    ("snapshot, killed", 1, "front-end-0", 0.01),
    ("delete", 1),
    ("prune", 1),
    ("kill", "snapshotd-1"),
    ("restore", 2),
]


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(chosen=ALL_KINDS)
@given(chosen=st.lists(steps, min_size=6, max_size=14))
def test_every_completed_snapshot_is_exactly_its_content(cluster: Cluster, chosen: list[tuple[Any, ...]]) -> None:
    played = Steps(cluster)
    for each in chosen:
        played.step(each)
    played.play.check_all()
    assert_no_alarm(cluster)
    played.play.end()


# ---- the model finds what is wrong


def test_what_may_be_is_settled_by_what_is() -> None:
    blocks: Possible = [frozenset({1}), frozenset({2, 3})]
    judge("it", blocks, content_of(1) + content_of(3))
    assert blocks == [frozenset({1}), frozenset({3})]
    with pytest.raises(Wrong, match=r"block 1 .* shows content 2, expected one of \[3\]"):
        judge("it", blocks, content_of(1) + content_of(2))
    with pytest.raises(Wrong, match=r"block 0 .* shows content None"):
        judge("it", blocks, b"x" * 8192)
