"""Links: what a client said on its old connection never takes effect after what it says on its new one."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, MIB
from nbd_server.exports import Export
from nbd_server.links import Asked, LinkSet, link_name, parse_asked
from nbd_server.wire import OptionReply
from tests.nbd_client import Disconnected, NbdClient, NbdError
from tests.nbd_serving import Served, serving, settled, until

OLD, NEW = b"o" * BLOCK_SIZE, b"n" * BLOCK_SIZE


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return uvloop.run if request.param == "uvloop" else asyncio.run


def test_what_is_asked_for() -> None:
    assert parse_asked("vol-1") == Asked("vol-1", "")
    assert parse_asked(link_name("vol-1", "host-7")) == Asked("vol-1", "host-7")
    assert parse_asked(link_name("vol-1", "host-7", "5f")) == Asked("vol-1", "host-7", "5f")
    assert parse_asked("vol-1@host-7@5f@more") == Asked("vol-1", "host-7", "5f@more")
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


def cookie(queue: int, tag: int = 3, count: int = 1, byte_order: Literal["big", "little"] = "big") -> int:
    """As Linux makes one (drivers/block/nbd.c, nbd_cmd_handle): 6.12 big-endian, 6.1 as the machine is."""
    number = count << 32 | queue << 16 | tag
    return int.from_bytes(number.to_bytes(8, byte_order), "big")


@pytest.mark.parametrize("byte_order", ["big", "little"])
def test_a_queue_has_one_link_for_good(byte_order: Literal["big", "little"]) -> None:
    """What comes, by which link, of which queue, tag and count, and whether it may be begun; then the set has ended."""
    stories: list[list[tuple[str, tuple[int, int, int], bool]]] = [
        [("a", (0, 3, 1), True), ("b", (1, 3, 1), True), ("a", (0, 9, 7), True), ("b", (1, 0, 256), True)],
        [("a", (0, 3, 1), True), ("b", (0, 8, 1), False), ("a", (0, 3, 2), False), ("b", (1, 3, 1), False)],
        [("a", (0, 3, 1), True), ("a", (1, 3, 1), True), ("b", (2, 3, 1), True), ("b", (1, 3, 2), False)],
        [("b", (5, 3, 2), True), ("a", (5, 3, 1), False)],
        [("a", (63, 1023, 0xFFFFFFFF), True), ("b", (63, 0, 0x1FF), False)],
        [("a", (0, 3, 1), True), ("a", (64, 3, 1), False)],
        [("a", (0, 3, 1), True), ("a", (0, 1024, 1), False)],
        [("a", (1, 3, 0x101), True), ("b", (1, 3, 0x100), False)],
    ]
    for story in stories:
        links: LinkSet[str] = LinkSet("5f")
        begun = [links.may_begin(link, cookie(*value, byte_order)) for link, value, _ in story]
        assert begun == [may for _, _, may in story]
        assert links.ended != all(begun)


@pytest.mark.parametrize("value", [cookie(0, 0, 0x100), cookie(2, 5, 0x300, "little"), cookie(64, 3, 1), (1 << 64) - 1])
def test_a_first_request_that_does_not_tell_the_order_of_bytes_ends_the_set(value: int) -> None:
    links: LinkSet[str] = LinkSet("5f")
    assert not links.may_begin("a", value)
    assert links.ended


@given(st.integers(0, 63), st.integers(0, 1023), st.integers(1, (1 << 32) - 2), st.sampled_from(["big", "little"]))
def test_a_first_request_is_never_taken_for_one_of_another_queue(
    queue: int, tag: int, count: int, byte_order: Literal["big", "little"]
) -> None:
    links: LinkSet[str] = LinkSet("5f")
    if links.may_begin("a", cookie(queue, tag, count, byte_order)):
        assert links._link_of == {queue: "a"}
        assert not links.may_begin("b", cookie(queue, tag, count + 1, byte_order))


def test_a_link_alone_carries_all_queues_and_takes_no_other() -> None:
    alone: LinkSet[str] = LinkSet("")
    assert all(alone.may_begin(link, value) for link in "ab" for value in (0, 1 << 16, (1 << 64) - 1)), "its own"
    assert not alone.takes("")
    several: LinkSet[str] = LinkSet("5f")
    assert several.takes("5f")
    assert not several.takes("60")
    several.ended = True
    assert not several.takes("5f")
    assert not several.may_begin("a", cookie(0))


async def in_queue(served: Served, name: str, queue: int) -> NbdClient:
    """A client whose requests are of that hardware queue, as long as there are few."""
    client = await served.client(name)
    client._next_cookie = cookie(queue)
    return client


@pytest.mark.parametrize("kept", [True, False], ids=["the rule", "no rule"])
@pytest.mark.parametrize("seen", [True, False], ids=["a queue seen before", "one never seen"])
def test_a_write_that_its_kernel_moved_to_another_link_of_the_set_is_never_found_later(
    run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, kept: bool, seen: bool
) -> None:
    """It lies unread in one link, is sent again over another one, and a newer one comes before the first is read."""
    if not kept:
        monkeypatch.setattr(LinkSet, "may_begin", lambda *_: True)

    async def main() -> None:
        async with serving(in_flight_requests=1) as served:
            one, other = [await in_queue(served, "disk@host-1@5f", 0) for _ in range(2)]
            if seen:
                one._next_cookie = cookie(1, 1)
                await one.read(0, 10)
                one._next_cookie = cookie(0)
            served.volume.holding = True
            begun = asyncio.create_task(one.write(0, OLD))
            await until(lambda: bool(served.volume.held))
            one._next_cookie = cookie(1)
            unread = asyncio.create_task(one.write(BLOCK_SIZE, OLD))
            served.volume.holding = False

            other._next_cookie = cookie(1, count=2)
            try:
                await other.write(BLOCK_SIZE, OLD)
                assert not (kept and seen), "its first copy may lie in the link that its queue has"
            except Disconnected:
                assert kept
                assert seen
                other = await in_queue(served, "disk@host-1@60", 1)
                await other.write(BLOCK_SIZE, OLD)
            other._next_cookie = cookie(2)
            await other.write(BLOCK_SIZE, NEW)

            served.volume.release_all()
            ends = await asyncio.gather(begun, unread, return_exceptions=True)
            assert ends[0] is None, "what was begun is answered"
            assert isinstance(ends[1], Disconnected) == kept
            reader = await in_queue(served, "other@host-1@61", 0)
            assert await reader.read(BLOCK_SIZE, BLOCK_SIZE) == (NEW if kept else OLD)
            for each in (one, other, reader):
                await each.close()

    run(main())


def test_links_of_a_set_are_beside_each_other_until_another_set_comes(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving() as served:
            first = [await in_queue(served, name, queue) for queue, name in enumerate(("disk@host-1@5f",) * 3)]
            stranger = await in_queue(served, "disk@host-2@5f", 0)
            for each in (*first, stranger):
                assert await each.read(0, 10) == bytes(10)
            for newer in ("other@host-1@60", "disk@host-1"):
                second = await in_queue(served, newer, 0)
                assert await second.read(0, 10) == bytes(10)
                for each in first:
                    with pytest.raises(Disconnected):
                        await each.read(0, 10)
                first = [second]
            assert await stranger.read(0, 10) == bytes(10)
            for each in (*first, stranger):
                await each.close()

    run(main())


@pytest.mark.parametrize(("name", "most"), [("disk@host-1", 4), ("disk@host-1@5f", 1)])
def test_a_link_with_others_beside_it_has_less_begun_at_once(run: Callable[[Any], Any], name: str, most: int) -> None:
    """What has begun when a set ends is done twice."""

    async def main() -> None:
        async with serving(in_flight_bytes=4 * MIB, link_bytes=MIB) as served:
            link = await in_queue(served, name, 0)
            served.volume.holding = True
            writes = [asyncio.create_task(link.write(each * MIB, bytes(MIB))) for each in range(8)]
            await until(lambda: len(served.volume.held) == most)
            assert await settled(lambda: served.server.in_flight_bytes) == most * MIB
            served.volume.release_all()
            await asyncio.gather(*writes)
            await link.close()

    run(main())


def test_a_set_that_has_ended_is_not_joined(run: Callable[[Any], Any]) -> None:
    """Its name is free again: nothing of what its links had unread is begun any more."""

    async def main() -> None:
        async with serving() as served:
            one, other = [await in_queue(served, "disk@host-1@5f", 0) for _ in range(2)]
            assert await one.read(0, 10) == bytes(10)
            served.volume.holding = True
            begun = asyncio.create_task(one.read(0, BLOCK_SIZE))
            await until(lambda: bool(served.volume.held))
            with pytest.raises(Disconnected):
                await other.read(0, 10)
            late = await in_queue(served, "disk@host-1@5f", 0)
            served.volume.release_all()
            assert await begun == bytes(BLOCK_SIZE), "what was begun is answered"
            assert await late.read(0, 10) == bytes(10)
            for each in (one, other, late):
                await each.close()

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
