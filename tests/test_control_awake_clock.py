"""Leases do not end while control itself is not run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from blockstore.control.awake_clock import MOST_S, TICK_S, AwakeClock
from blockstore.control.presence import Presence
from blockstore.domain import FrontEndId
from tests.virtual_time import in_virtual_time

LEASE_S = 10.0


class Machine:
    """Its clock is the event loop's, and what it stood still for on top of that."""

    def __init__(self) -> None:
        self.stood_still_s = 0.0
        self._loop = asyncio.get_running_loop()

    def clock_s(self) -> float:
        return self._loop.time() + self.stood_still_s


@asynccontextmanager
async def clock_on_a_machine() -> AsyncIterator[tuple[AwakeClock, Machine]]:
    """The clock runs."""
    machine = Machine()
    clock = AwakeClock(machine.clock_s)
    running = asyncio.create_task(clock.run())
    yield clock, machine
    running.cancel()


def test_while_it_runs_it_goes_as_the_machines_clock_and_what_it_was_not_run_for_hardly_counts() -> None:
    async def check() -> None:
        async with clock_on_a_machine() as (clock, machine):
            began = clock()
            await asyncio.sleep(60)
            assert clock() - began == pytest.approx(60)
            for turn in range(1, 4):
                machine.stood_still_s += 3600
                assert clock() - began <= 60 + turn * (MOST_S + 2 * TICK_S), "also before the first tick behind it"
                await asyncio.sleep(TICK_S * 2)
            await asyncio.sleep(60)
            assert 120 <= clock() - began <= 120 + 3 * (MOST_S + 2 * TICK_S) + 0.001

    in_virtual_time(check)


def test_who_beat_until_control_stood_still_is_up_when_it_goes_on_and_down_a_lease_later() -> None:
    async def check() -> None:
        async with clock_on_a_machine() as (clock, machine):
            presence, front_end = Presence(LEASE_S, clock, lambda: 0), FrontEndId("fe-00000000000000001")
            await asyncio.sleep(1)
            presence.front_end_registered(front_end)
            machine.stood_still_s += 3600
            assert presence.is_up(front_end)
            await asyncio.sleep(LEASE_S / 2)
            assert presence.is_up(front_end)
            await asyncio.sleep(LEASE_S)
            assert not presence.is_up(front_end)

    in_virtual_time(check)
