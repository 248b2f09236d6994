"""An attached device, watched: over real servers, with a model of the kernel, and control's answers at hand."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockstore.config import AttachSettings
from blockstore.errors import QuorumUnavailable
from nbd_server.connection import Connection
from nbd_server.exports import Export
from nbd_server.kernel import handover, session
from nbd_server.kernel.devices import RETRY_MS, Host, Owner
from nbd_server.kernel.link import open_links
from nbd_server.kernel.messages import Command, Request
from nbd_server.kernel.supervision import State
from nbd_server.kernel.supervisor import Supervisor
from nbd_server.kernel.whereabouts import Place, Taken
from nbd_server.uri import NbdTarget
from tests.kernel_model import ModelKernel
from tests.nbd_serving import LIMIT_S, SIZE, Served, serving, until

OWNER = Owner("disk", "host-1")
#: probe_s: a front-end that is there answers within it, however slow the machine; one that is not refuses at once.
SETTINGS = AttachSettings(stall_s=0.1, probe_s=LIMIT_S, avoid_s=60, watch_s=0.1)


class Answers:
    """Control's, as `Whereabouts` gives them."""

    def __init__(self) -> None:
        self.place: Place | Exception = QuorumUnavailable("nobody")
        self.avoided: list[str] = []

    async def attach(self, volume: str, *, read_only: bool, force: bool = False, avoid: str = "") -> Place:
        self.avoided.append(avoid)
        if isinstance(self.place, Exception):
            raise self.place
        return self.place

    async def volume(self, volume: str) -> Any:
        raise QuorumUnavailable("control is away")


