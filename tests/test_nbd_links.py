"""Links: what a client said on its old connection never takes effect after what it says on its new one."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.units import BLOCK_SIZE
from nbd_server.exports import Export
from nbd_server.links import Asked, link_name, parse_asked
from nbd_server.wire import OptionReply
from tests.nbd_client import Disconnected, NbdError
from tests.nbd_serving import Served, serving

OLD, NEW = b"o" * BLOCK_SIZE, b"n" * BLOCK_SIZE


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return uvloop.run if request.param == "uvloop" else asyncio.run


def test_what_is_asked_for() -> None:
    assert parse_asked("vol-1") == Asked("vol-1", "")
    assert parse_asked(link_name("vol-1", "host-7")) == Asked("vol-1", "host-7")
    assert parse_asked("") == Asked("", "")


@pytest.mark.parametrize("replaced", [True, False])
def test_an_unread_write_of_an_old_link_never_undoes_a_newer_one(run: Callable[[Any], Any], replaced: bool) -> None:
    """Kernels send again what was not answered; that is why plain clients that share a device are another matter."""

    async def main() -> None:
        async with serving(in_flight_requests=1) as served:
            old = await served.client("disk@host-1")
            served.volume.holding = True
            begun = asyncio.create_task(old.write(0, OLD))
            while not served.volume.held:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)
            unread = asyncio.create_task(old.write(BLOCK_SIZE, OLD))
            served.volume.holding = False
            new = await served.client("other@host-1" if replaced else "other@host-2")
            await new.write(BLOCK_SIZE, NEW)
            served.volume.release_all()
            ends = await asyncio.gather(begun, unread, return_exceptions=True)
            assert ends[0] is None, "what was begun is answered"
            assert isinstance(ends[1], Disconnected) == replaced
            assert await new.read(BLOCK_SIZE, BLOCK_SIZE) == (NEW if replaced else OLD)
            await new.close()
            await old.close()

    run(main())


def test_links_of_others_and_plain_connections_stay(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving() as served:
            others = [await served.client(name) for name in ("disk", "other@host-2", "disk@host-1")]
            newest = await served.client("disk@host-1")
            for each in (*others[:2], newest):
                assert await each.read(0, 10) == bytes(10)
            with pytest.raises(Disconnected):
                await others[2].read(0, 10)
            for each in (*others, newest):
                await each.close()

    run(main())


def test_a_fenced_link_is_closed_and_not_answered_with_an_error(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving() as served:
            link, plain = await served.client("disk@host-1"), await served.client("disk")
            served.volume.error = QuorumUnavailable("a minority answers")
            with pytest.raises(NbdError):
                await link.write(0, NEW)
            served.volume.error = Fenced("a newer attachment")
            with pytest.raises(Disconnected):
                await link.write(0, NEW)
            with pytest.raises(NbdError):
                await plain.write(0, NEW)
            await link.close()
            await plain.close()

    run(main())


def test_what_is_attached_for_a_client_is_for_its_links_alone(run: Callable[[Any], Any]) -> None:
    async def refused(served: Served, name: str) -> None:
        with pytest.raises(NbdError) as caught:
            await served.client(name)
        assert caught.value.errno == OptionReply.ERR_POLICY

    async def main() -> None:
        async with serving() as served:
            device = served.exports.remove("other").device
            served.exports.add(Export("other", device, client="host-1"))
            await refused(served, "other")
            await refused(served, "other@host-2")
            link = await served.client("other@host-1")
            assert await link.read(0, 10) == bytes(10)
            await link.close()

    run(main())
