"""Old copies of a node's disk, put back: what the replica acked since, and promised, it knows nothing of.

Somebody else does: control, which was told a part of it, or all other members, on their disks. Where
nobody knows, nothing can be done, and the fault does not happen.
"""

from typing import TYPE_CHECKING

from blockstore.domain import ORIGIN, Position, ReplicaId
from tests.simulation.disk import Disk
from tests.simulation.node import Node

if TYPE_CHECKING:
    from tests.simulation.world import World


class OldCopies:
    """known: what control was told that replicas had acked. acked: what they had when their disk was replaced."""

    def __init__(self, world: "World") -> None:
        self.known: dict[ReplicaId, Position] = {}
        self.acked: dict[ReplicaId, Position] = {}
        self._world = world
        self._copies: dict[ReplicaId, Disk] = {}
        self._past: dict[ReplicaId, Disk] = {}

    def strike(self, node: Node, *, control_knows: bool = True) -> bool:
        """Take a copy of its disk, or put the one back that was taken; whether it was put back."""
        copy = self._copies.get(node.replica)
        if copy is None:
            if node.alive:
                self._copies[node.replica] = node.disk.backup()
            return False
        since = self._world.checker.acked_since(node, copy.highest)
        if not node.alive or not since or not self._world.others_hold_everything(node):
            return False
        if not control_knows and not all(self._knows(other, node, copy) for other in self._world.nodes):
            return False
        if control_knows:
            self.known[node.replica] = max(self._world.random.choice(since), self.known.get(node.replica, ORIGIN))
        self._put_back(node, self._copies.pop(node.replica))
        self._world.later(0.5, lambda: None if node.alive else node.start())
        return True

    def copy_all(self) -> None:
        self._past = {node.replica: node.disk.backup() for node in self._world.nodes}

    def put_all_back(self) -> bool:
        """Whether that was done: a quorum acked since what control knows, and one copy at least is not of a filling."""
        world = self._world
        there = [node for node in world.nodes if node.replica in self._past]  # who came since has its own
        since = {node.replica: world.checker.acked_since(node, self._past[node.replica].highest) for node in there}
        copies = [self._past[node.replica] for node in there]
        complete = any(copy.tables.image.filling is None and copy.damage is None for copy in copies)
        if any(node.lost for node in world.nodes):
            return False  # it may have what the others lost: an attachment waits for it
        if not complete or 2 * sum(map(bool, since.values())) <= len(world.nodes):
            return False
        for node in there:
            if since[node.replica]:
                self.known[node.replica] = max(
                    world.random.choice(since[node.replica]), world.known_acked(node.replica)
                )
            self._put_back(node, self._past[node.replica])
            node.start()
        return True

    def _knows(self, other: Node, node: Node, copy: Disk) -> bool:
        """Whether the disk of `other` says that this replica acked more than the copy answers for."""
        return other is node or dict(other.disk.tables.image.known).get(node.replica, ORIGIN) > copy.highest

    def _put_back(self, node: Node, copy: Disk) -> None:
        world = self._world
        node.crash()
        self.acked[node.replica] = max(node.disk.highest, self.acked.get(node.replica, ORIGIN))
        node.disk = copy
        known = self.known.get(node.replica, ORIGIN)
        world.trace(
            node.name, "is an old copy", copy.highest, "acked", self.acked[node.replica], "control knows", known
        )
        world.checker.disk_changed(node, put_back=True)
