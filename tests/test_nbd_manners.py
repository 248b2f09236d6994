"""The server's manners: how it ends, and that one greedy client slows only itself."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from blockstore.units import BLOCK_SIZE, KIB, MIB
from nbd_server.budget import Budget, Client, Share
from nbd_server.limits import TURN_REQUESTS, Limits
from nbd_server.wire import Command
from tests.nbd_client import Disconnected, NbdClient, NbdError
from tests.nbd_serving import LIMIT_S, serving, settled, until

GREEDY, POLITE = "127.0.0.2", "127.0.0.1"


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return uvloop.run if request.param == "uvloop" else asyncio.run


# ---- the end


def test_at_the_end_new_requests_are_refused_and_a_client_that_leaves_is_not_waited_for(
    run: Callable[[Any], Any],
) -> None:
    async def main() -> None:
        async with serving(farewell_s=60.0) as served:
            client = await served.client()
            await client.write(0, b"x")
            closing = asyncio.ensure_future(served.server.close())
            await asyncio.sleep(0)
            for request in (client.read(0, 1), client.write(0, bytes(MIB)), client.flush()):
                with pytest.raises(NbdError) as caught:
                    await request
                assert caught.value.errno == errno.ESHUTDOWN
            assert not closing.done()
            await client.close()  # DISC: long before the minute is over
            await asyncio.wait_for(closing, 40)
            assert bytes(served.volume.contents[:1]) == b"x"

    run(main())


def test_who_is_idle_is_let_go_soon(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving(farewell_s=0.05) as served:
            client = await served.client()
            handshake = await served.raw(None)
            await asyncio.wait_for(served.server.close(), LIMIT_S)
            assert await handshake.ended() == b""
            with pytest.raises(Disconnected):
                await client.read(0, 1)

    run(main())


def test_links_are_ended_without_an_error(run: Callable[[Any], Any]) -> None:
    """To a file system ESHUTDOWN is a broken disk; an end is what its client mends."""

    async def main() -> None:
        async with serving(farewell_s=60.0) as served:
            link = await served.client("disk@host-1")
            served.volume.holding = True
            begun = asyncio.create_task(link.write(0, bytes(BLOCK_SIZE)))
            await until(lambda: len(served.volume.held) == 1)
            closing = asyncio.ensure_future(served.server.close())
            await asyncio.sleep(0)
            late = asyncio.create_task(link.read(0, 1))
            served.volume.release_all()
            await begun
            with pytest.raises(Disconnected):
                await late
            await asyncio.wait_for(closing, 40)

    run(main())


def test_a_request_that_does_not_end_holds_the_end_up_for_so_long_only(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving(drain_s=0.2, farewell_s=0.05) as served:
            client = await served.client()
            served.volume.holding = True
            stuck = asyncio.create_task(client.read(0, 1))
            await until(lambda: len(served.volume.held) == 1)
            await asyncio.wait_for(served.server.close(), LIMIT_S)
            with pytest.raises(Disconnected):
                await stuck

    run(main())


# ---- one beside the other


def test_one_address_has_so_many_connections_and_others_have_theirs(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving(connections_per_client=3) as served:
            greedy = [await served.client(source=GREEDY) for _ in range(3)]
            with pytest.raises(Disconnected):
                await served.client(source=GREEDY)
            polite = await served.client(source=POLITE)
            await polite.read(0, 1)
            await greedy[0].read(0, 1)
            await greedy.pop().close()
            await until(lambda: served.server.connection_count == 3)
            greedy.append(await served.client(source=GREEDY))
            for each in (*greedy, polite):
                await each.close()

    run(main())


def test_all_connections_of_one_address_hold_so_much_together(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with serving(client_bytes=32 * MIB, total_bytes=128 * MIB, in_flight_bytes=32 * MIB) as served:
            served.volume.holding = True
            greedy = [await served.client(source=GREEDY) for _ in range(4)]
            reads = [asyncio.create_task(each.read(0, 8 * MIB)) for each in greedy for _ in range(4)]
            await until(lambda: sum(served.volume.held_lengths) >= 32 * MIB - 8 * MIB)
            assert await settled(lambda: served.server.in_flight_bytes) <= 32 * MIB + 4 * 256 * KIB
            polite = await served.client(source=POLITE)
            large = asyncio.create_task(polite.read(0, 32 * MIB))
            await until(lambda: 32 * MIB in served.volume.held_lengths)
            served.volume.release_all()
            assert len(await large) == 32 * MIB
            assert [len(each) for each in await asyncio.gather(*reads)] == [8 * MIB] * 16
            for each in (*greedy, polite):
                await each.close()

    run(main())


def test_a_greedy_client_takes_turns_with_a_polite_one(run: Callable[[Any], Any]) -> None:
    """Eight connections with 128 reads in flight each: only some of these go before another client's only one.

    A request takes a few turns of the loop, in each of which the greedy client has one of its own.
    """

    async def main() -> None:
        async with serving() as served:
            polite = await served.client(source=POLITE)
            greedy = [await served.client(source=GREEDY) for _ in range(8)]
            ended = asyncio.Event()

            async def read_on(client: NbdClient) -> None:
                while not ended.is_set():
                    await client.read(0, BLOCK_SIZE)

            def answered() -> int:
                return served.answered(Command.READ)

            load = [asyncio.create_task(read_on(each)) for each in greedy for _ in range(128)]
            await until(lambda: answered() > 3000)
            passed = []
            for _ in range(30):
                before = answered()
                await polite.read(0, BLOCK_SIZE)
                passed.append(answered() - before)
            ended.set()
            await asyncio.gather(*load)
            assert sorted(passed)[len(passed) // 2] <= 8 * TURN_REQUESTS
            for each in (*greedy, polite):
                await each.close()

    run(main())


# ---- the budget behind it


class Asking:
    """A connection that asks until it gets."""

    def __init__(self, budget: Budget, client: Client) -> None:
        self.looks = 0
        self.wants = 0
        self.share = Share(budget, self._look)
        self.share.client = client

    def _look(self) -> None:
        self.looks += 1

    def ask(self, count: int) -> None:
        self.wants = count
        self.try_again()

    def give_back(self) -> None:
        """All that it has; a connection looks by itself then whether it may go on."""
        self.share.give_back(self.share.held_bytes)
        self.try_again()

    def try_again(self) -> None:
        self.looks = 0
        if self.wants and self.share.may_take(self.wants):
            self.share.take(self.wants)
            self.wants = 0


@example([(2, 3, False), (4, 7, False), (4, 1, False), (2, 4, False), (0, 4, False), (3, 6, False), (1, 3, False),
          (4, 5, True)])  # fmt: skip
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8), st.booleans()), max_size=60))
def test_nobody_waits_for_good_and_no_limit_is_passed(steps: list[tuple[int, int, bool]]) -> None:
    limits = Limits(total_bytes=64 * MIB, client_bytes=40 * MIB, in_flight_bytes=32 * MIB)
    budget = Budget(limits)
    clients = [Client(), Client()]
    asking = [Asking(budget, clients[number % 2]) for number in range(6)]

    def settle() -> None:
        for _ in range(100):
            if not any(each.looks for each in asking):
                return
            for each in asking:
                if each.looks:
                    each.try_again()
        raise AssertionError("they send each other from line to line")

    for number, count, gives_back in steps:
        each = asking[number]
        if gives_back:
            each.give_back()
        elif not each.wants:
            each.ask(count * 4 * MIB)
        settle()
        for client in clients:
            assert client.held_bytes <= limits.client_bytes + 3 * limits.own_bytes
        assert budget.used_bytes == sum(client.held_bytes for client in clients)
        assert budget.used_bytes <= limits.total_bytes + 6 * limits.own_bytes
    for _ in range(10):  # each round lets at least one go on
        for each in asking:
            each.give_back()
            settle()
    assert not any(each.wants for each in asking)
