"""The faults of a run: each kind that a plan may hold, and what it does to nodes, front-ends, disks and the network.

The fault of a name strikes with the method of that name. None takes away what only one member holds: before a disk
loses anything, all others must have it.
"""

from typing import TYPE_CHECKING

from tests.simulation.front_end import FrontEnd
from tests.simulation.node import Node
from tests.simulation.old_copies import OldCopies

if TYPE_CHECKING:
    from tests.simulation.world import World


class Faults:
    """Strikes a world at random times, for as long as its chaos lasts."""

    def __init__(self, world: "World", old_copies: OldCopies) -> None:
        self._world = world
        self._random = world.random
        self._network = world.network
        self._old_copies = old_copies

    def schedule(self, kind: str, rate: float) -> None:
        """Let it strike so often in each virtual second, while the faults last."""

        def strike() -> None:
            if self._world.chaos:
                self._world.seen[kind] += 1
                getattr(self, f"_{kind}")()
                self.schedule(kind, rate)

        self._world.scheduler.after(self._random.expovariate(rate), strike)

    def _any_node(self) -> Node:
        return self._random.choice(self._world.nodes)

    def _living(self) -> list[Node]:
        return [node for node in self._world.nodes if node.alive]

    def _stop_node(self, node: Node, restart_s: float) -> None:
        if node.alive:
            node.crash()
            self._world.later(restart_s, lambda: None if node.alive else node.start())

    def _crash_node(self) -> None:
        self._stop_node(self._any_node(), self._random.choice((0.05, 0.5, 2.0)))

    def _crash_all_nodes(self) -> None:
        for node in self._world.nodes:
            self._stop_node(node, 0.5)

    def _crash_front_end(self) -> None:
        front_end = self._world.newest()
        if front_end.alive:
            front_end.crash()
            self._world.later(0.5, self._attach_again)

    def _attach_again(self) -> None:
        if not self._world.newest().alive or self._world.newest().over is not None:
            self._world.attach()

    def _attach_beside(self) -> None:
        self._world.attach()

    def _attach_briefly(self) -> None:
        """A front-end that reaches all nodes but one, and often dies before it has come far."""
        front_end = self._world.attach()
        self._network.isolate(front_end.name, [self._any_node().name])
        if self._random.random() < 0.7:
            front_end.after(self._random.random() * self._random.choice((0.02, 0.1, 0.4)), front_end.crash)
            self._world.later(0.5, self._attach_again)
        else:
            self._world.later(1.0, self._network.cuts.clear)

    def _split(self) -> None:
        """The old front-end reaches one node only, the new one all others: each could believe it is the only one."""
        old, alone = self._world.newest(), self._any_node()
        if not old.serving:
            return
        others = [node for node in self._world.nodes if node is not alone]
        self._network.isolate(old.name, [node.name for node in others])
        new = self._world.attach()
        self._network.isolate(new.name, [alone.name])
        if self._random.random() < 0.4:
            self._world.later(3.0, lambda: self._win_over(old, self._random.choice(others)))
        self._world.later(6.0, self._network.cuts.clear)

    def _win_over(self, old: FrontEnd, node: Node) -> None:
        """A node that promised the new front-end not to listen to the old one forgets, and hears the old one."""
        self._damage(node)
        self._network.cuts -= {(old.name, node.name), (node.name, old.name)}

    def _pause_front_end(self) -> None:
        living = [front_end for front_end in self._world.front_ends[-2:] if front_end.alive]
        if living:
            front_end = self._random.choice(living)
            front_end.pause(self._random.random() * 2.5)
            if self._random.random() < 0.5:
                self._world.attach()

    def _pause_node(self) -> None:
        node = self._any_node()
        node.paused_until = self._world.scheduler.now + self._random.random()

    def _isolate(self, name: str) -> None:
        others = [process.name for process in (*self._world.nodes, *self._world.front_ends) if process.name != name]
        ways = self._random.choice(((True, True), (True, False), (False, True)))
        self._network.isolate(name, others, outward=ways[0], inward=ways[1])
        self._world.later(2.0, self._network.cuts.clear)

    def _isolate_node(self) -> None:
        self._isolate(self._any_node().name)

    def _isolate_front_end(self) -> None:
        self._isolate(self._world.newest().name)
        if self._random.random() < 0.5:
            self._world.later(0.5, self._attach_beside)

    def _cut_one_way(self) -> None:
        names = [process.name for process in (*self._world.nodes, self._world.newest())]
        source, target = self._random.sample(names, 2)
        self._network.cuts.add((source, target))
        self._world.later(1.5, lambda: self._network.cuts.discard((source, target)))

    def _slow_way(self) -> None:
        names = [process.name for process in (*self._world.nodes, *self._world.front_ends[-2:])]
        source, target = self._random.sample(names, 2)
        self._network.slow[source, target] = self._random.choice((0.1, 1.0, 3.0))
        self._world.later(2.0, lambda: self._network.slow.pop((source, target), None))  # type: ignore[arg-type]

    def _break_stream(self) -> None:
        self._network.break_stream()

    def _full_node(self) -> None:
        node = self._any_node()
        node.set_full(True)
        self._world.later(1.0, lambda: node.set_full(False))

    def _full_disks(self) -> None:
        """Of one node or several. Some have room again soon; into some journals nothing goes meanwhile."""
        nodes = self._world.nodes
        for node in self._random.sample(nodes, self._random.randrange(1, len(nodes) + 1)):
            stalls = self._random.random() < 0.4
            node.set_full(True, stalls=stalls)
            self._world.later(self._random.choice((0.3, 1.0, 4.0)), node.has_room_again)

    def _lost_entries(self) -> None:
        """A bit of a page flips, a block has no entry any more, and scrub comes by."""
        node = self._any_node()
        blocks = sorted({block for block, _ in node.disk.tables.versions})
        alike = {other.follower.durable_end for other in self._world.nodes if other.alive and other.follower.whole}
        sound = len(alike) == 1 and len(self._living()) == len(self._world.nodes)
        if sound and blocks and self._world.checker.is_whole(node) and self._world.others_hold_everything(node):
            self._world.seen["lost_entry"] += 1
            node.disk.tables.lose(self._random.choice(blocks))
            node.content_lost()

    def _bad_blocks(self) -> None:
        """What a node reads fails its checksum for a while."""
        node = self._any_node()
        node.corrupt = True

        def mend() -> None:
            node.corrupt = False

        self._world.later(1.0, mend)

    def _checkpoint(self) -> None:
        living = self._living()
        if living:
            self._random.choice(living).checkpoint_soon()

    def _no_room(self) -> None:
        """Nothing goes into a node's tables for a while."""
        node = self._any_node()
        node.no_room = True

        def room() -> None:
            node.no_room = False

        self._world.later(1.0, room)

    def _merge(self) -> None:
        living = self._living()
        if living:
            self._random.choice(living).merge()

    def _damage_node(self) -> None:
        self._damage(self._any_node())

    def _damage(self, node: Node) -> None:
        """A crash after which the journal has lost something, often its end, and says so."""
        if not node.alive or not self._world.others_hold_everything(node):
            return
        node.crash()
        disk, random = node.disk, self._random
        if random.random() < 0.2 or not disk.groups:
            disk.suspect()
        else:
            count = random.choice((1, 1, 2, 3))
            last = max(0, len(disk.groups) - count)
            disk.rot(random.choice((last, random.randrange(last + 1))), count, listed=random.random() < 0.6)
        self._world.trace(node.name, "is damaged", disk.damage)
        self._world.checker.disk_changed(node, put_back=True)
        self._world.later(0.5, lambda: None if node.alive else node.start())

    def _old_copy(self) -> None:
        self._old_copies.strike(self._any_node())

    def _forgotten_copy(self) -> None:
        if self._old_copies.strike(self._any_node(), control_knows=False) and self._random.random() < 0.7:
            self._crash_front_end()
            self._isolate_node()
