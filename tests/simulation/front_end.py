"""A front-end: the shell around the very Leader, and a clock of its own.

One link to each member: a SealEpoch call when the way opens, a stream for what follows its answer.
A call that is not answered or a stream that breaks closes the link; it opens again a little later.
A front-end that another attachment has replaced lives on until it is told or dies.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blockstore.domain import Configuration, Position, ReplicaId
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.replication.leader import Leader
from blockstore.replication.messages import (
    Append,
    Completed,
    Failed,
    FencedBy,
    LeaderEffect,
    Over,
    ReadDone,
    ReadDropped,
    ReadFrom,
    Reconnect,
    Relieved,
    Sealed,
    SealEpoch,
    Send,
    Serving,
)
from blockstore.units import BlockNumber, Epoch
from tests.simulation.hydration import Hydrator
from tests.simulation.model_tables import Tables
from tests.simulation.network import Call, Stream
from tests.simulation.node import Node
from tests.simulation.requests import ReadRequest
from tests.simulation.scheduler import Process
from tests.simulation.workload import Guest

if TYPE_CHECKING:
    from tests.simulation.world import World

_CALL_TIMEOUT_S = 0.6


class FrontEnd(Process):
    """One attachment: one epoch, one leader, one guest."""

    def __init__(self, world: "World", epoch: Epoch, *, accept_loss: bool = False) -> None:
        super().__init__(world.scheduler, f"front-end-{epoch}")
        self.world = world
        self.epoch = epoch
        self.serving = False
        self.over: CairnError | None = None
        random = world.random
        self._clock_offset = random.random() * 1000
        self._clock_rate = 1 + (random.random() - 0.5) * world.plan.clock_drift
        self.guest = Guest(self, world)
        self._hydrator = Hydrator(self, world)
        self._data: dict[int, list[int | None]] = {}
        settings = world.plan.settings
        self.leader = Leader(epoch, world.configuration, settings, self.clock(), accept_loss=accept_loss)
        self._links: dict[ReplicaId, Link] = {}
        self._gathering = False
        self._link_up(world.configuration)
        self._tick()

    def _link_up(self, configuration: Configuration) -> None:
        """A link to everyone, and to nobody else."""
        replicas = [member.replica for member in configuration.everyone]
        for gone in [replica for replica in self._links if replica not in replicas]:
            self._links.pop(gone).close()
        for replica in replicas:
            if replica not in self._links:
                link = self._links[replica] = Link(self, self.world.node_of(replica))
                self.after(self.world.network.delay(self.name, link.node.name), link.open)

    def reconfigure(self, configuration: Configuration) -> None:
        """Control says how its record is now."""
        effects = self.leader.reconfigure(configuration, self.clock())
        self._link_up(self.leader.configuration)
        self.carry_out(effects)

    def clock(self) -> float:
        """This machine's boot-time seconds."""
        return self._clock_offset + self.scheduler.now * self._clock_rate

    def crash(self) -> None:
        self.world.trace(self.name, "crashes")
        self.end_life()
        self.guest.gone()

    def pause(self, duration_s: float) -> None:
        self.world.trace(self.name, "pauses for", round(duration_s, 3))
        self.paused_until = self.scheduler.now + duration_s

    def carry_out(self, effects: Iterable[LeaderEffect]) -> None:
        self.world.checker.leader_stepped(self)
        for effect in effects:
            self._carry_out(effect)
        until = self.leader.gathers_until
        if until is not None and not self._gathering:
            self._gathering = True
            self.after(until - self.clock(), self._send_gathered)

    def _send_gathered(self) -> None:
        self._gathering = False
        if self.over is None:
            self.carry_out(self.leader.send_gathered(self.clock()))

    def _tick(self) -> None:
        if self.over is None:
            self.carry_out(self.leader.tick(self.clock()))
            self.after(self.world.plan.settings.heartbeat_s / 2, self._tick)

    def _carry_out(self, effect: LeaderEffect) -> None:
        world = self.world
        world.seen[type(effect).__name__] += 1
        if not (isinstance(effect, Send) and isinstance(effect.message, Append)):
            world.trace(self.name, effect)
        match effect:
            case Send(replica, message):
                self._links[replica].send(message)
            case Reconnect(replica):
                self._links[replica].reconnect()
            case ReadFrom():
                self._read(effect)
            case ReadDropped(attempt):
                self._data.pop(attempt, None)
            case Serving():
                self.serving = True
                world.checker.serving(self)
                self.guest.begin()
                self._hydrator.begin()
            case Over(error):
                self.serving = False
                self.over = error
                world.checker.over(self)
                for link in self._links.values():
                    link.close()
            case _:
                self._tell_guest(effect)

    def _tell_guest(self, effect: LeaderEffect) -> None:
        match effect:
            case Completed(tickets):
                self.guest.completed(tickets)
            case Sealed(ticket, generation):
                self.guest.sealed(ticket, generation)
            case Failed(tickets, error):
                self.world.seen[type(error).__name__] += 1
                self.guest.failed(tickets, error)
            case ReadDone(ticket, attempt):
                self.guest.read_done(ticket, self._data.pop(attempt))
            case Relieved():
                self.guest.relieved()

    def _read(self, effect: ReadFrom) -> None:
        node = self.world.node_of(effect.replica)
        request = ReadRequest(self.epoch, self.leader.configuration.number, effect.commit, effect.start, effect.count)

        def answered(answer: Any) -> None:
            if self.over is not None:
                return
            if isinstance(answer, CairnError):
                self.carry_out(self.leader.read_failed(effect.attempt, answer, self.clock()))
            else:
                self._data[effect.attempt] = answer
                self.carry_out(self.leader.read_arrived(effect.attempt, self.clock()))

        def failed() -> None:
            answered(QuorumUnavailable("the call was not answered"))

        network = self.world.network
        Call(
            network,
            self,
            node,
            handle=lambda call: node.read(call, request),
            answered=answered,
            failed=failed,
            deadline_s=_CALL_TIMEOUT_S,
        )

    def read_tables(self, start: int, count: int) -> list[int | None] | None:
        """As blockstore/volume/short_circuit.py. The tables are there also while their node is down."""
        leader = self.leader
        leader.follow_writes()
        for member in leader.configuration.members:
            node = self.world.node_of(member.replica)
            needed = leader.must_reflect(member.replica, BlockNumber(start), count, self.clock())
            tables = node.disk.tables
            damaged = node.lost or node.corrupt or tables.has_lost(start, count)
            if needed is not None and not damaged and self.shows(tables, needed) and not self.fenced(node):
                leader.tables_reflect(tables.image.applied)
                if leader.may_hand_on(self.clock()):
                    self.world.seen["tables read"] += 1
                    return [tables.show(block, None) or 0 for block in range(start, start + count)]
        return None

    def fenced(self, node: Node) -> bool:
        """Whether another epoch than this one was sealed there: looked at after the tables."""
        return node.fence != self.epoch

    @staticmethod
    def shows(tables: Tables, needed: Position) -> bool:
        """Whether what these show is as of `needed` or later, and all that there is."""
        image = tables.image
        return image.filling is None and not tables.source and image.applied >= needed