class Story:
    """The parts."""

    def __init__(self, served: Served, root: Path) -> None:
        self.kernel, self.host, self.answers, self.served = ModelKernel(root), Host(root), Answers(), served
        self.supervisor: Supervisor
        self.running: asyncio.Task[None]

    def place(self, served: Served | None = None, front_end: str = "fe-1") -> Place:
        where = served or self.served
        return Place(front_end, 1, SIZE, (NbdTarget("disk", "127.0.0.1", where.port),))

    async def begin(self, *, found: bool = False, connections: int = 1) -> None:
        """found: by a process that did not connect it."""
        self.owner = replace(OWNER, connections=connections)
        nbd: Any = self.kernel
        control: Any = self.answers
        self.answers.place = self.place()
        links = await open_links(self.place().targets[0], OWNER.client, connections, LIMIT_S)
        assert await handover.connect(nbd, self.host, links, self.owner, index=None, dead_timeout_s=60) == 0
        self.supervisor = Supervisor(
            nbd, self.host, control, SETTINGS, index=0, owner=self.owner, read_only=False, place=self.place(),
            links=() if found else links, tell=lambda state: None,
        )  # fmt: skip
        self.running = asyncio.create_task(self.supervisor.run())

    async def served_again(self) -> None:
        """The device reads."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    for queue in range(self.owner.connections + 1):
                        assert await self.kernel.read(0, 10, queue) == bytes(10)
                    break
                except OSError:
                    await asyncio.sleep(0.02)
        await until(lambda: self.supervisor.state is State.SERVED)
        if self.owner.connections > 1:
            assert self.kernel.timeout_s == handover.SLOW_S
            return
        assert self.kernel.timeout_s == 0, "a slow request would end the link"
        assert (self.host._sys / "nbd0" / "queue" / "io_timeout").read_text() == f"{RETRY_MS}\n"


@asynccontextmanager
async def story(root: Path, *, found: bool = False, connections: int = 1) -> AsyncIterator[Story]:
    async with serving() as served:
        parts = Story(served, root)
        await parts.begin(found=found, connections=connections)
        try:
            yield parts
        finally:
            await parts.kernel.ask(Request(Command.DISCONNECT, index=0))
            async with asyncio.timeout(LIMIT_S):
                await parts.running


def test_a_front_end_without_a_port_for_this_host_is_waited_out(tmp_path: Path) -> None:
    """It has TLS alone, and this host no certificates, or the other way round."""

    async def main() -> None:
        async with story(tmp_path) as parts:
            await parts.served_again()
            parts.answers.place = Place("fe-2", 2, SIZE, ())
            for connection in list(parts.served.server._connections):
                connection.abort()
            await until(lambda: "fe-2 has no port for this host" in parts.supervisor._last_words)
            parts.answers.place = parts.place()
            await parts.served_again()

    asyncio.run(main())


def test_a_broken_link_is_made_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            await parts.served_again()
            old = parts.kernel.link
            for connection in list(parts.served.server._connections):
                connection.abort()
            await parts.served_again()
            assert parts.kernel.link is not old

    asyncio.run(main())


def test_a_device_that_is_found_gets_a_link_that_is_ours(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path, found=True) as parts:
            old = parts.kernel.link
            await until(lambda: parts.kernel.link is not old)
            await parts.served_again()

    asyncio.run(main())


def test_while_control_is_away_the_last_place_is_tried(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            parts.answers.place = QuorumUnavailable("control is away")
            for connection in list(parts.served.server._connections):
                connection.abort()
            await parts.served_again()

    asyncio.run(main())


def test_a_front_end_that_hangs_is_left_for_the_one_that_control_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as other, story(tmp_path) as parts:
            await parts.served_again()
            parts.answers.place = parts.place(other, "fe-2")
            # Its kernel still accepts and acknowledges; the process does nothing.
            parts.served.server._listeners[0].close()
            parts.kernel.show_traffic(in_flight=3, completed=100)
            await until(lambda: parts.supervisor.state is not State.SERVED)
            parts.kernel.show_traffic(in_flight=0, completed=103)
            await parts.served_again()
            await until(lambda: other.server.connection_count == 1)
            await until(lambda: parts.served.server.connection_count == 0)

    asyncio.run(main())


def test_a_slow_front_end_that_answers_keeps_its_link(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            old = parts.kernel.link
            parts.kernel.show_traffic(in_flight=1, completed=5)
            await until(lambda: parts.supervisor.state is State.ASKING)
            await until(lambda: parts.supervisor.state is State.SERVED)
            assert parts.kernel.link is old
            assert parts.kernel.alive
            assert parts.answers.avoided == []

    asyncio.run(main())


def test_a_volume_that_is_taken_away_ends_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            parts.answers.place = Taken("attached for host-2")
            for connection in list(parts.served.server._connections):
                connection.abort()
            async with asyncio.timeout(LIMIT_S):
                await parts.running
            assert isinstance(parts.supervisor.ended_by, Taken)
            assert not parts.kernel.alive

    asyncio.run(main())


def test_another_front_end_is_asked_for_where_one_stays_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            parts.supervisor._settings = replace(SETTINGS, avoid_s=0.5)
            # A try takes 0.2 s by this clock: were it a machine's, one that stands still would skip those between.
            monkeypatch.setattr(parts.supervisor, "_now", lambda: 0.2 * len(parts.answers.avoided))
            parts.served.exports.remove("disk")
            for connection in list(parts.served.server._connections):
                connection.abort()
            await until(lambda: parts.answers.avoided.count("fe-1") >= 2)
            between = parts.answers.avoided[parts.answers.avoided.index("fe-1") + 1 :]
            assert "" in between[: between.index("fe-1") + 1], "a host that is cut off sends the volume round"

    asyncio.run(main())


def test_a_smaller_export_is_never_given_to_the_kernel(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as other, story(tmp_path) as parts:
            device = other.exports.remove("disk").device
            other.exports.add(Export("disk", _Sized(device, SIZE // 2)))  # type: ignore[arg-type]
            parts.answers.place = parts.place(other, "fe-2")
            for connection in list(parts.served.server._connections):
                connection.abort()
            await until(lambda: len(parts.answers.avoided) >= 3)
            assert not parts.kernel.alive

    asyncio.run(main())


def test_a_size_that_has_grown_meanwhile_is_not_told_with_a_new_link(tmp_path: Path) -> None:
    """The next look at control tells of it."""

    async def main() -> None:
        async with serving() as other, story(tmp_path) as parts:
            device = other.exports.remove("disk").device
            other.exports.add(Export("disk", _Sized(device, 2 * SIZE)))  # type: ignore[arg-type]
            parts.answers.place = parts.place(other, "fe-2")
            for connection in list(parts.served.server._connections):
                connection.abort()
            await parts.served_again()
            found = parts.host.find(0)
            assert found is not None
            assert found.size_bytes == SIZE

    asyncio.run(main())


class _Sized:
    """A device of another size."""

    def __init__(self, device: Any, size_bytes: int) -> None:
        self._device = device
        self.size_bytes = size_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def test_whether_the_kernel_took_a_link_is_known(tmp_path: Path) -> None:
    """It says nothing while the old one seems alive, as that of a front-end that hangs does."""

    async def main() -> None:
        async with serving() as hung, serving() as other:
            kernel: Any = ModelKernel(tmp_path)
            host = Host(tmp_path)
            first = await open_links(NbdTarget("disk", "127.0.0.1", hung.port), OWNER.client, 1, LIMIT_S)
            second = await open_links(NbdTarget("disk", "127.0.0.1", other.port), OWNER.client, 1, LIMIT_S)
            await handover.connect(kernel, host, first, OWNER, index=None, dead_timeout_s=60)
            assert not await handover.replace(kernel, host, second, OWNER, 0)
            first[0].cut()
            assert await handover.replace(kernel, host, second, OWNER, 0) == second
            assert await kernel.read(0, 10) == bytes(10)
            await kernel.ask(Request(Command.DISCONNECT, index=0))
            second[0].cut()

    asyncio.run(main())


@pytest.mark.parametrize(("processors", "used"), [(None, 1), (1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (64, 4)])
def test_no_more_links_are_made_than_the_kernel_uses(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, used: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert session.usable(4) == used
    assert session.usable(1) == 1


@pytest.mark.parametrize("found", [True, False])
def test_several_links_are_made_anew_together(tmp_path: Path, found: bool) -> None:
    """Each queue by one of its own, also where requests come while they are handed over."""

    async def main() -> None:
        async with story(tmp_path, found=found, connections=3) as parts:
            await parts.served_again()
            assert parts.served.server.connection_count == 3
            old = links_of(parts.served)

            async def ask_meanwhile() -> None:
                for queue in range(4):
                    asking.append(asyncio.create_task(parts.kernel.read(0, 10, queue)))
                    await asyncio.sleep(0)

            asking: list[asyncio.Task[bytes]] = []
            parts.kernel.meanwhile = ask_meanwhile
            parts.supervisor._links[1].socket.shutdown(socket.SHUT_RDWR)
            await until(lambda: len(links_of(parts.served) - old) == 3)
            new = links_of(parts.served) - old
            assert len({each.link_set for each in new}) == 1
            await until(lambda: len(asking) == 4 * 4)
            await parts.served_again()
            await asyncio.gather(*asking, return_exceptions=True)
            assert links_of(parts.served) == new, "a queue was moved: the set has ended"

    asyncio.run(main())


def links_of(served: Served) -> set[Connection]:
    """Those that have chosen their export."""
    return {each for each in served.server._connections if each.link_set.name}


def test_a_link_that_hangs_and_cannot_be_cut_is_done_without(tmp_path: Path) -> None:
    """As that of a queue without requests, where the process that made it was killed."""

    async def main() -> None:
        async with serving() as hung, serving() as other:
            kernel: Any = ModelKernel(tmp_path)
            host, owner = Host(tmp_path), replace(OWNER, connections=3)
            first = await open_links(NbdTarget("disk", "127.0.0.1", hung.port), OWNER.client, 3, LIMIT_S)
            second = await open_links(NbdTarget("disk", "127.0.0.1", other.port), OWNER.client, 3, LIMIT_S)
            await handover.connect(kernel, host, first, owner, index=None, dead_timeout_s=60)
            first[0].cut()
            first[2].cut()
            assert await handover.replace(kernel, host, second, owner, 0) == second[:2]
            for queue in (0, 1, 3):
                assert await kernel.read(0, 10, queue) == bytes(10)
            assert kernel.route(2) == 2
            await kernel.ask(Request(Command.DISCONNECT, index=0))
            for each in (*first, *second):
                each.cut()

    asyncio.run(main())


def test_a_socket_more_is_taken_only_where_one_is_dead(tmp_path: Path) -> None:
    """While all links seem to live, the first place alone is free, and a stand-in alone serves nobody."""

    async def main() -> None:
        async with serving() as served:
            kernel: Any = ModelKernel(tmp_path)
            host, owner = Host(tmp_path), replace(OWNER, connections=2)
            target = NbdTarget("disk", "127.0.0.1", served.port)
            first = await open_links(target, "host-1", 2, LIMIT_S)
            await handover.connect(kernel, host, first, owner, index=None, dead_timeout_s=60)
            second = await open_links(target, "host-2", 2, LIMIT_S)
            assert await handover.replace(kernel, host, second, owner, 0) == ()
            assert [kernel.route(queue) for queue in range(3)] == [1, 1, 2], "all goes on as it was"
            for queue in range(3):
                assert await kernel.read(0, 10, queue) == bytes(10)
            await kernel.ask(Request(Command.DISCONNECT, index=0))
            for each in (*first, *second):
                each.cut()

    asyncio.run(main())


@pytest.mark.parametrize("grown", [0, 4096])
def test_a_new_size_is_shown(tmp_path: Path, grown: int) -> None:
    async def main() -> None:
        async with story(tmp_path) as parts:
            nbd: Any = parts.kernel
            assert await handover.resize(nbd, parts.host, OWNER, 0, SIZE + grown) == bool(grown)
            found = parts.host.find(0)
            assert found is not None
            assert found.size_bytes == SIZE + grown

    asyncio.run(main())
