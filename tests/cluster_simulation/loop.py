"""The event loop of the simulation: virtual time, no threads, and sockets that are pairs of buffers.

Work for a thread takes a time that is drawn, and is done in one moment, at its beginning or at its end.
A server's socket is known by its
address; who connects to it gets a pair of transports, whose bytes take the network's time.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final

from tests.cluster_simulation.processes import CURRENT, Process, in_process, make_task
from tests.virtual_time import VirtualTimeLoop

_THREAD_S: Final = 0.0001, 0.003
Outcome = tuple[Any, BaseException | None]


class SimulationLoop(VirtualTimeLoop):
    """random: decides how long everything takes. thread_s_of: work in a thread of that process, between these."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random = random
        self.thread_s_of: dict[str, tuple[float, float]] = {}
        self._busy: Counter[Any] = Counter()
        """What each executor has to do."""
        self._free_at: dict[Any, float] = {}
        self.listening: dict[int, tuple[Process | None, Callable[[], Any]]] = {}
        self._ports = 20_000
        self._timers = 0
        self.set_task_factory(make_task)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *arguments: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Those of one moment come in the order in which they were asked for."""
        self._timers += 1
        return super().call_at(when + self._timers * 1e-10, callback, *arguments, context=context)

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    # ---- threads

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, function: Callable[..., Any], *arguments: Any
    ) -> "asyncio.Future[Any]":
        """It happens in one moment, now or when it ends: a process that is killed meanwhile did it, or did not."""
        process = CURRENT.get()
        future: asyncio.Future[Any] = self.create_future()
        if process is not None and not process.alive:
            future.set_exception(asyncio.CancelledError())
            return future
        work = functools.partial(_outcome, process, function, *arguments)
        made = work() if self.random.random() < 0.5 and not self._busy.get(executor) else None

        def done() -> None:
            self._busy[executor] -= 1
            if process is None or process.alive:
                _tell(future, made or work())

        ends_at = self.time() + self.random.uniform(*self.thread_s_of.get(process.name if process else "", _THREAD_S))
        if getattr(executor, "_max_workers", 0) == 1:  # one thread: one after the other
            ends_at = self._free_at[executor] = max(ends_at, self._free_at.get(executor, 0.0))
        self._busy[executor] += 1
        self.call_at(ends_at, done)
        return future

    def add_signal_handler(self, sig: int, callback: Any, *arguments: Any) -> None:  # type: ignore[override]
        process = CURRENT.get()
        assert process is not None
        process.signals[sig] = lambda: in_process(process, callback, *arguments)

    # ---- sockets

    async def create_server(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        bound = options.get("sock")
        process, number = CURRENT.get(), bound.getsockname()[1] if bound else port or self.new_port()
        if number in self.listening:
            raise OSError(98, "Address already in use")
        self.listening[number] = process, factory
        server = _Server(self, number, bound)
        if process is not None:
            process.on_death.append(server.close)
        return server

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        if port not in self.listening:
            raise ConnectionRefusedError(111, "Connection refused")
        process, serve = self.listening[port]
        client, server = factory(), in_process(process, serve)
        near, far = _Transport(self, CURRENT.get(), client), _Transport(self, process, server)
        near.other, far.other = far, near
        if process is not None:
            process.on_death.append(far.abort)
        in_process(process, server.connection_made, far)
        client.connection_made(near)
        return near, client


def _outcome(process: Process | None, function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return in_process(process, function, *arguments), None
    except BaseException as error:
        return None, error


def _tell(future: "asyncio.Future[Any]", outcome: Outcome) -> None:
    result, error = outcome
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class _Server:
    """bound: a real socket that nobody connects to; it has a number from the system."""

    def __init__(self, loop: SimulationLoop, port: int, bound: Any) -> None:
        self._loop, self._port, self._bound = loop, port, bound
        self.sockets = [_Socket(port)]

    def close(self) -> None:
        if self._bound is not None:
            self._bound.close()
        self._loop.listening.pop(self._port, None)

    async def wait_closed(self) -> None:
        """Nothing is left open."""

    def is_serving(self) -> bool:
        return self._port in self._loop.listening


class _Socket:
    def __init__(self, port: int) -> None:
        self._port = port

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


class _Transport(asyncio.Transport):
    """One end. Bytes arrive in order, each piece a moment after it was written."""

    other: "_Transport"

    def __init__(self, loop: SimulationLoop, process: Process | None, protocol: Any) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "socket": _Socket(1)})
        self._loop, self._process, self._protocol = loop, process, protocol
        self._closing = self._lost = False
        self._next = 0.0
        self._paused = False
        self._held: list[Callable[[], None]] = []

    def write(self, data: Any) -> None:
        piece = bytes(data)
        if not self._closing and piece:
            self._later(lambda: self.other._receive(piece))

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def _later(self, arrive: Callable[[], None]) -> None:
        self._next = max(self._next, self._loop.time()) + self._loop.random.uniform(0.00001, 0.0002)
        self._loop.call_at(self._next, arrive)

    def _receive(self, data: bytes) -> None:
        if self._paused:
            self._held.append(lambda: self._receive(data))
        elif not self._lost and (self._process is None or self._process.alive):
            in_process(self._process, self._feed, data)

    def _feed(self, data: bytes) -> None:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(data)
            return
        left = memoryview(data)
        while left and not self._lost:
            buffer = memoryview(protocol.get_buffer(len(left)))
            size = min(len(left), len(buffer))
            buffer[:size] = left[:size]
            protocol.buffer_updated(size)
            left = left[size:]

    def _ended(self) -> None:
        if self._paused:
            self._held.append(self._ended)
        elif not self._lost and not in_process(self._process, self._protocol.eof_received):
            self.close()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._later(self.other._ended)
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        self._closing = True
        self._later(lambda: self.other._lose(ConnectionResetError(104, "Connection reset by peer")))
        self._loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = self._closing = True
            if self._process is None or self._process.alive:
                in_process(self._process, self._protocol.connection_lost, error)

    def write_eof(self) -> None:
        self._later(self.other._ended)

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is ever held back."""

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 0, 1 << 20

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        held, self._held = self._held, []
        for arrive in held:
            arrive()

    def is_reading(self) -> bool:
        return not self._paused

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol
