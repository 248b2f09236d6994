"""One run: a plan drawn from the seed, three or five nodes, front-ends that come and go, faults, an end.

First everything goes wrong that the plan holds; then all is healed, and the replicas must become whole
and show the same. Every random choice comes from one generator, in the order of virtual time.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final

from blockstore.domain import ORIGIN, Configuration, Member, NodeId, Position, ReplicaId
from blockstore.errors import Corrupt
from blockstore.log import UNKNOWN_FLOOR, Filling, LogImage
from blockstore.units import Epoch, Sequence
from tests.simulation.checkers import Checker
from tests.simulation.describe import describe
from tests.simulation.disk import Disk
from tests.simulation.faults import Faults
from tests.simulation.front_end import FrontEnd
from tests.simulation.members import Members
from tests.simulation.network import Network
from tests.simulation.node import DiskSpeed, Node
from tests.simulation.old_copies import OldCopies
from tests.simulation.plan import draw_plan
from tests.simulation.scheduler import Scheduler
from tests.simulation.violation import Violation

#: Virtual seconds within which a healed cluster must have converged.
CONVERGENCE_S: Final = 30.0
_ENOUGH_EVENTS: Final = 60_000
#: Of so many seeds, in these the members change.
_SEEDS: Final = 20
_CHANGING: Final = frozenset({3, 7, 13, 15, 19})
#: And in these disks are full; where members change as well, all kinds of trouble come together.
_FULL: Final = frozenset({5, 13})
#: Of so many times that many seeds, in one front-ends read tables.
_READING_TABLES: Final = 4
#: Above every ticket's number.
_SOURCE_VALUES: Final = 1 << 40


class World:
    """A run of one seed. seen: how often what happened; trace_lines: all of it, where tracing is on."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.random = Random(seed)
        kind = seed % _SEEDS
        #: Whether front-ends read the tables of members by themselves, as those on one machine with a node do.
        self.reads_tables = seed // _SEEDS % _READING_TABLES == 1
        self.plan = draw_plan(self.random, changes=kind in _CHANGING, full_disks=kind in _FULL)
        self.scheduler = Scheduler()
        self.network = Network(self.scheduler, self.random, self.plan.network)
        self.trace_lines: list[str] = []
        self.seen: Counter[str] = Counter()
        self._tracing = tracing
        self.configuration = _configuration(self.plan.members)
        replicas = [member.replica for member in self.configuration.members]
        #: What a restored volume's blocks show until somebody writes them.
        self.source = {block: _SOURCE_VALUES + block for block in self.plan.mapped}
        #: Generations with one who holds them, as guests know.
        self.pinned: list[tuple[int, bytes]] = []
        self.checker = Checker(self.plan.blocks, self.source)
        self.nodes = [self._new_node(index, replica) for index, replica in enumerate(replicas)]
        self._node_of = {node.replica: node for node in self.nodes}
        self.front_ends: list[FrontEnd] = []
        self.epoch = Epoch(0)
        self.chaos = True
        self._made_anew: set[str] = set()
        self._tickets = 0
        self._requests_left = self.plan.requests
        self._old_copies = OldCopies(self)
        self._members: Members | None = None

    # ---- what the parts ask of their world

    def trace(self, who: str, *what: Any) -> None:
        if self._tracing:
            self.trace_lines.append(f"{self.scheduler.now:9.4f} {who}: {' '.join(map(describe, what))}")

    def node_of(self, replica: ReplicaId) -> Node:
        return self._node_of[replica]

    def known_acked(self, replica: ReplicaId) -> Position:
        """What control was told that this replica had acked."""
        return self._old_copies.known.get(replica, ORIGIN)

    def ever_acked(self, replica: ReplicaId) -> Position:
        """What this replica had acked when its disk was replaced, whether anybody knows or not."""
        return self._old_copies.acked.get(replica, ORIGIN)

    def next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def take_request(self, made: int) -> bool:
        """Whether a guest that has made so many may make one more."""
        if made >= self.plan.requests // 2 or self._requests_left == 0:
            return False
        self._requests_left -= 1
        return True

    def newest(self) -> FrontEnd:
        return self.front_ends[-1]

    def others_hold_everything(self, node: Node, newcomer: ReplicaId | None = None) -> bool:
        """Whether all other members are whole on disk: then one may lose what it holds, and nothing is lost.

        newcomer: not asked.
        """
        others = [other for other in self.nodes if other is not node and other.replica != newcomer]
        return all(self.checker.is_whole(other) and not other.lost for other in others)

    def add_newcomer(self, replica: ReplicaId) -> Node:
        """A node with a replica that is to be filled."""
        disk = self._new_disk(LogImage(filling=Filling(UNKNOWN_FLOOR, ORIGIN, Sequence(0))))
        node = Node(self, f"node-{len(self._node_of)}", replica, disk, self.plan.disk)
        self._node_of[replica] = node
        self.nodes.append(node)
        return node

    def later(self, within_s: float, action: Callable[[], None]) -> None:
        """While the faults last: `action` some time within `within_s`."""
        self.scheduler.after(self.random.random() * within_s, lambda: action() if self.chaos else None)

    # ---- the run

    def run(self) -> None:
        """Raises Violation where the core breaks a promise."""
        try:
            self._run()
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{type(error).__name__}: {error}") from error

    def _run(self) -> None:
        self.trace("world", self.plan)
        for node in self.nodes:
            node.start()
        self.attach()
        self._members = Members(self, self.plan.changes)
        faults = Faults(self, self._old_copies)
        for kind, rate in self.plan.faults:
            faults.schedule(kind, rate)
        if self.plan.goes_back:
            self.scheduler.after(self.random.random() * self.plan.chaos_s, self._old_copies.copy_all)
        self._run_until(self.plan.chaos_s)
        self._heal()
        if self.plan.loses_a_quorum:
            self._lose_a_quorum()
        elif self.plan.goes_back:
            self._go_back()
        self._converge()
        if self.plan.final_power_cut:
            self._power_cut()
            self._converge()
        self._compare()

    def attach(self) -> FrontEnd:
        """The next epoch, by compare-and-swap; whoever had one before lives on."""
        self.epoch = Epoch(self.epoch + 1)
        accept_loss = self.checker.loss_accepted
        self.trace("control", "attaches epoch", self.epoch, "whatever is lost" if accept_loss else "")
        front_end = FrontEnd(self, self.epoch, accept_loss=accept_loss)
        self.front_ends.append(front_end)
        return front_end

    def _new_node(self, index: int, replica: ReplicaId) -> Node:
        filling = self.plan.created_filling and index == self.plan.members - 1
        image = LogImage(filling=Filling(UNKNOWN_FLOOR, ORIGIN, Sequence(0))) if filling else LogImage()
        return Node(self, f"node-{index}", replica, self._new_disk(image), self.plan.disk)

    def _new_disk(self, image: LogImage) -> Disk:
        """As Create makes it: control says what the volume was made from, also once it is hydrated.

        A log that comes from its beginning has trims from before that, which must cover fills behind them.
        """
        disk = Disk(image)
        disk.tables.source = bool(self.source)
        return disk

    def _run_until(self, time: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Step until `time`, or until `done`, which is asked every 50 virtual milliseconds."""
        scheduler = self.scheduler
        while scheduler.now < time:
            until = min(time, scheduler.now + 0.05)
            while scheduler.step(until):
                if scheduler.events > _ENOUGH_EVENTS:
                    raise Violation(f"no end after {scheduler.events} events, at {scheduler.now:.3f} s")
            if done():
                return True
        return False

    # ---- the end

    def _heal(self) -> None:
        self.trace("world", "heals")
        self.chaos = False
        self.network.heal()
        for node in self.nodes:
            node.speed = DiskSpeed(node.speed.sync_s)
            node.paused_until = 0.0
            node.set_full(False)
            node.corrupt = node.no_room = False
            if not node.alive:
                node.start()
        for front_end in self.front_ends:
            front_end.paused_until = 0.0

    def _power_cut(self) -> None:
        self.trace("world", "power cut")
        for front_end in self.front_ends:
            if front_end.alive:
                front_end.crash()
        for node in self.nodes:
            node.crash()
        for node in self.nodes:
            node.start()

    def _lose_a_quorum(self) -> None:
        """More is lost than the members can make good: an attachment must say so, and go on only where told to."""
        self.trace("world", "loses a quorum")
        for front_end in self.front_ends:
            if front_end.alive:
                front_end.crash()
        whole = [node for node in self.nodes if self.checker.is_whole(node)]
        if not whole:
            return
        kept = self.random.choice(whole)
        for node in self.random.sample([node for node in self.nodes if node is not kept], len(self.nodes) // 2 + 1):
            node.crash()
            if node.disk.groups:
                node.disk.rot(self.random.randrange(len(node.disk.groups)), 100, listed=False)
            else:
                node.disk.suspect()
            self.checker.disk_changed(node, put_back=True)
            node.start()
        self._expect_loss()

    def _go_back(self) -> None:
        """Every node's disk is replaced by an older copy: no member is whole, as far as control knows."""
        self.trace("world", "goes back")
        for front_end in self.front_ends:
            if front_end.alive:
                front_end.crash()
        if self._old_copies.put_all_back():
            self.seen["went back"] += 1
            self._expect_loss()

    def _expect_loss(self) -> None:
        """An attachment says what is lost; the next one is told to go on."""
        told = self.attach()
        self._run_until(self.scheduler.now + CONVERGENCE_S, lambda: told.over is not None)
        if not isinstance(told.over, Corrupt):
            raise Violation(
                f"a quorum lost its log, and {told.name} says {told.over}: {describe(told.leader.status())}"
            )
        self.checker.loss_accepted = True

    def _create_again(self) -> bool:
        """A replica that had committed what was given up takes no part any more: it is deleted and made anew."""
        again = [
            self.node_of(member.replica)
            for member in self.newest().leader.status().members
            if member.sealed and member.left_out and self.node_of(member.replica).name not in self._made_anew
        ]
        for node in again:
            self._made_anew.add(node.name)
            node.crash()
            node.disk = self._new_disk(LogImage(filling=Filling(UNKNOWN_FLOOR, ORIGIN, Sequence(0))))
            self.trace(node.name, "is made anew")
            self.checker.disk_changed(node, put_back=True)
            node.start()
        return bool(again)

    def _converge(self) -> None:
        """Somebody serves, and every replica becomes whole and ends where the leader does."""
        if not self._run_until(self.scheduler.now + CONVERGENCE_S, self._converged):
            raise Violation(f"not converged after {CONVERGENCE_S} s: {self._why()}")
        newest = self.newest()
        newest.guest.read_all()
        if not self._run_until(self.scheduler.now + CONVERGENCE_S, lambda: newest.guest.idle):
            raise Violation(f"the last read was not answered: {newest.leader.status()}")

    def _converged(self) -> bool:
        newest = self.newest()
        if not newest.alive or newest.over is not None:
            self.attach()
            return False
        if self.checker.loss_accepted and self._create_again():
            self.attach()
            return False
        for node in self.nodes:
            if node.disk.tables.lost:
                node.content_lost()  # as scrub finds it
                return False
        followers = [node.follower for node in self.nodes if not node.lost]
        end = newest.leader.commit
        whole = all(follower.whole and follower.end == end and follower.commit == end for follower in followers)
        assert self._members is not None
        if not self._members.at_rest:
            return False
        return newest.serving and newest.guest.idle and whole

    def _why(self) -> str:
        newest = self.newest()
        replicas = [
            (node.name, node.follower.end, node.follower.commit, node.follower.filling, node.lost)
            for node in self.nodes
        ]
        return describe(
            (
                f"{newest.name} serving={newest.serving}",
                str(newest.over),
                newest.leader.status(),
                replicas,
                self.configuration,
            )
        )

    def _compare(self) -> None:
        waiting = [node.name for node in self.nodes]
        for node in self.nodes:
            node.checkpoint(lambda name=node.name: waiting.remove(name))  # type: ignore[misc]
        if not self._run_until(self.scheduler.now + CONVERGENCE_S, lambda: not waiting):
            raise Violation(f"no checkpoint ended on {waiting}")
        for node in self.nodes:
            self.checker.compare(node)


def _configuration(members: int) -> Configuration:
    return Configuration(
        1,
        tuple(Member(ReplicaId(f"rep-{index:017x}"), NodeId(f"node-{index:017x}")) for index in range(1, members + 1)),
    )
