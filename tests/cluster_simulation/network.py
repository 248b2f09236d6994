"""The simulated network: which links are cut and how slow they are, and connections that keep their order.

What is said over a link that is cut is held back, as TCP does, and the connection ends where that lasts longer than
keepalive allows. Links are (from, to), by the names of processes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.processes import CURRENT, Process, in_process

#: Of grpc_endpoint's options: a ping each 2 s, and a connection that answers none for 3 s is given up.
KEEPALIVE_S: Final = 5.0
LATENCY_S: Final = 0.0002, 0.002
#: Linux's TCP_RTO_MIN: as long TCP waits at least before it sends again, and twice as long the next time.
RESENT_S: Final = 0.2

Link = tuple[str, str]


class Listener(Protocol):
    """What has an address. process: whose it is, None where it is the test's."""

    process: Process | None

    async def handler(self, method: str) -> Any:
        """Of that call; None where there is none."""


class Call(Protocol):
    """What ends with its connection."""

    def cut_off(self, why: str) -> None:
        """The connection has ended."""


@dataclass(slots=True)
class _Cut:
    """since: when nothing got through any more. count: how many hold it cut."""

    since: float
    count: int


class Network:
    """servers: by address. latency_of: what messages take, between these, to and from a process or over a link.

    lost_of: by process, the share of messages, to and from it, that are lost; TCP sends those again.
    """

    def __init__(self, loop: SimulationLoop) -> None:
        self.loop = loop
        self.servers: dict[str, Listener] = {}
        self.latency_of: dict[str | Link, tuple[float, float]] = {}
        self.lost_of: dict[str, float] = {}
        self._cut: dict[Link, _Cut] = {}
        self._connections: dict[Connection, None] = {}

    def cut(self, links: Iterable[Link]) -> Callable[[], None]:
        """Nothing gets through these links until what is returned is called."""
        cut = list(links)
        for link in cut:
            self._cut.setdefault(link, _Cut(self.loop.time(), 0)).count += 1
        self.loop.call_later(KEEPALIVE_S, self._break_silent)
        return lambda: self._mend(cut)

    def _mend(self, links: list[Link]) -> None:
        for link in links:
            self._cut[link].count -= 1
            if not self._cut[link].count:
                del self._cut[link]
        for connection in list(self._connections):
            connection.flush()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cut

    def delay_s(self, source: str, target: str = "") -> float:
        """For one message: of the slowest of both ends, as far as they are known, and the link."""
        those = source, target, (source, target)
        low, high = max((self.latency_of.get(each, LATENCY_S) for each in those), key=lambda each: each[1])
        share = max(self.lost_of.get(source, 0.0), self.lost_of.get(target, 0.0))
        return self.loop.random.uniform(low, high) + (self._resent_s(share) if share else 0.0)

    def _resent_s(self, share: float) -> float:
        """What a message takes beyond its way, where it may be lost each time that it is sent; all behind it waits."""
        waited_s, again_s = 0.0, RESENT_S
        while self.loop.random.random() < share:
            waited_s, again_s = waited_s + again_s, 2 * again_s
        return waited_s

    def add(self, connection: "Connection") -> None:
        self._connections[connection] = None

    def forget(self, connection: "Connection") -> None:
        self._connections.pop(connection, None)

    def died(self, process: Process) -> None:
        """Its connections are reset."""
        for address in [address for address, server in self.servers.items() if server.process is process]:
            del self.servers[address]
        for connection in list(self._connections):
            if process in (connection.client, connection.served):
                connection.end("connection reset by peer")

    def _break_silent(self) -> None:
        silent = self.loop.time() - KEEPALIVE_S + 1e-6
        for connection in list(self._connections):
            ends = name_of(connection.client), name_of(connection.served)
            since = [self._cut[link].since for link in (ends, ends[::-1]) if link in self._cut]
            if since and min(since) <= silent:
                connection.end("keepalive watchdog timeout")


def name_of(process: Process | None) -> str:
    return process.name if process is not None else "test"


class Connection:
    """Between a channel's process and a server's."""

    def __init__(self, network: Network, server: Listener) -> None:
        self.client, self.served, self.server = CURRENT.get(), server.process, server
        self.open = True
        self.calls: dict[Call, None] = {}
        self._network = network
        self._next = [0.0, 0.0]
        self._held: list[list[Callable[[], None]]] = [[], []]
        network.add(self)

    def to_server(self, arrive: Callable[[], None]) -> None:
        self._send(0, self.client, self.served, arrive)

    def to_client(self, arrive: Callable[[], None]) -> None:
        self._send(1, self.served, self.client, arrive)

    def _send(self, way: int, source: Process | None, target: Process | None, arrive: Callable[[], None]) -> None:
        if not self.open or (source is not None and not source.alive):
            return
        if self._held[way] or self._network.is_cut(name_of(source), name_of(target)):
            self._held[way].append(arrive)
            return
        loop, delay_s = self._network.loop, self._network.delay_s(name_of(source), name_of(target))
        self._next[way] = max(self._next[way] + 1e-7, loop.time() + delay_s)
        loop.call_at(self._next[way], self._arrive, target, arrive)

    def _arrive(self, target: Process | None, arrive: Callable[[], None]) -> None:
        if self.open and (target is None or target.alive):
            in_process(target, arrive)

    def flush(self) -> None:
        """What was held back, now that the link is whole."""
        for way, ends in enumerate(((self.client, self.served), (self.served, self.client))):
            held, self._held[way] = self._held[way], []
            for arrive in held:
                self._send(way, *ends, arrive)

    def end(self, why: str) -> None:
        """Both sides hear of it, as far as they live."""
        if self.open:
            self.open = False
            self._network.forget(self)
            for call in list(self.calls):
                call.cut_off(why)
