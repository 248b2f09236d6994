"""A clock that stands still while nothing runs, and else goes as every other."""

import asyncio
import time

from tests.patient_time import TURN_S, PatientLoop, run_patiently


def test_a_time_in_which_nothing_ran_does_not_count() -> None:
    async def stalls() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, PatientLoop)
        began_s, beaten = loop.time(), asyncio.ensure_future(asyncio.sleep(TURN_S / 5))
        time.sleep(50 * TURN_S)  # noqa: ASYNC251  # all that there is in this process stands
        assert loop.time() - began_s <= TURN_S
        await beaten
        assert loop.time() - began_s <= 10 * TURN_S

    run_patiently(stalls())


def test_what_is_waited_for_counts_in_full() -> None:
    async def waits() -> None:
        began_s, really_began_s = asyncio.get_running_loop().time(), time.monotonic()
        for _ in range(3):
            await asyncio.sleep(4 * TURN_S)
        waited_s = asyncio.get_running_loop().time() - began_s
        assert 12 * TURN_S - 0.001 <= waited_s <= time.monotonic() - really_began_s + 0.001

    run_patiently(waits())
