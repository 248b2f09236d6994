"""The scrub of one replica: a pass over all extents, a few at a time, and then again over those that were not settled.

Each extent is read and checked here, and compared with what a peer shows of it (scrub_compare). It is settled when
both show the same. What is damaged is given to the repairer, and looked at again in rounds at the end of the pass, as
is what changed between the two looks, or could not be compared. A difference counts once it was found in two looks
with a round between them; then it is kept, with its place, until the blocks are found equal.

Invariant: nothing is changed here. Damage is mended by the repairer, which takes identical versions only, or has the
whole replica filled anew; about a difference nothing is done (docs/storage.md, scrub).
"""

import asyncio
from typing import Final

import structlog

from blockstore.domain import ORIGIN, ReplicaId
from blockstore.errors import CairnError, Corrupt
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.scrub_compare import Difference, Verdict, compare, differences
from blockstore.node.scrub_peer import PeerViews, ScrubPeers
from blockstore.node.scrub_server import Repair, apply_up_to
from blockstore.node.scrub_state import MAX_PENDING, Pass, ScrubState
from blockstore.storage.scrub import ExtentView
from blockstore.units import MAX_GENERATION, Generation

_log = structlog.get_logger(__name__)
#: Extents in one step: 16 ms of reading where they are full, which is how long a guest may wait behind it.
STEP_EXTENTS: Final = 4
#: Waits before the rounds over what was not settled. Peers apply what is committed some seconds later than this one.
ROUND_WAITS_S: Final = (0.2, 0.5, 1.0, 2.0, 4.0)
#: As which extent a difference of pins and source is kept.
PINS: Final = -1
_LOOKS: Final = 2


