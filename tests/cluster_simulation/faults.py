"""What goes wrong in a simulated cluster, all at the same time: each fault begins, lasts, and is mended.

Two kinds of them, by what the cluster promises:

- What passes leaves all that was synced on the disks: processes are killed, machines lose their power, links are cut,
  processes, disks and links are slow, disks are full, clocks jump. Any number of these may overlap, of any majority:
  nothing acknowledged is lost, and once they are over the cluster mends itself.
- What takes data that was synced, of one node: an old copy is put back, bits flip, an empty disk replaces its own.
  That is no more than a minority of any segment where all others are whole: so before it everything rests until the
  cluster is whole, which is a check by itself, and it stays the only one until the cluster is whole again. The node is
  away for some seconds first, so that the others know what it has acked (design, rule 10).

Scenes (scenes.py) begin with a cluster that is whole as well, and have it for themselves.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from random import Random
from typing import Final, TypeVar

from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.disk import rot
from tests.cluster_simulation.guests import Guests
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.scenes import Scenes

_REST_S: Final = 0.0, 3.0
#: Mostly shorter than a lease or a keepalive, at times longer than a request may wait.
_LASTS_S: Final = (0.0, 0.5), (0.0, 0.5), (0.5, 5.0), (0.5, 5.0), (5.0, 20.0)
#: How many faults that pass may overlap.
_AT_ONCE: Final = 2
#: Between two that have the cluster for themselves, and where there are no others; how long a node is away before;
#: within which the cluster is whole again after all faults.
_BETWEEN_S: Final = 5.0, 15.0
_BETWEEN_ALONE_S: Final = 0.5, 3.0
_AWAY_S: Final = 4.0, 12.0
#: How long a node lacks what others write, or is away; until control has heard who has acked what.
_BEHIND_S: Final = 2.0, 6.0
_TOLD_S: Final = 4.0
WHOLE_S: Final = 240.0

#: Each with its weight in the choice of the next one.
PASSING: Final = {
    "kill_one": 2,
    "kill_several": 1,
    "power_cut": 2,
    "cut_link": 2,
    "isolate": 2,
    "partition": 2,
    "slow_network": 1,
    "slow_front_end": 1,
    "lossy_network": 1,
    "slow_process": 1,
    "slow_disk": 1,
    "full_disk": 1,
    "clock": 1,
    "etcd_compacts": 1,
}
TAKING: Final = {"old_copy": 1, "rot": 1, "lost_disk": 1}
#: Orders of events that a rule is for (scenes.py).
STAGED: Final = {"taken_over": 2, "cut_off_changing": 1, "sealed_late": 1, "used_while_it_hydrates": 1}
KINDS: Final = PASSING | TAKING | STAGED

Mend = Callable[[], None]
K = TypeVar("K")
V = TypeVar("V")


class Faults:
    """kinds: of faults that happen, each with its weight. count: of what was done, by kind."""

    def __init__(self, cluster: SimulatedCluster, guests: Guests, kinds: Mapping[str, int] = KINDS) -> None:
        self._cluster = cluster
        self._random = Random(cluster.loop.random.getrandbits(64))
        self._passing = {kind: weight for kind, weight in kinds.items() if kind in PASSING}
        self._alone = {kind: weight for kind, weight in kinds.items() if kind in TAKING | STAGED}
        self._scenes = Scenes(cluster, guests, Random(self._random.getrandbits(64)))
        self._going_on = 0
        self._may_begin = asyncio.Event()
        self._may_begin.set()
        self._to_mend: dict[Mend, None] = {}
        self._copy = ""
        """The node of which there is an old copy."""
        self.lost_writes = 0
        self.rotten_journals: set[str] = set()
        """The nodes with a bit flipped in what may be there still, though nobody needs it."""
        self.count: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled. Raises AssertionError where the cluster does not become whole in between."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE if self._passing else 0):
                group.create_task(self._pass())
            if self._alone:
                group.create_task(self._one_alone())

    def heal(self) -> None:
        """The last ones are over, too."""
        self._cluster.busy.set()
        for mend in self._to_mend:
            mend()
        self._cluster.start_all()

    # ---- what passes

    async def _pass(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(*_REST_S))
            await self._may_begin.wait()
            (kind,) = self._random.choices(list(self._passing), weights=list(self._passing.values()))
            self._going_on += 1
            mend: Mend = getattr(self, f"_{kind}")()
            self._to_mend[mend] = None
            self.count[kind] += 1
            await asyncio.sleep(self._random.uniform(*self._random.choice(_LASTS_S)))
            del self._to_mend[mend]
            mend()
            self._going_on -= 1

    def _any(self, kind: str = "") -> str:
        return self._random.choice(self._cluster.of_kind(kind))

    def _kill_one(self) -> Mend:
        return self._killed([self._any()])

    def _kill_several(self) -> Mend:
        """All of one kind, or as many as it happens to be."""
        kind = self._random.choice(("node", "node", "front-end", "control", "etcd"))
        names = self._cluster.of_kind(kind)
        return self._killed(self._random.sample(names, self._random.randint(min(2, len(names)), len(names))))

    def _killed(self, names: Iterable[str]) -> Mend:
        victims = [name for name in names if self._cluster.is_up(name)]
        for name in victims:
            self._cluster.kill(name)
        return lambda: self._start(victims)

    def _power_cut(self) -> Mend:
        """Of one machine, of all nodes, or of everything."""
        names = self._random.choice(([self._any("node")], self._cluster.of_kind("node"), self._cluster.names))
        victims = [name for name in names if self._cluster.is_up(name)]
        for name in victims:
            self.lost_writes += self._cluster.cut_power(name, self._random)
        return lambda: self._start(victims)

    def _start(self, names: Iterable[str]) -> None:
        for name in names:
            if not self._cluster.is_up(name):
                self._cluster.start(name)

    def _cut_link(self) -> Mend:
        source, target = self._random.sample(self._cluster.names, 2)
        both = self._random.random() < 0.5
        return self._cluster.network.cut([(source, target), (target, source)] if both else [(source, target)])

    def _isolate(self) -> Mend:
        """One of them from all others, or so that it only hears or only speaks."""
        alone, ways = self._any(), self._random.choice(("both", "hears", "speaks"))
        others = [name for name in (*self._cluster.names, "test") if name != alone]
        links = [(other, alone) for other in others if ways != "hears"]
        return self._cluster.network.cut(links + [(alone, other) for other in others if ways != "speaks"])

    def _partition(self) -> Mend:
        """All of them into two sides that do not hear each other: a front-end with some of the nodes, and the rest."""
        here = {name for name in self._cluster.names if self._random.random() < 0.3} | {self._any("front-end")}
        there = [name for name in self._cluster.names if name not in here]
        between = [(one, other) for one in sorted(here) for other in there]
        return self._cluster.network.cut(between + [(other, one) for one, other in between])

    def _slow_network(self) -> Mend:
        """Every message to and from one of them takes up to half a second."""
        return _set_for_now(self._cluster.network.latency_of, self._any(), (0.0, self._random.choice((0.02, 0.5))))

    def _slow_front_end(self) -> Mend:
        """One of the front-ends hears and says everything late: what is to happen at several at once does not."""
        return _set_for_now(self._cluster.network.latency_of, self._any("front-end"), (0.0, 0.5))

    def _lossy_network(self) -> Mend:
        """Of what one of them sends and hears a share is lost: TCP sends it again, and all behind it waits."""
        return _set_for_now(self._cluster.network.lost_of, self._any(), self._random.choice((0.02, 0.2)))

    def _slow_process(self) -> Mend:
        """What it does in threads takes long: LMDB's commits, reads, hashing."""
        return _set_for_now(self._cluster.loop.thread_s_of, self._any(), (0.0, self._random.choice((0.1, 1.0))))

    def _slow_disk(self) -> Mend:
        """One node's journal takes long for each group; others answer for it meanwhile."""
        slow = 0.0, self._random.choice((0.1, 3.0))
        return _set_for_now(SimulatedJournalWriter.sync_s, self._any("node"), slow)

    def _full_disk(self) -> Mend:
        """Of one node, or of all."""
        nodes = self._cluster.of_kind("node")
        full = nodes if self._random.random() < 0.2 else [self._random.choice(nodes)]
        self._cluster.machines.full.update(full)
        return lambda: self._cluster.machines.full.difference_update(full)

    def _clock(self) -> Mend:
        """One machine's time of day jumps, for good."""
        jump_s = self._random.choice((-86_400.0 * 365, -3600.0, -5.0, 5.0, 3600.0, 86_400.0 * 365))
        self._cluster.machines.skew_s[self._any()] = jump_s
        return lambda: None

    def _etcd_compacts(self) -> Mend:
        """It forgets all that was before: whoever follows it, and is behind, begins anew."""
        if self._cluster.records:
            self._cluster.records.compact()
        return lambda: None

    # ---- one at a time

    async def _one_alone(self) -> None:
        """What takes data, and scenes: each from a cluster that is whole."""
        while True:
            await asyncio.sleep(self._random.uniform(*(_BETWEEN_S if self._passing else _BETWEEN_ALONE_S)))
            self._may_begin.clear()
            await self._until_whole()
            (kind,) = self._random.choices(list(self._alone), weights=list(self._alone.values()))
            self.count[kind] += 1
            if kind in STAGED:
                await getattr(self._scenes, kind)()
            else:
                await self._take(kind, self._any("node"))
            self._may_begin.set()

    async def _take(self, kind: str, name: str) -> None:
        if kind != "old_copy":
            await self._hit(name, getattr(self, f"_{kind}"))
        elif self._copy:
            await self._put_back(self._copy)
        else:
            await self._remember(name)

    async def _until_whole(self) -> None:
        async def whole() -> bool:
            return not self._going_on and await self._cluster.whole()

        try:
            await self._cluster.until("the cluster is whole between faults", whole, WHOLE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {(await self._cluster.status()).problems}") from error

    async def _remember(self, name: str) -> None:
        """It is restarted, and what it had on its disk is kept."""
        self._cluster.kill(name)
        shutil.rmtree(self._cluster.scratch("old"), ignore_errors=True)
        shutil.copytree(self._cluster.place(name), self._cluster.scratch("old"))
        self._copy = name
        self._cluster.start(name)

    async def _hit(self, name: str, damage: Callable[[str], Awaitable[None]]) -> None:
        self._cluster.kill(name)
        await asyncio.sleep(self._random.uniform(*_AWAY_S))
        await damage(name)
        self._cluster.start(name)

    async def _put_back(self, name: str) -> None:
        """The old copy, in the worst moment: one node lacks what the copy lacks, and the third one is away.

        So the first two alone must not be taken for a quorum that knows, above all not by who attaches then. Guests
        pause before the node goes: what it acked has been told to control by then, which is all that the rule promises
        to know.
        """
        behind, away = await self._scenes.beside(name)
        self._cluster.kill(behind)
        await asyncio.sleep(self._random.uniform(*_BEHIND_S))
        self._cluster.busy.clear()
        await asyncio.sleep(_TOLD_S)
        attached_anew = self._cluster.of_kind("front-end") if self._random.random() < 0.7 else []
        for gone in (name, away, *attached_anew):
            self._cluster.kill(gone)
        self._cluster.busy.set()
        place = self._cluster.place(name)
        shutil.rmtree(place)
        shutil.copytree(self._cluster.scratch("old"), place)
        self._copy = ""
        self._start((name, behind, *attached_anew))
        await asyncio.sleep(self._random.uniform(*_BEHIND_S))
        self._cluster.start(away)

    async def _rot(self, name: str) -> None:
        if rot(self._cluster.place(name), self._random):
            self.rotten_journals.add(name)

    async def _lost_disk(self, name: str) -> None:
        """It comes back as another node, with an empty disk."""
        shutil.rmtree(self._cluster.place(name))
        if self._copy == name:
            self._copy = ""


def _set_for_now(table: dict[K, V], name: K, value: V) -> Mend:
    table[name] = value
    return lambda: _forget(table, name)


def _forget(table: dict[K, V], name: K) -> None:
    table.pop(name, None)