class Link:
    """The way from a front-end to one member."""

    def __init__(self, front_end: FrontEnd, node: Node) -> None:
        self.node = node
        self._front_end = front_end
        self._call: Call | None = None
        self._stream: Stream | None = None
        self._up = False

    def open(self) -> None:
        front_end = self._front_end
        if front_end.over is None and not self._up:
            self._up = True
            front_end.carry_out(front_end.leader.connected(self.node.replica, front_end.clock()))

    def send(self, message: SealEpoch | Append) -> None:
        if isinstance(message, SealEpoch):
            self._seal(message)
        elif self._stream is not None:
            assert self._up
            self._stream.send(message)

    def close(self) -> None:
        self._up = False
        if self._call is not None:
            self._call.cancel()
        if self._stream is not None:
            self._stream.close()
        self._call = self._stream = None

    def reconnect(self) -> None:
        """The leader wants it closed, and opened anew."""
        if self._up:
            self._broken()

    def _seal(self, message: SealEpoch) -> None:
        front_end, node = self._front_end, self.node
        if not self._up or self._call is not None:
            return

        def handle(call: Call) -> None:
            known = max(message.known, front_end.world.known_acked(node.replica))
            node.seal(call, replace(message, known=known))

        self._call = Call(
            front_end.world.network,
            front_end,
            node,
            handle=handle,
            answered=self._sealed,
            failed=self._broken,
            deadline_s=_CALL_TIMEOUT_S,
        )

    def _sealed(self, message: Any) -> None:
        front_end, network = self._front_end, self._front_end.world.network
        self._call = None
        if not isinstance(message, FencedBy):
            self._stream = Stream(
                network,
                front_end,
                self.node,
                handle=self.node.append,
                answered=self._answered,
                broken=self._broken,
            )
        self._answered(message)

    def _answered(self, message: Any) -> None:
        front_end = self._front_end
        if front_end.over is None:
            front_end.carry_out(front_end.leader.answered(self.node.replica, message, front_end.clock()))

    def _broken(self) -> None:
        front_end = self._front_end
        self.close()
        if front_end.over is None:
            front_end.carry_out(front_end.leader.disconnected(self.node.replica, front_end.clock()))
            front_end.after(0.02 + front_end.world.random.random() * 0.2, self.open)
