"""When each replica of a node is scrubbed, and how fast: one step at a time, those that a person asked for first.

A replica is due every `scrub_every_s` seconds, from a moment that its id chooses, so that not all are due at once; the
clock of the machine counts, since that goes on while the node is down. A pass goes on after a restart where it was.
The schedule reads at most `scrub_rate` bytes a second over all replicas, a person's pass as much as that one said; and
each step is followed by a pause while guests use this node or the peer's.
"""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog
import xxhash

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import CairnError, Corrupt
from blockstore.node.guest_traffic import GuestTraffic
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.scrub_peer import ScrubPeers
from blockstore.node.scrub_replica import ReplicaScrub
from blockstore.node.scrub_server import Repair
from blockstore.node.scrub_state import Pass, ScrubState, load, save
from blockstore.rpc import replica_pb2 as pb

_log = structlog.get_logger(__name__)
#: What an extent with little in it counts as: looking it up costs as well.
_LEAST_BYTES: Final = 64 * 1024
#: The pause behind a step while guests use the node, in times of the step.
_PAUSES: Final = 4.0
_LONGEST_PAUSE_S: Final = 0.5
#: Between two notes of how far a pass is: so much is read again after a crash.
_SAVE_S: Final = 10.0
#: Most that the loop sleeps: the machine's clock may jump, and replicas come and go.
_LONGEST_WAIT_S: Final = 5.0
#: After a pass that could not go on, as where the replica began to fill.
_AGAIN_S: Final = 3600.0
#: Control says within a heartbeat or two where the other members are.
_PEERS_WAIT_S: Final = 3.0