class ReplicaScrub:
    """One pass of one replica. A new pass is a new object, so that what is under way of the old one changes nothing."""

    def __init__(self, hosted: HostedReplica, state: ScrubState, peers: ScrubPeers, repair: Repair) -> None:
        self.hosted = hosted
        self.state = state
        self.here: Pass = state.latest
        self.ready_at = 0.0
        """Loop time before which there is nothing to do."""
        self.alone_at = 0.0
        """Loop time until which it waits to be told where the other members are."""
        self.guests = False
        """The last peer said that guests use its node."""
        self._peers = peers
        self._repair = repair
        self._round: list[int] = []
        self._rounds = 0
        self._begins_round = False
        self._asked = ORIGIN
        """What the peer is asked to have applied, if it can."""
        self._different: dict[int, int] = {}
        self._bad: set[int] = set()
        self._why_alone = ""

    async def step(self) -> tuple[int, bool]:
        """The next few extents: bytes read here, and whether the pass goes on.

        Raises QuorumUnavailable while the replica fills, Corrupt where the list of extents is damaged.
        """
        extents = await self._next()
        if extents is None:
            return 0, self._to_next_round()
        return await self._look(extents), True

    async def _next(self) -> list[int] | None:
        """Extents to look at; None where there are none for now."""
        here, reader = self.here, self.hosted.store.scrub
        await self._bring_up()
        if not self._rounds:
            if not here.total:
                here.total = await self.hosted.in_reader(reader.count)
            extents: list[int] = await self.hosted.in_reader(reader.extents, here.next_extent, STEP_EXTENTS)
            if extents:
                here.next_extent = extents[-1] + 1
                here.done += len(extents)
                return extents
        if not self._round:
            return None
        extents, self._round = self._round[:STEP_EXTENTS], self._round[STEP_EXTENTS:]
        return extents

    async def _bring_up(self) -> None:
        """Once a round both replicas apply what is committed; in the walk before, they do as they do for guests."""
        asked = self.hosted.follower.commit if self._begins_round else ORIGIN
        await apply_up_to(self.hosted, asked, self._repair)
        if self._begins_round:
            self._asked, self._begins_round = self.hosted.store.applied, False

    def _to_next_round(self) -> bool:
        """Over what is not settled, after a while; False where the pass is over."""
        if not self.here.pending or self._rounds == len(ROUND_WAITS_S):
            return False
        self.ready_at = asyncio.get_running_loop().time() + ROUND_WAITS_S[self._rounds]
        self._rounds += 1
        self._begins_round = True
        self._round = sorted(self.here.pending)
        return True

    async def _look(self, extents: list[int]) -> int:
        own = await self._read(extents)
        size_bytes = sum(view.size_bytes for view in own.values())
        if not own:
            return size_bytes
        generations = {each for view in own.values() for each in view.generations}
        answer, self._why_alone = await self._peers.views(self.hosted, list(own), sorted(generations), self._asked)
        for extent, view in own.items():
            theirs = answer.views.get(extent) if answer else None
            if answer is None or theirs is None:
                self._put_off(extent)
            else:
                await self._compare(answer.peer, view, theirs)
        if answer is not None:
            self.guests = answer.guests
            await self._compare_pins(answer)
        return size_bytes

    # ---- reading

    async def _read(self, extents: list[int]) -> dict[int, ExtentView]:
        """What is good of them; what is not is on its way to be mended."""
        found = {}
        for extent in extents:
            view = await self._view(extent)
            if view is not None:
                found[extent] = view
        return found

    async def _view(self, extent: int, generations: tuple[Generation, ...] | None = None) -> ExtentView | None:
        try:
            view: ExtentView = await self.hosted.in_reader(self.hosted.store.scrub.view, extent, generations)
        except Corrupt as error:
            self._bad.add(extent)
            self.here.damaged.add(extent)
            self.here.pending.add(extent)
            self._repair(self.hosted, error)
            return None
        self._bad.discard(extent)
        return view

    # ---- comparing

    async def _compare(self, peer: ReplicaId, own: ExtentView, theirs: ExtentView) -> None:
        if own.generations != theirs.generations:
            again = await self._view(own.extent, theirs.generations)
            if again is None or again.generations != theirs.generations:
                self._put_off(own.extent)
                return
            own = again
        match compare(own, theirs):
            case Verdict.SAME:
                self._settle(own.extent, peer)
            case Verdict.MOVING:
                self._put_off(own.extent)
            case Verdict.DIFFERENT:
                await self._differs(peer, own)

    def _settle(self, extent: int, peer: ReplicaId) -> None:
        self.here.pending.discard(extent)
        self._different.pop(extent, None)
        self.here.compared += 1
        known = self.state.differing.get(extent)
        if known is not None and (known[0] == peer or known[0] not in self.hosted.peers):
            del self.state.differing[extent]
            _log.info("replicas show the same again", replica=self.hosted.replica, peer=peer, extent=extent)

    def _put_off(self, extent: int) -> None:
        """To a round at the end; where too many wait for that, it is left out."""
        if len(self.here.pending) < MAX_PENDING:
            self.here.pending.add(extent)
        elif extent not in self.here.pending:
            self.here.not_compared += 1

    async def _differs(self, peer: ReplicaId, own: ExtentView) -> None:
        self.here.pending.add(own.extent)
        self._different[own.extent] = self._different.get(own.extent, 0) + 1
        if self._different[own.extent] < _LOOKS:
            return
        found = await self._place(peer, own)
        if found is not None:
            self.here.pending.discard(own.extent)
            self._keep(own.extent, peer, found)

    async def _place(self, peer: ReplicaId, own: ExtentView) -> Difference | None:
        """The first block that differs; None where nothing does (any more)."""
        for generation in (MAX_GENERATION, *reversed(own.generations)):
            try:
                theirs = await self._peers.shown(self.hosted, peer, own.extent, generation)
                ours = await self.hosted.in_reader(self.hosted.store.scrub.shown, own.extent, generation)
            except CairnError as error:
                _log.warning("a difference cannot be placed now", replica=self.hosted.replica, error=str(error))
                return None
            found = differences(ours, theirs, generation)
            if found:
                return found[0]
        return None

    async def _compare_pins(self, answer: PeerViews) -> None:
        """At one position both keep the same generations for the same holders, and have the same source."""
        position, pins = await self.hosted.in_reader(self.hosted.store.scrub.pins)
        theirs, digest = answer.pins
        if position != theirs:
            return
        if pins == digest:
            self._different.pop(PINS, None)
            known = self.state.differing.get(PINS)
            if known is not None and known[0] == answer.peer:
                del self.state.differing[PINS]
            return
        self._different[PINS] = self._different.get(PINS, 0) + 1
        if self._different[PINS] >= _LOOKS:
            what = "the replicas keep different generations for snapshots, or differ in whether there is a source"
            self._keep(PINS, answer.peer, Difference(0, MAX_GENERATION, position.sequence, what))

    def _keep(self, extent: int, peer: ReplicaId, found: Difference) -> None:
        if extent not in self.state.differing:
            _log.error("replicas differ", replica=self.hosted.replica, peer=peer, **found._asdict())
        self.state.differing[extent] = peer, found

    # ---- the end

    def finish(self) -> None:
        """The rounds are over: count what is left."""
        here = self.here
        different = {extent for extent in here.pending if self._different.get(extent, 0) >= _LOOKS}
        here.bad = len(self._bad)
        here.not_compared += len(here.pending - self._bad - different)
        if here.not_compared:
            here.why = self._why_alone or "extents that were behind, or changed all the time, were not compared"
