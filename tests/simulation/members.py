"""Control's part in a change of members: the record by compare-and-swap, and what front-ends say and hear of it.

Each step is taken on the word of a front-end of the record's epoch, which may be old when it arrives: it counts
only where neither the epoch nor the number has moved meanwhile. A front-end that another one has replaced hears
nothing any more. Who leaves stays for a while, as whoever still believes in it may find it; or it was lost for
good, and comes back when nobody waits for it.
"""

from typing import TYPE_CHECKING, Final

from blockstore.domain import Configuration, Member, NodeId, Replacement, ReplicaId
from blockstore.units import Epoch

if TYPE_CHECKING:
    from tests.simulation.front_end import FrontEnd
    from tests.simulation.node import Node
    from tests.simulation.world import World

_POLL_S: Final = 0.05
#: How often a word between control and front-end is lost.
_LOST: Final = 0.2


class Members:
    """Changes one member after the other, while the chaos lasts; what was begun is brought to its end."""

    def __init__(self, world: "World", changes: int) -> None:
        self._world = world
        self._random = world.random
        self._left = changes
        #: Of the change under way: whether the newcomer becomes a member before it is whole. It must not matter.
        self._hurried = False
        self._next_member = len(world.nodes) + 1
        if changes:
            world.scheduler.after(self._random.random(), self._poll)

    @property
    def at_rest(self) -> bool:
        record = self._world.configuration
        return not record.old_members and record.replacement is None

    def _poll(self) -> None:
        world = self._world
        if self.at_rest and self._left and world.chaos and self._random.random() < 0.2:
            self._enlist()
        newest = world.newest()
        if newest.alive and newest.over is None and self._random.random() >= _LOST:
            world.scheduler.after(self._delay(), lambda: self._heartbeat(newest))
        world.scheduler.after(_POLL_S, self._poll)

    def _delay(self) -> float:
        return self._random.random() * self._random.choice((0.01, 0.05, 0.5))

    def _enlist(self) -> None:
        """A newcomer on a new node, in place of one that stays up or is lost for good."""
        world, random = self._world, self._random
        self._left -= 1
        leaving = random.choice(world.nodes)
        number = self._next_member
        self._next_member += 1
        newcomer = Member(ReplicaId(f"rep-{number:017x}"), NodeId(f"node-{number:017x}"))
        world.configuration = world.configuration.enlist(Replacement(newcomer, leaving.replica))
        world.trace("control", "replaces", leaving.replica, "by", newcomer.replica)
        world.seen["enlisted"] += 1
        self._hurried = random.random() < 0.3
        world.add_newcomer(newcomer.replica).start()
        if random.random() < 0.4 and world.others_hold_everything(leaving, newcomer.replica):
            world.seen["lost for good"] += 1
            world.trace(leaving.name, "is lost for good")
            if leaving.alive:
                leaving.crash()
            leaving.lost = True

    # ---- what a front-end hears, and says

    def _heartbeat(self, front_end: "FrontEnd") -> None:
        """It hears of the record as it is when this arrives; its answer is as old as its way is long."""
        world = self._world
        if front_end.epoch != world.epoch or not front_end.alive or front_end.over is not None:
            return
        if front_end.paused_until > world.scheduler.now:
            return
        front_end.reconfigure(world.configuration)
        status = front_end.leader.status()
        whole = {each.replica for each in status.members if each.sealed and each.whole and not each.behind}
        if self._random.random() >= _LOST:
            world.scheduler.after(
                self._delay(), lambda: self._take_in(front_end.epoch, status.serving, status.settled, whole)
            )

    def _take_in(self, epoch: Epoch, serving: bool, settled: int, whole: set[ReplicaId]) -> None:
        world, record = self._world, self._world.configuration
        if epoch != world.epoch or not serving:
            return
        if record.replacement and self._may_join(record.joint(), record.replacement.newcomer.replica, whole):
            self._swap(record.joint())
            if world.chaos and self._random.random() < 0.4:
                self._hold_up(record.joint())
        elif self._may_settle(record, settled):
            leaving = world.node_of(record.leaving[0].replica)
            self._swap(record.settle())
            world.seen["settled"] += 1
            if world.chaos and self._random.random() < 0.4:
                self._part(leaving)
            self._retire(leaving)

    def _may_join(self, joint: Configuration, newcomer: ReplicaId, whole: set[ReplicaId]) -> bool:
        """All new members are whole; only where this change is hurried, and all others are, the newcomer may not be."""
        world = self._world
        hurried = self._hurried and all(
            world.checker.is_whole(world.node_of(each.replica)) for each in joint.members if each.replica != newcomer
        )
        return {each.replica for each in joint.members} <= whole | ({newcomer} if hurried else set())

    def _may_settle(self, record: Configuration, settled: int) -> bool:
        return bool(record.old_members) and settled == record.number

    def _swap(self, record: Configuration) -> None:
        self._world.configuration = record
        self._world.trace("control", "has", record)

    def _hold_up(self, joint: Configuration) -> None:
        """What the front-end sends comes late to a quorum of the new members: the old ones are ahead."""
        world = self._world
        stays = [member for member in joint.members if member in joint.old_members]
        late = [self._random.choice(stays), *(member for member in joint.members if member not in stays)]
        ways = [(world.newest().name, world.node_of(member.replica).name) for member in late]
        world.network.slow.update(dict.fromkeys(ways, 1.0))
        world.later(2.0, world.network.slow.clear)

    def _part(self, leaving: "Node") -> None:
        """The front-end that changed the members reaches who has left, and nobody else; the next one does not."""
        world, random = self._world, self._random
        old, others = world.newest(), [node.name for node in world.nodes if node is not leaving]
        world.network.isolate(old.name, others)
        new = world.attach()
        world.network.isolate(new.name, [leaving.name, *random.sample(others, random.choice((0, 1)))])
        world.later(3.0, world.network.cuts.clear)

    def _retire(self, node: "Node") -> None:
        """It is no member; it is there for a while yet, or again, until it is deleted."""
        world = self._world
        world.nodes.remove(node)
        if node.lost:
            node.lost = False
            if self._random.random() < 0.5:
                node.start()
        world.scheduler.after(0.5 + self._random.random() * 3.0, lambda: node.crash() if node.alive else None)