class Scrubber:
    """Runs in the node's event loop. replicas: those that there are now. wall_ms: the machine's clock."""

    def __init__(
        self,
        settings: NodeSettings,
        replicas: Callable[[], Iterable[HostedReplica]],
        repair: Repair,
        peers: ScrubPeers,
        *,
        traffic: GuestTraffic,
        wall_ms: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._replicas = replicas
        self._repair = repair
        self._peers = peers
        self._traffic = traffic
        self._wall_ms = wall_ms
        self._states: dict[ReplicaId, ScrubState] = {}
        self._running: dict[ReplicaId, ReplicaScrub] = {}
        self._saved_at: dict[ReplicaId, float] = {}
        self._free_at = 0.0
        """Loop time before which the schedule's rate allows nothing more."""
        self._wake = asyncio.Event()

    def begin(self, hosted: HostedReplica, rate_bytes: int) -> int:
        """Begin a pass now, in the place of one of the schedule, or join one that was begun so; its number."""
        state = self._state(hosted)
        if not (state.latest.running and state.latest.by_hand):
            self._begin(hosted, state, by_hand=True, rate_bytes=rate_bytes)
        self._wake.set()
        return state.latest.number

    def status(self, hosted: HostedReplica) -> pb.ScrubStatus:
        return self._state(hosted).message()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._forget_gone()
            self._begin_due()
            ready = [each for each in self._running.values() if self._ready_at(each) <= loop.time()]
            if ready:
                await self._step(min(ready, key=lambda each: (not each.here.by_hand, each.here.began_ms)))
            else:
                await self._wait()

    def note_all(self) -> None:
        """Write down how far each pass is: the node ends."""
        for hosted in self._replicas():
            if hosted.replica in self._states:
                save(self._path(hosted), self._states[hosted.replica])

    # ---- which one

    def _forget_gone(self) -> None:
        there = {hosted.replica for hosted in self._replicas() if not hosted.closed}
        for replica in self._states.keys() - there:
            del self._states[replica]
            self._running.pop(replica, None)

    def _begin_due(self) -> None:
        now_ms, every_ms = self._wall_ms(), round(1000 * self._settings.scrub_every_s)
        for hosted in self._replicas():
            if hosted.closed or hosted.replica in self._running:
                continue
            state = self._state(hosted)
            if state.latest.running:
                self._running[hosted.replica] = self._scrub(hosted, state)
                continue
            state.due_ms = min(state.due_ms, now_ms + every_ms)  # the clock was put back, or the setting is another
            if state.due_ms <= now_ms and hosted.follower.whole:
                self._begin(hosted, state, by_hand=False, rate_bytes=self._settings.scrub_rate_bytes)

    def _begin(self, hosted: HostedReplica, state: ScrubState, *, by_hand: bool, rate_bytes: int) -> None:
        state.latest = Pass(
            number=state.latest.number + 1,
            by_hand=by_hand,
            rate_bytes=rate_bytes,
            running=True,
            began_ms=self._wall_ms(),
        )
        self._running[hosted.replica] = self._scrub(hosted, state)
        _log.info("scrub begins", replica=hosted.replica, number=state.latest.number, by_hand=by_hand)

    def _scrub(self, hosted: HostedReplica, state: ScrubState) -> ReplicaScrub:
        scrub = ReplicaScrub(hosted, state, self._peers, self._repair)
        scrub.alone_at = asyncio.get_running_loop().time() + _PEERS_WAIT_S
        return scrub

    def _ready_at(self, scrub: ReplicaScrub) -> float:
        """In loop time."""
        at = scrub.ready_at if scrub.hosted.peers else max(scrub.ready_at, scrub.alone_at)
        return at if scrub.here.by_hand else max(at, self._free_at)

    async def _wait(self) -> None:
        self._wake.clear()
        now = asyncio.get_running_loop().time()
        soonest = min((self._ready_at(each) - now for each in self._running.values()), default=_LONGEST_WAIT_S)
        wait_s = min(soonest, self._settings.scrub_every_s, _LONGEST_WAIT_S)
        if any(not each.hosted.peers for each in self._running.values()):
            wait_s = min(wait_s, self._settings.heartbeat_s)
        try:
            async with asyncio.timeout(max(wait_s, 0.001)):
                await self._wake.wait()
        except TimeoutError:
            return

    # ---- a step

    async def _step(self, scrub: ReplicaScrub) -> None:
        loop, hosted = asyncio.get_running_loop(), scrub.hosted
        began = loop.time()
        goes_on, why = True, ""
        try:
            if hosted.follower.whole:
                size_bytes, goes_on = await scrub.step()
                await self._keep_pace(scrub, size_bytes, loop.time() - began)
            else:
                goes_on, why = False, "the replica is being filled"
        except Corrupt as error:
            self._repair(hosted, error)
            goes_on, why = False, str(error)
        except CairnError as error:
            goes_on, why = False, str(error)
        if self._running.get(hosted.replica) is not scrub or hosted.closed:
            return
        if not goes_on:
            self._end(scrub, why)
        elif loop.time() - self._saved_at.get(hosted.replica, 0.0) > _SAVE_S:
            self._save(hosted)

    async def _keep_pace(self, scrub: ReplicaScrub, size_bytes: int, took_s: float) -> None:
        now = asyncio.get_running_loop().time()
        rate_bytes = scrub.here.rate_bytes if scrub.here.by_hand else self._settings.scrub_rate_bytes
        if rate_bytes:
            pause_s = max(size_bytes, _LEAST_BYTES) / rate_bytes
            if scrub.here.by_hand:
                scrub.ready_at = max(scrub.ready_at, now + pause_s)
            else:
                self._free_at = max(self._free_at, now - took_s) + pause_s
        if self._traffic.busy or scrub.guests:
            await asyncio.sleep(min(_PAUSES * took_s, _LONGEST_PAUSE_S))

    def _end(self, scrub: ReplicaScrub, why: str) -> None:
        """why: empty where it went through to its end."""
        state, here = scrub.state, scrub.here
        scrub.finish()
        here.running, here.why = False, why or here.why
        here.pending.clear()
        state.ended = here.number
        now_ms = self._wall_ms()
        if not why:
            state.ended_ms = now_ms
        again_s = self._settings.scrub_every_s if not why else min(self._settings.scrub_every_s, _AGAIN_S)
        state.due_ms = now_ms + round(1000 * again_s)
        del self._running[scrub.hosted.replica]
        self._save(scrub.hosted)
        _log.info(
            "scrub has ended",
            replica=scrub.hosted.replica,
            number=here.number,
            extents=here.done,
            damaged=len(here.damaged),
            bad=here.bad,
            not_compared=here.not_compared,
            differing=len(state.differing),
            why=here.why,
        )

    # ---- what is kept

    def _state(self, hosted: HostedReplica) -> ScrubState:
        state = self._states.get(hosted.replica)
        if state is None:
            state = load(self._path(hosted))
            if state is None:
                share = xxhash.xxh3_64_intdigest(hosted.replica.encode()) / (1 << 64)
                state = ScrubState(due_ms=self._wall_ms() + round(1000 * share * self._settings.scrub_every_s))
                save(self._path(hosted), state)
            self._states[hosted.replica] = state
        return state

    def _save(self, hosted: HostedReplica) -> None:
        self._saved_at[hosted.replica] = asyncio.get_running_loop().time()
        save(self._path(hosted), self._states[hosted.replica])

    @staticmethod
    def _path(hosted: HostedReplica) -> Path:
        return hosted.store.directory / "scrub"
