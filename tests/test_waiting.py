"""Whoever waits beside work that fails is told of it."""

import asyncio

import pytest

from blockstore.errors import QuorumUnavailable
from blockstore.waiting import while_running
from tests.virtual_time import in_virtual_time


async def _fails(after_s: float) -> None:
    await asyncio.sleep(after_s)
    raise QuorumUnavailable("it is over")


async def _answers(after_s: float) -> str:
    await asyncio.sleep(after_s)
    return "answer"


def test_the_result_is_that_of_the_waiting_and_the_work_goes_on() -> None:
    async def check() -> None:
        work = asyncio.ensure_future(_fails(2.0))
        assert await while_running(work, _answers(1.0)) == "answer"
        assert not work.done()
        with pytest.raises(QuorumUnavailable):
            await work

    in_virtual_time(check)


def test_work_that_fails_ends_the_waiting() -> None:
    async def check() -> None:
        began = asyncio.get_running_loop().time()
        with pytest.raises(QuorumUnavailable):
            await while_running(asyncio.ensure_future(_fails(1.0)), _answers(3600.0))
        assert asyncio.get_running_loop().time() == began + 1.0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_virtual_time(check)
