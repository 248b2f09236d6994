"""Moving replicas: who is away for long is replaced, who drains is emptied, and what was asked for is carried out.

Every pass looks at the records and takes the next step of each change (blockstore/control/membership.py); nothing is
remembered between two of them but when a replica was first missed. So control may die between any two steps.
Invariants: what is decided here from heartbeats only begins, or takes back, a change that has no vote yet; the two
steps that count rest on the word of the front-end that serves the volume, and on the record's epoch. An old replica
is deleted only together with the step that takes it out of the record.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from blockstore.control import membership
from blockstore.control.catalog import Catalog
from blockstore.control.membership import is_changing, is_movable
from blockstore.control.moving import AWAY, DRAIN, REBALANCE, WHY_DUE, Cluster, Limits, NodeView, is_void, next_moves
from blockstore.control.peers import Peers
from blockstore.control.placing import promised_bytes, random_id
from blockstore.control.presence import Presence
from blockstore.control.rebuilds import Rebuilds
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.record_store import MAX_TRIES, Stored
from blockstore.control.records import MovePlan, Node, PlannedMove, Segment, Tombstone, Volume, source_of
from blockstore.control.repair_limits import LimitsNow
from blockstore.control.roster import Roster
from blockstore.control.steps import newcomer_key
from blockstore.control.transitions import Phase, phase_of, place_of
from blockstore.control.unfit import to_be_replaced
from blockstore.domain import Member, NodeId, Replacement, ReplicaId, SegmentNumber, VolumeId
from blockstore.errors import Conflict, NotFound
from blockstore.rpc import control_pb2

_log = structlog.get_logger(__name__)

#: A newcomer whose node is away for so long is given up, and another node is chosen: it has begun anew by then.
NEWCOMER_AWAY_S: Final = 60.0
#: Seconds between two looks for replicas that their nodes do not have: it takes all replicas of the cluster.
_LOOK_S: Final = 2.0
#: Records that a newcomer may lack when it becomes a member: it gets them within a moment.
_LAG_RECORDS: Final = 1000


class Replacing:
    """See the module. rebuilds: how far the filling is. waits: why replicas that should move cannot."""

    def __init__(
        self,
        catalog: Catalog,
        presence: Presence,
        peers: Peers,
        reconciler: Reconciler,
        limits: LimitsNow,
    ) -> None:
        self._catalog = catalog
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler
        self.limits: Final = limits
        self._missed_since: dict[ReplicaId, float] = {}
        self._looked_at = float("-inf")
        self.waits: dict[ReplicaId, str] = {}
        self.rebuilds: Final = Rebuilds()

    # ---- what it goes by

    async def cluster(self, roster: Roster, promised: "Counter[NodeId]") -> Cluster:
        """Nodes and replicas as they were last heard of. promised: bytes that are placed on each node."""
        draining = await self._catalog.draining()
        views = [
            self._view(each.record, each.record.id in draining, promised[each.record.id])
            for each in await self._catalog.nodes()
        ]
        return Cluster(views, self._is_whole, self._emptied(roster.volumes), self._unfit(roster.active))

    def _view(self, node: Node, draining: bool, promised: int) -> NodeView:
        word, up = self._presence.node(node.id), self._presence.is_up(node.id)
        return NodeView(
            node.id,
            node.zone,
            0.0 if up else max(self._presence.silent_s(node.id), 0.001),
            draining,
            word.full if word else False,
            word.capacity_bytes if word else node.capacity_bytes,
            word.used_bytes if word else 0,
            promised,
        )

    def _is_whole(self, volume: Volume, member: Member) -> bool:
        """By the word of the front-end that serves the volume; of one that nobody serves by that of the node."""
        if report := self.report(volume):
            return any(each.replica == member.replica and each.connected and each.whole for each in report.members)
        word = self._presence.node(member.node)
        status = word.replicas.get(member.replica) if word and word.replicas else None
        return bool(status and status.whole and self._presence.is_up(member.node))

    def _unfit(self, volumes: tuple[Volume, ...]) -> dict[ReplicaId, str]:
        found: dict[ReplicaId, str] = {}
        for volume in volumes:
            if report := self.report(volume):
                found |= to_be_replaced(volume, report.members)
        return found

    def _emptied(self, volumes: tuple[Volume, ...]) -> dict[ReplicaId, float]:
        """Members whose nodes are up and do not have them: how long that is so. Looked for now and then."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._look_for_missing(volumes, now)
        return {replica: now - since for replica, since in self._missed_since.items()}

    def _look_for_missing(self, volumes: tuple[Volume, ...], now: float) -> None:
        missing = set()
        for volume in volumes:
            if phase_of(volume) in (Phase.CREATING, Phase.DELETING):
                continue
            for segment in volume.segments:
                for member in segment.configuration.members:
                    if self._lacks(member):
                        missing.add(member.replica)
        self._missed_since = {replica: self._missed_since.get(replica, now) for replica in missing}

    def _lacks(self, member: Member) -> bool:
        """Its node is up and has said that it does not have it."""
        word = self._presence.node(member.node)
        if word is None or word.replicas is None or member.replica in word.replicas:
            return False
        return self._presence.is_up(member.node) and not self._presence.is_new(member.replica)

    def report(self, volume: Volume) -> control_pb2.VolumeReport | None:
        """What the front-end that serves the volume says of its present epoch; None where it does not serve."""
        place = place_of(volume)
        if place is None or not self._presence.is_up(place.front_end):
            return None
        word = self._presence.front_end(place.front_end)
        report = word.volumes.get(volume.id) if word else None
        serves = report and report.epoch == place.epoch and report.state == control_pb2.SERVING_STATE_SERVING
        return report if serves else None

    # ---- each pass

    async def reconcile(self, roster: Roster) -> None:
        """Take the next step of each change, and begin what is due."""
        self.rebuilds.forget_silent(asyncio.get_running_loop().time())
        limits, plan = await self.limits(), await self._catalog.moves()
        changing = any(is_changing(segment) for volume in roster.active for segment in volume.segments)
        roughly = await self.cluster(roster, Counter())
        if not changing and not plan.moves and roughly.all_well(limits.replace_after_s):
            self.waits = {}
            return
        cluster = await self.cluster(roster, promised_bytes(roster.volumes))
        for volume in roster.active:
            for segment in volume.segments:
                if is_changing(segment):
                    await self._step(volume, segment, cluster, limits)
        if not self._presence.settling_s() or not any(node.away_s for node in cluster.nodes.values()):
            await self._begin_moves(roster.volumes, cluster, limits, plan)

    async def _step(self, volume: Volume, segment: Segment, cluster: Cluster, limits: Limits) -> None:
        try:
            if change := segment.configuration.replacement:
                await self._go_on(volume, segment, change, cluster, limits)
            else:
                await self._settle(volume, segment)
        except MOVED_ON as error:
            _log.info("a change of members waits for the next pass", volume=volume.id, why=str(error))

    def may_go_on(self, volume: Volume) -> bool:
        """Whether the front-end has said what the next step of a change waits for."""
        return any(
            self._may_join(volume, segment, change.newcomer)
            if (change := segment.configuration.replacement)
            else self._has_settled(volume, segment)
            for segment in volume.segments
            if is_changing(segment)
        )

    # ---- a newcomer

    async def _go_on(
        self, volume: Volume, segment: Segment, change: Replacement, cluster: Cluster, limits: Limits
    ) -> None:
        newcomer = change.newcomer
        if why := self._unwanted(volume, segment, change, cluster, limits):
            await self._dismiss(volume, segment.number, newcomer, why)
        elif self._lacks(newcomer):
            self._start_creation(volume, segment, newcomer)
        elif self._may_join(volume, segment, newcomer):
            place = place_of(volume)
            assert place is not None
            await self._change(
                volume.id, lambda now: membership.join(now, segment.number, place.epoch, newcomer.replica)
            )
            _log.info("a newcomer becomes a member", volume=volume.id, replica=newcomer.replica, node=newcomer.node)

    def _unwanted(self, volume: Volume, segment: Segment, change: Replacement, cluster: Cluster, limits: Limits) -> str:
        """Why this newcomer is given up, while that costs nothing; empty where it goes on."""
        node = cluster.nodes.get(change.newcomer.node)
        if node is None or node.draining:
            return "its node is to have no replicas"
        if node.away_s > NEWCOMER_AWAY_S:
            return "its node is away itself"
        replaced = next(each for each in segment.configuration.members if each.replica == change.replaces)
        due = cluster.due(replaced, limits.replace_after_s)
        if change.reason == DRAIN and due != DRAIN:
            return "the drain was taken back"
        if change.reason == AWAY and not due and self._is_back(volume, replaced):
            return "who was away is back, and whole"
        return ""

    def _is_back(self, volume: Volume, member: Member) -> bool:
        report = self.report(volume)
        said = next((each for each in report.members if each.replica == member.replica), None) if report else None
        return bool(said and said.connected and said.whole and said.lag_records <= _LAG_RECORDS)

    def _start_creation(self, volume: Volume, segment: Segment, newcomer: Member) -> None:
        async def create() -> None:
            # As it is now: only a newcomer is ever made, never a member whose disk was emptied.
            volume_now = await self._catalog.volume(volume.id)
            now = membership.segment_of(volume_now, segment.number).configuration
            if now.replacement is None or now.replacement.newcomer != newcomer:
                return
            node = (await self._catalog.node(newcomer.node)).record
            replica = Tombstone(newcomer.replica, newcomer.node, volume.id, segment.number)
            # The source also of a volume that is hydrated: a log from its beginning says itself when that ended, and
            # trims before that cover what was filled behind them.
            source = source_of(volume_now, segment.number)
            await self._peers.create(node, replica, now.number, source, filling=True)
            self._presence.replica_created(newcomer.replica)
            _log.info("a newcomer is created", volume=volume.id, replica=newcomer.replica, node=newcomer.node)

        self._reconciler.steps.start(newcomer_key(volume.id), f"newcomer {newcomer.replica}", create)

    def _may_join(self, volume: Volume, segment: Segment, newcomer: Member) -> bool:
        """It is whole and near the end of the log, and so is a quorum of the members that it joins."""
        report = self.report(volume)
        if report is None:
            return False
        ready = {each.replica for each in report.members if each.connected and each.whole and not each.full}
        near = {each.replica for each in report.members if each.lag_records <= _LAG_RECORDS}
        joint = segment.configuration.joint()
        whole = sum(each.replica in ready for each in joint.members)
        return newcomer.replica in ready & near and 2 * whole > len(joint.members)

    async def _dismiss(self, volume: Volume, number: SegmentNumber, newcomer: Member, why: str) -> None:
        if self._reconciler.steps.running(newcomer_key(volume.id)):
            return  # a Create that comes behind the Delete would stay
        await self._change(volume.id, lambda now: membership.dismiss(now, number, newcomer.replica))
        _log.info("a newcomer is given up", volume=volume.id, replica=newcomer.replica, node=newcomer.node, why=why)

    # ---- the second step

    async def _settle(self, volume: Volume, segment: Segment) -> None:
        place, number = place_of(volume), segment.configuration.number
        if place is None or not self._has_settled(volume, segment):
            return
        await self._change(volume.id, lambda now: membership.settle(now, segment.number, place.epoch, number))
        left = [member.replica for member in segment.configuration.leaving]
        _log.info("a change of members has settled", volume=volume.id, configuration=number + 1, left=left)

    def _has_settled(self, volume: Volume, segment: Segment) -> bool:
        report = self.report(volume)
        return report is not None and report.settled.get(segment.number, 0) == segment.configuration.number

    async def _change(self, volume: VolumeId, step: Callable[[Volume], Volume]) -> None:
        """One step, in one transaction with the tombstones of those that it leaves behind."""
        for _ in range(MAX_TRIES):
            stored = await self._catalog.stored_volume(volume)
            changed = step(stored.record)
            if await self._catalog.place_more(stored, changed, (), membership.left_by(stored.record, changed)):
                return
        raise Conflict(f"volume {volume} is changed by too many at once: try again")

    # ---- what begins

    async def _begin_moves(self, volumes: tuple[Volume, ...], cluster: Cluster, limits: Limits, plan: MovePlan) -> None:
        movable = [volume for volume in volumes if is_movable(volume)]
        over = {move for move in plan.moves if is_void(move, {str(volume.id): volume for volume in volumes})}
        waits: dict[ReplicaId, str] = {}
        for move in next_moves(movable, cluster, limits, plan.moves, waits):
            if await self.enlist(move):
                over |= {each for each in plan.moves if (each.volume, each.replica) == (move.volume, move.replica)}
        self.waits = waits
        if over:
            await self._catalog.change_moves(
                lambda now: MovePlan(tuple(move for move in now.moves if move not in over))
            )

    async def enlist(self, move: PlannedMove) -> bool:
        """Enter a newcomer on the move's node; False where volume or node has changed: another pass looks again."""
        newcomer = Member(ReplicaId(random_id("rep")), move.to_node)
        try:
            stored: Stored[Volume] = await self._catalog.stored_volume(move.volume)
            node = await self._catalog.node(move.to_node)
            reason = move.why if move.why in WHY_DUE else REBALANCE
            changed = membership.enlist(stored.record, move.segment, newcomer, move.replica, reason)
        except (NotFound, Conflict) as error:
            _log.info("a replica is not moved now", volume=move.volume, replica=move.replica, why=str(error))
            return False
        if not await self._catalog.place_more(stored, changed, [node]):
            return False
        _log.info(
            "a replica is to be replaced",
            volume=move.volume,
            replica=move.replica,
            newcomer=newcomer.replica,
            node=move.to_node,
            why=move.why,
        )
        return True
