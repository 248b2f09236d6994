"""A seeded network as gRPC over TCP shows it: calls, and streams that are in order until they break.

A call's request may be lost, late or handled twice; its answer reaches the caller at most once, and
only before the deadline. A stream delivers a prefix of what was sent, each way; when it breaks, what
is under way may still arrive for a while, even after the client has opened another one. A cut
swallows what is sent in one direction: nobody is told, until the keepalive gives the stream up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.simulation.scheduler import Process, Scheduler


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """How bad a seed's network is. Probabilities are for each message."""

    latency_s: float = 0.0005
    late: float = 0.0
    late_s: float = 0.3
    lost: float = 0.0
    repeated: float = 0.0
    keepalive_s: float = 0.7


class Network:
    """Delays, losses and cuts. Names are those of the processes."""

    def __init__(self, scheduler: Scheduler, random: Random, faults: NetworkFaults) -> None:
        self.scheduler = scheduler
        self.random = random
        self.faults = faults
        self.cuts: set[tuple[str, str]] = set()
        self.slow: dict[tuple[str, str], float] = {}
        self.streams: list[Stream] = []

    def delay(self, source: str, target: str) -> float:
        draw = self.random.random
        delay = self.faults.latency_s * (0.5 + draw())
        if self.faults.late and draw() < self.faults.late:
            delay += draw() * self.faults.late_s
        if self.slow:
            delay += self.slow.get((source, target), 0.0) * draw()
        return delay

    def loses(self, source: str, target: str) -> bool:
        """Whether a message of a call that is sent now never arrives."""
        return (source, target) in self.cuts or self.random.random() < self.faults.lost

    def isolate(self, name: str, others: list[str], *, outward: bool = True, inward: bool = True) -> None:
        for other in others:
            if outward:
                self.cuts.add((name, other))
            if inward:
                self.cuts.add((other, name))

    def heal(self) -> None:
        """No more faults of any kind."""
        self.cuts.clear()
        self.slow.clear()
        self.faults = NetworkFaults(latency_s=self.faults.latency_s)

    def server_gone(self, server: Process) -> None:
        """Its clients hear of it soon, as when a process dies, or by the keepalive, as when a machine does."""
        self.streams = [stream for stream in self.streams if stream.open]
        within_s = self.random.choice((0.01, self.faults.keepalive_s))
        for stream in self.streams:
            stream.lose_server(server, within_s)

    def break_stream(self) -> None:
        """One of the open streams breaks."""
        self.streams = [stream for stream in self.streams if stream.open]
        if self.streams:
            self.random.choice(self.streams).break_off()


class Call:
    """One request and at most one answer. Also the origin that the server answers to."""

    def __init__(
        self,
        network: Network,
        client: Process,
        server: Process,
        *,
        handle: Callable[["Call"], None],
        answered: Callable[[Any], None],
        failed: Callable[[], None],
        deadline_s: float,
    ) -> None:
        self._network = network
        self._client = client
        self._server = server
        self._answered = answered
        self._failed = failed
        self._life = client.life
        self.open = True
        arrivals = 0 if network.loses(client.name, server.name) else 1
        if arrivals and network.random.random() < network.faults.repeated:
            arrivals = 2
        for _ in range(arrivals):
            network.scheduler.after(network.delay(client.name, server.name), lambda: self._arrive(handle))
        client.after(deadline_s, self._expire)

    def deliver(self, message: Any) -> None:
        """The server's answer; dropped if the call is over."""
        network = self._network
        if not self.open or self._client.life != self._life or network.loses(self._server.name, self._client.name):
            return
        self._client.after(network.delay(self._server.name, self._client.name), lambda: self._answer(message))

    def cancel(self) -> None:
        self.open = False

    def __repr__(self) -> str:
        return f"<call of {self._client.name}>"

    def _arrive(self, handle: Callable[["Call"], None]) -> None:
        if self._server.alive:
            self._server.after(0.0, lambda: handle(self))

    def _answer(self, message: Any) -> None:
        if self.open:
            self.open = False
            self._answered(message)

    def _expire(self) -> None:
        if self.open:
            self.open = False
            self._failed()


class Stream:
    """Messages in order, each way, until it breaks. Also the origin that the server answers to."""

    def __init__(
        self,
        network: Network,
        client: Process,
        server: Process,
        *,
        handle: Callable[["Stream", Any], None],
        answered: Callable[[Any], None],
        broken: Callable[[], None],
    ) -> None:
        self._network = network
        self._client = client
        self._server = server
        self._handle = handle
        self._answered = answered
        self._broken = broken
        self._lives = client.life, server.life
        self._forward_at = self._back_at = 0.0
        self._arrives_until = float("inf")
        self._dooms = False
        self.open = True
        network.streams.append(self)

    def send(self, message: Any) -> None:
        if not self.open or self._dooms:
            return
        if (self._client.name, self._server.name) in self._network.cuts:
            self._doom()
            return
        now = self._network.scheduler.now
        delay = self._network.delay(self._client.name, self._server.name)
        self._forward_at = max(now + delay, self._forward_at)
        self._network.scheduler.at(self._forward_at, lambda: self._arrive(message))

    def deliver(self, message: Any) -> None:
        """The server's answer; dropped if the stream is gone."""
        if not self.open or self._dooms or self._client.life != self._lives[0]:
            return
        if (self._server.name, self._client.name) in self._network.cuts:
            self._doom()
            return
        now = self._network.scheduler.now
        delay = self._network.delay(self._server.name, self._client.name)
        self._back_at = max(now + delay, self._back_at)
        self._client.after(self._back_at - now, lambda: self._answer(message))

    def break_off(self) -> None:
        """The connection is gone; the client hears of it soon, and a part of what was sent arrives."""
        if self.open and not self._dooms:
            self._dooms = True
            random = self._network.random
            grace = 0.0 if random.random() < 0.5 else random.random() * 0.5
            self._arrives_until = self._network.scheduler.now + grace
            self._client.after(random.random() * 0.05, self._end)

    def lose_server(self, server: Process, within_s: float) -> None:
        """Where this is its server, it is gone."""
        if self._server is server:
            self._client.after(self._network.random.random() * within_s, self._end)

    def refuse(self) -> None:
        """The server ends it."""
        if self.open and not self._dooms:
            self._dooms = True
            self._client.after(self._network.delay(self._server.name, self._client.name), self._end)

    def close(self) -> None:
        """The client gives it up; what is under way may arrive yet."""
        self.open = False

    def __repr__(self) -> str:
        return f"<stream of {self._client.name}>"

    def _doom(self) -> None:
        self._dooms = True
        self._client.after(self._network.faults.keepalive_s * (0.5 + self._network.random.random()), self._end)

    def _arrive(self, message: Any) -> None:
        if self._network.scheduler.now > self._arrives_until:
            return
        if not self._server.alive or self._server.life != self._lives[1]:
            self.refuse()
            return
        if self._server.scheduler.now < self._server.paused_until:
            self._server.after(0.0, lambda: self._handle(self, message))
        else:
            self._handle(self, message)

    def _answer(self, message: Any) -> None:
        if self.open:
            self._answered(message)

    def _end(self) -> None:
        if self.open:
            self.open = False
            self._broken()
