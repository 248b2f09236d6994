"""A replica's fetches from peers: records that it lacks, or copies of their tables, as blockstore/node/catch_up.py."""

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from blockstore.domain import ORIGIN
from blockstore.replication.messages import FetchDelta, FetchLog
from tests.simulation.model_tables import ExtentCopy
from tests.simulation.network import Stream
from tests.simulation.requests import Copied, DeltaRequest, LogRequest

if TYPE_CHECKING:
    from tests.simulation.node import Node

_TIMEOUT_S: Final = 1.0


class Fetch:
    """What a replica fetches from a peer: one of a kind at a time, a newer one ends the one before."""

    def __init__(self, node: "Node", effect: FetchLog | FetchDelta) -> None:
        self.node = node
        self.effect = effect
        self.open = True
        self._arrived: deque[Any] = deque()
        self._busy = False
        self._done = 0
        self._began = ORIGIN
        self._extents: set[int] = set()
        self._heard = node.scheduler.now
        world = node.world
        peer = world.node_of(effect.peer)
        self._stream = Stream(world.network, node, peer, handle=peer.serve, answered=self._receive, broken=self._fail)
        epoch = node.follower.epoch
        if isinstance(effect, FetchLog):
            self._stream.send(LogRequest(epoch, effect.after, effect.target))
        else:
            self._stream.send(DeltaRequest(epoch, effect.since, effect.at_least))
        node.after(_TIMEOUT_S, self._watch)

    def close(self) -> None:
        self.open = False
        self._stream.close()

    def _watch(self) -> None:
        if self.open and not self._busy and self.node.scheduler.now - self._heard >= _TIMEOUT_S:
            self._fail()
        elif self.open:
            self.node.after(_TIMEOUT_S, self._watch)

    def _receive(self, message: Any) -> None:
        self._heard = self.node.scheduler.now
        self._arrived.append(message)
        self._go_on()

    def _go_on(self) -> None:
        while self.open and self._arrived and not self._busy:
            message = self._arrived.popleft()
            if message is None:
                self._fail()
            elif isinstance(self.effect, FetchLog):
                self._take_log(message)
            else:
                self._take_delta(message)

    def _take_log(self, message: Any) -> None:
        node, attempt = self.node, self.effect.attempt
        if message == "not held":
            self.close()
            node.carry_out(node.follower.log_not_held(attempt))
        elif message == "end":
            self.close()
            node.carry_out(node.follower.log_ended(attempt))
        else:
            node.carry_out(node.follower.log_fetched(attempt, message))

    def _take_delta(self, message: Any) -> None:
        node, attempt = self.node, self.effect.attempt
        if message == "end":
            self._end_delta()
            return
        total, copied = message
        if copied.meta is not None:
            self._began = copied.stated
        self._extents |= {copy.extent for copy in copied.extents}
        self._busy = True

        def then(accepted: bool) -> None:
            self._busy = False
            if not self.open:
                return
            if not accepted:
                self._fail()
                return
            self._done += len(copied.extents)
            node.follower.delta_progress(attempt, self._done, total)
            self._go_on()

        node.copy(attempt, copied, then)

    def _end_delta(self) -> None:
        """A copy of everything takes away what the peer did not have when it began."""
        node, effect = self.node, self.effect
        assert isinstance(effect, FetchDelta)
        absent = node.store.tables.extents_held() - self._extents if not effect.since else set()

        def then(accepted: bool) -> None:
            if self.open and accepted:
                self.close()
                node.carry_out(node.follower.delta_done(effect.attempt))
            else:
                self._fail()

        if not absent:
            then(True)
            return
        copies = tuple(ExtentCopy(extent, {}, {}) for extent in sorted(absent))
        node.copy(effect.attempt, Copied(self._began, None, copies, absent=True), then)

    def _fail(self) -> None:
        if self.open:
            self.close()
            follower, attempt = self.node.follower, self.effect.attempt
            failed = follower.fetch_failed if isinstance(self.effect, FetchLog) else follower.delta_failed
            self.node.carry_out(failed(attempt))
