"""What goes wrong: one fault after the other, each mended after a while, never more than the cluster must stand.

A fault may take one process, or all nodes at once; a link may be cut in one direction or in both, or one process be cut
off from all others. Before the next fault everything is mended, and who is down is started.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.journal import SimulatedJournalWriter

_REST_S: Final = 0.0, 2.0
#: Mostly shorter than a lease or a keepalive, at times longer than a request may wait.
_LASTS_S: Final = (0.0, 0.5), (0.5, 5.0), (5.0, 20.0)


#: Each with its weight in the choice of the next one.
KINDS: Final = {
    "kill_one": 2,
    "kill_all_nodes": 1,
    "cut_link": 1,
    "isolate": 1,
    "slow": 1,
    "slow_disk": 1,
    "clock": 1,
}


class Faults:
    """kinds: of faults that happen, each with its weight. count: of what was done, by kind."""

    def __init__(self, cluster: SimulatedCluster, kinds: Mapping[str, int] = KINDS) -> None:
        self._cluster = cluster
        self._random = Random(cluster.loop.random.getrandbits(64))
        self._kinds = kinds
        self.count: Counter[str] = Counter()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(*_REST_S))
            (kind,) = self._random.choices(list(self._kinds), weights=list(self._kinds.values()))
            mend = getattr(self, f"_{kind}")()
            self.count[kind] += 1
            await asyncio.sleep(self._random.uniform(*self._random.choice(_LASTS_S)))
            mend()
            for name in self._cluster.names:
                if not self._cluster.is_up(name):
                    self._cluster.start(name)

    def _kill_one(self) -> Callable[[], None]:
        name = self._random.choice(self._cluster.names)
        self._kill(name)
        return _nothing

    def _kill_all_nodes(self) -> Callable[[], None]:
        for name in self._cluster.names:
            if name.startswith("node"):
                self._kill(name)
        return _nothing

    def _kill(self, name: str) -> None:
        if self._cluster.is_up(name):
            self._cluster.kill(name)

    def _cut_link(self) -> Callable[[], None]:
        source, target = self._random.sample(self._cluster.names, 2)
        self._cluster.network.cut(source, target)
        if self._random.random() < 0.5:
            self._cluster.network.cut(target, source)
        return self._cluster.network.mend

    def _isolate(self) -> Callable[[], None]:
        """One of them from all others, or so that it only hears or only speaks."""
        alone, ways = self._random.choice(self._cluster.names), self._random.choice(("both", "hears", "speaks"))
        for other in (*self._cluster.names, "test"):
            if other != alone:
                if ways != "hears":
                    self._cluster.network.cut(other, alone)
                if ways != "speaks":
                    self._cluster.network.cut(alone, other)
        return self._cluster.network.mend

    def _slow(self) -> Callable[[], None]:
        """Every message takes up to half a second."""
        network = self._cluster.network
        usual, network.latency_s = network.latency_s, (0.0, self._random.choice((0.02, 0.5)))

        def mend() -> None:
            network.latency_s = usual

        return mend

    def _slow_disk(self) -> Callable[[], None]:
        """One node's journal takes long for each group; others answer for it meanwhile."""
        name = self._random.choice([name for name in self._cluster.names if name.startswith("node")])
        SimulatedJournalWriter.sync_s[name] = (0.0, self._random.choice((0.1, 3.0)))

        def mend() -> None:
            SimulatedJournalWriter.sync_s.clear()

        return mend

    def _clock(self) -> Callable[[], None]:
        """One machine's time of day jumps, for good."""
        name = self._random.choice(self._cluster.names)
        self._cluster.clocks.skew_s[name] = self._random.choice(
            (-86_400.0 * 365, -3600.0, -5.0, 5.0, 3600.0, 86_400.0 * 365)
        )
        return _nothing


def _nothing() -> None:
    """There is nothing to mend: who was killed is started again in any case."""
