"""Leases do not end while control itself is not run."""

import asyncio

import pytest

from blockstore.control.awake_clock import MOST_S, TICK_S, AwakeClock
from blockstore.control.presence import Presence
from blockstore.domain import FrontEndId
from tests.virtual_time import in_virtual_time

LEASE_S = 10.0


def test_while_it_runs_it_goes_as_the_machines_clock_and_what_it_was_not_run_for_hardly_counts() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        stood_still_s = 0.0
        clock = AwakeClock(lambda: loop.time() + stood_still_s)
        running = asyncio.create_task(clock.run())
        began = clock()
        await asyncio.sleep(60)
        assert clock() - began == pytest.approx(60)
        for turn in range(1, 4):
            stood_still_s += 3600
            assert clock() - began <= 60 + turn * (MOST_S + 2 * TICK_S), "also before the first tick behind it"
            await asyncio.sleep(TICK_S * 2)
        await asyncio.sleep(60)
        assert 120 <= clock() - began <= 120 + 3 * (MOST_S + 2 * TICK_S) + 0.001
        running.cancel()

    in_virtual_time(check)


def test_who_beat_until_control_stood_still_is_up_when_it_goes_on_and_down_a_lease_later() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        stood_still_s = 0.0
        clock = AwakeClock(lambda: loop.time() + stood_still_s)
        running = asyncio.create_task(clock.run())
        presence, front_end = Presence(LEASE_S, clock, lambda: 0), FrontEndId("fe-00000000000000001")
        await asyncio.sleep(1)
        presence.front_end_registered(front_end)
        stood_still_s += 3600
        assert presence.is_up(front_end)
        await asyncio.sleep(LEASE_S / 2)
        assert presence.is_up(front_end)
        await asyncio.sleep(LEASE_S)
        assert not presence.is_up(front_end)
        running.cancel()

    in_virtual_time(check)
