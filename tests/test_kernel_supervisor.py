"""An attached device, watched: over real servers, with a model of the kernel, and control's answers at hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockstore.config import AttachSettings
from blockstore.errors import QuorumUnavailable
from nbd_server.exports import Export
from nbd_server.kernel import handover
from nbd_server.kernel.devices import RETRY_MS, Host, Owner
from nbd_server.kernel.link import open_link
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

    async def begin(self, *, found: bool = False) -> None:
        """found: by a process that did not connect it."""
        nbd: Any = self.kernel
        control: Any = self.answers
        self.answers.place = self.place()
        link = await open_link(self.place().targets[0], OWNER.client, LIMIT_S)
        assert await handover.connect(nbd, self.host, link, OWNER, index=None, dead_timeout_s=60) == 0
        self.supervisor = Supervisor(
            nbd, self.host, control, SETTINGS, index=0, owner=OWNER, read_only=False, place=self.place(),
            link=None if found else link, tell=lambda state: None,
        )  # fmt: skip
        self.running = asyncio.create_task(self.supervisor.run())

    async def served_again(self) -> None:
        """The device reads."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    assert await self.kernel.read(0, 10) == bytes(10)
                    break
                except OSError:
                    await asyncio.sleep(0.02)
        await until(lambda: self.supervisor.state is State.SERVED)
        assert self.kernel.timeout_s == 0, "a slow request would end the link"
        assert (self.host._sys / "nbd0" / "queue" / "io_timeout").read_text() == f"{RETRY_MS}\n"


@asynccontextmanager
async def story(root: Path, *, found: bool = False) -> AsyncIterator[Story]:
    async with serving() as served:
        parts = Story(served, root)
        await parts.begin(found=found)
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
            old = parts.kernel.socket
            for connection in list(parts.served.server._connections):
                connection.abort()
            await parts.served_again()
            assert parts.kernel.socket is not old

    asyncio.run(main())


def test_a_device_that_is_found_gets_a_link_that_is_ours(tmp_path: Path) -> None:
    async def main() -> None:
        async with story(tmp_path, found=True) as parts:
            old = parts.kernel.socket
            await until(lambda: parts.kernel.socket is not old)
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
            old = parts.kernel.socket
            parts.kernel.show_traffic(in_flight=1, completed=5)
            await until(lambda: parts.supervisor.state is State.ASKING)
            await until(lambda: parts.supervisor.state is State.SERVED)
            assert parts.kernel.socket is old
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
            other.exports.add(Export("disk", _Smaller(device)))  # type: ignore[arg-type]
            parts.answers.place = parts.place(other, "fe-2")
            for connection in list(parts.served.server._connections):
                connection.abort()
            await until(lambda: len(parts.answers.avoided) >= 3)
            assert not parts.kernel.alive

    asyncio.run(main())


class _Smaller:
    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @property
    def size_bytes(self) -> int:
        return SIZE // 2


def test_whether_the_kernel_took_a_link_is_known(tmp_path: Path) -> None:
    """It says nothing while the old one seems alive, as that of a front-end that hangs does."""

    async def main() -> None:
        async with serving() as hung, serving() as other:
            kernel: Any = ModelKernel(tmp_path)
            host = Host(tmp_path)
            first = await open_link(NbdTarget("disk", "127.0.0.1", hung.port), OWNER.client, LIMIT_S)
            second = await open_link(NbdTarget("disk", "127.0.0.1", other.port), OWNER.client, LIMIT_S)
            await handover.connect(kernel, host, first, OWNER, index=None, dead_timeout_s=60)
            assert not await handover.replace(kernel, host, second, OWNER, 0)
            first.cut()
            assert await handover.replace(kernel, host, second, OWNER, 0)
            assert await kernel.read(0, 10) == bytes(10)
            await kernel.ask(Request(Command.DISCONNECT, index=0))
            second.cut()

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
